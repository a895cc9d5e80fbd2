"""What other people's programs make of our export, and what we make of their files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_hammer.dataset.reader import IndexedDataset
from tests.clients.conftest import ROOT, Exported


def sequences(prefix: Path) -> list[list[int]]:
    """Token ids of every sequence of an indexed dataset."""
    data = IndexedDataset(prefix)
    return [part.tolist() for part in np.split(data.tokens, np.cumsum(data.lengths)[:-1])]


Ask = Callable[..., dict[str, Any]]

# What wraps a text in the answer of a client that begins prompts as training documents began.
BOS = 1


def ids_of(exported: Exported, texts: list[str]) -> list[list[int]]:
    """sentencepiece's own."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(exported.run / "tokenizer" / "tokenizer.model"))
    return [list(model.encode(text)) for text in texts]


@pytest.mark.parametrize("version", ["transformers==4.50.*", "transformers==4.57.*", "transformers"])
def test_transformers(exported: Exported, ask: Ask, version: str) -> None:
    found = ask("transformers_client", version)
    plain = ids_of(exported, exported.request["texts"])
    assert [ids[1:] if ids[:1] == [BOS] else ids for ids in found["ids"]] == plain, found["version"]
    assert found["greedy"] == exported.greedy()
    assert found["decoded"] == exported.request["texts"]
    assert found["model_max_length"] == 256
    assert len(found["batch"]) == 4, "a padded batch"
    assert found["prompt_bos"] == [True], "prompts begin as training documents did"


def test_llama_cpp(exported: Exported, ask: Ask) -> None:
    found = ask("llamacpp_client", "xllamacpp", "gguf", "safetensors", "sentencepiece", "numpy")
    plain = ids_of(exported, exported.request["texts"])
    assert found["ids"] == plain
    assert found["ids_of_a_prompt"] == [[BOS, *ids] for ids in plain]
    ours = [ids[: ids.index(2)] if 2 in ids else ids for ids in exported.greedy()]  # llama.cpp stops at the end
    assert [ids[: ids.index(2)] if 2 in ids else ids for ids in found["greedy"]] == ours
    assert found["special"] | {"bos": 1, "eos": 2} == found["special"]
    assert found["add_special"] == {"bos": True, "eos": False}


def test_litgpt(exported: Exported, ask: Ask) -> None:
    found = ask("litgpt_client", "litgpt")
    assert found["greedy"] == exported.greedy()
    assert (found["use_bos"], found["bos"], found["eos"]) == (True, 1, 2)


def test_lm_eval(exported: Exported, ask: Ask) -> None:
    """The log-likelihood of each choice, against ours from the checkpoint."""
    found = ask("lm_eval_client", "lm-eval[hf]")
    for (question, choices), logs in zip(exported.request["choices"], found["loglikelihoods"], strict=True):
        for choice, log in zip(choices, logs, strict=True):
            whole, start = ids_of(exported, [question + choice, question])
            ids = [BOS, *whole]
            scores = exported.logits(ids).log_softmax(-1)
            expected = sum(float(scores[i - 1, ids[i]]) for i in range(1 + len(start), len(ids)))
            assert log == pytest.approx(expected, rel=1e-4), (question, choice)


def test_one_lora_step(exported: Exported, ask: Ask) -> None:
    found = ask("lora_client", "peft", "trl")
    assert found["same"] and found["changed"] and found["adapters"] == 2 * 4
    assert 0 < found["loss"] < 20


def test_what_datatrove_and_datasets_write_is_read_here(exported: Exported, ask: Ask, tmp_path: Path) -> None:
    ask("writers_client", "datatrove[processing]", "datasets")
    texts = [text for text in exported.request["texts"] if text]
    for name in ("rows.jsonl.gz", "rows_escaped.jsonl", "rows.parquet"):
        done = subprocess.run(
            [sys.executable, "tools/preprocess_data.py", "--input", tmp_path / name, "--output-prefix",
             tmp_path / name.split(".")[0], "--tokenizer-model", exported.run / "tokenizer" / "tokenizer.model",
             "--append-eod"],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = sequences(tmp_path / f"{name.split('.')[0]}_text_document")
        assert found == [[*ids, 2] for ids in ids_of(exported, texts)], name
    # The tokenizers library takes <s> in a text for the control token; a whole document is one of ours.
    theirs = [ids for text, ids in zip(texts, sequences(tmp_path / "datatrove" / "00000_tokens")) if "<s>" not in text]
    assert theirs == [[*ids, 2] for ids in ids_of(exported, [text for text in texts if "<s>" not in text])]
