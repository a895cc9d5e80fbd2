"""Figures of finished models: those of training to the bit, transformers' to rounding, comparable over tokenizers."""

from __future__ import annotations

import json
import math
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError, RefusedError
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.manifest import write_manifest
from megatron_hammer.dataset.format import TokenizerRecord
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.evaluation.measure import EvaluationOptions, Figures, check_options, measure, sets_of
from megatron_hammer.evaluation.sets import Framing, NamedSet, TextCounts, count_text, open_set, parse_sets
from megatron_hammer.evaluation.subjects import ModelReader, describe_subject
from megatron_hammer.huggingface.certificate import TEXTS
from megatron_hammer.tokenizer.load import load_tokenizer
from tests.huggingface.unproved import write_unproved
from tests.page_blocks import blocks_of
from tests.train.runs import ROOT, metrics, train_here

DOCUMENTS = [TEXTS["zh"], TEXTS["en"][:300], "", TEXTS["code"][:400], "短"]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """``run``, two steps of a bf16 model; ``hf``, its export; ``zh_text_document``, and its texts as ``zh.jsonl``."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = load_tokenizer(tokenizer_model)
    record = TokenizerRecord(tokenizer.fingerprint, tokenizer.vocab_size)
    for name, texts in {"train": DOCUMENTS * 3, "zh": DOCUMENTS, "new": [TEXTS["en"]]}.items():
        options = {"prepend_bos": True, "append_eod": True}
        with IndexedWriter(folder / f"{name}_text_document", tokenizer.vocab_size, None, record, options) as writer:
            writer.add(*tokenizer.encode_documents(texts, first=tokenizer.bos_id, last=tokenizer.eos_id))
        write_texts(folder / f"{name}.jsonl", texts)
    arguments = [
        f"data.train={folder}/train_text_document", f"data.valid={{zh: {folder}/zh_text_document}}",
        f"tokenizer.path={tokenizer_model}", "data.seq_length=48", "train.num_steps=2", "train.global_batch_size=2",
        "train.micro_batch_size=2", "train.eval_samples=5", "train.precision=bf16", "log.tensorboard=false",
        "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "model.num_attention_heads=4",
        "model.num_query_groups=2", f"train.output={folder}/run",
    ]  # fmt: skip
    assert train_here(0, arguments) == 0
    write_unproved(open_checkpoint(folder / "run"), folder / "hf")
    return folder


def figures(
    model: Path | str, sets: list[NamedSet], backend: ModelReader = "auto", reference: Any = None, **options: Any
) -> Figures:
    subject = describe_subject(str(model), backend=backend)
    (found,) = measure([subject], sets, EvaluationOptions(**options), reference)
    return found


def texts_of(folder: Path, name: str = "zh") -> list[NamedSet]:
    return parse_sets([f"{name}={folder}/{name}.jsonl"])


def test_a_run_gives_what_its_own_evaluation_gave(folder: Path) -> None:
    """To the bit: loss, perplexity, bits per byte; whatever the run called the set."""
    last = metrics(folder / "run")[-1]
    sets = sets_of([describe_subject(str(folder / "run"))])
    found = figures(folder / "run", sets, samples=5)
    assert (found.set, found.step, found.seq_length, found.tokens) == ("zh", 2, 48, 5 * 48)
    for key in ("loss", "perplexity", "bits_per_byte", "bits_per_character"):
        assert getattr(found, key) == last[f"valid/zh/{key}"], key


def test_a_set_as_text_is_the_set_as_a_dataset(folder: Path) -> None:
    """The same windows, framed as the run's documents are; and all figures by the text's own bytes and characters."""
    from_text = figures(folder / "run", texts_of(folder))
    from_ids = figures(folder / "run", parse_sets([f"zh={folder}/zh_text_document"]))
    assert replace(from_text, seconds=0.0) == replace(from_ids, seconds=0.0)
    text = "".join(DOCUMENTS)
    assert (from_text.bytes, from_text.characters) == (len(text.encode()), len(text))
    nats = from_text.loss * from_text.tokens
    assert from_text.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-12)
    assert from_text.bits_per_character == pytest.approx(nats / math.log(2) / len(text), rel=1e-12)


def test_each_token_is_predicted_once_from_its_window(folder: Path) -> None:
    """The rule, by transformers and without our windows: documents in a row, cut every s tokens, one of overlap."""
    from transformers import AutoModelForCausalLM

    found = figures(folder / "hf", texts_of(folder), dtype="float32", seq_length=48)
    tokenizer = load_tokenizer(folder / "hf")
    ids = tokenizer.encode_documents(DOCUMENTS, first=tokenizer.bos_id, last=tokenizer.eos_id)[0].tolist()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    nats = 0.0
    for start in range(0, len(ids) - 1, 48):
        window = torch.tensor([ids[start : start + 49]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0].double()
        nats -= torch.log_softmax(logits, -1).gather(1, window[0, 1:, None]).sum().item()
    assert found.tokens == len(ids) - 1 and found.loss * found.tokens == pytest.approx(nats, rel=1e-6)


def test_our_model_is_transformers_on_a_folder_and_on_its_checkpoint(folder: Path) -> None:
    ours = figures(folder / "hf", texts_of(folder), dtype="float32", seq_length=48)
    theirs = figures(folder / "hf", texts_of(folder), "transformers", dtype="float32", seq_length=48)
    checkpoint = figures(folder / "run", texts_of(folder), dtype="float32", seq_length=48)
    assert (ours.tokens, ours.bytes) == (theirs.tokens, theirs.bytes) == (checkpoint.tokens, checkpoint.bytes)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6) and ours.loss == pytest.approx(checkpoint.loss, rel=2e-3)
    exact = figures(folder / "hf", texts_of(folder), seq_length=48)  # in the weights' own type, as the run computes
    assert exact.loss == figures(folder / "run", texts_of(folder), micro_batch_size=1).loss


def test_the_reference_states_perplexity_per_its_own_tokens(folder: Path, tokenizer_model: Path) -> None:
    """A model of twice as many tokens for the same text gets no advantage; nor do sets that are datasets."""
    reference = load_tokenizer(tokenizer_model)
    for sets in (texts_of(folder), parse_sets([f"zh={folder}/zh_text_document"])):
        found = figures(folder / "run", sets, reference=reference)
        tokens = sum(len(reference.encode(text)) + 1 for text in DOCUMENTS if text)
        assert found.reference_tokens == tokens
        assert found.reference_perplexity == pytest.approx(math.exp(found.loss * found.tokens / tokens), rel=1e-12)
    part = figures(folder / "run", texts_of(folder), reference=reference, samples=2)
    assert part.tokens == 96 and part.bytes is not None and part.bytes < len("".join(DOCUMENTS).encode())
    assert part.reference_tokens is not None and 90 <= part.reference_tokens <= 97


def test_ids_beyond_the_tokenizers_stand_for_nothing(tokenizer_model: Path, tmp_path: Path) -> None:
    """A model's vocabulary may be larger, and a dataset without a header may have such ids."""
    tokenizer = load_tokenizer(tokenizer_model)
    ids, size = tokenizer.encode(TEXTS["en"]), tokenizer.vocab_size
    with IndexedWriter(tmp_path / "x", size + 8) as writer:
        writer.add(np.array([*ids, size + 2]), np.array([len(ids) + 1]))
    named = NamedSet("x", str(tmp_path / "x"), False)
    valid = open_set(named, tokenizer, Framing(None, None), size + 8, 48, None, False, tmp_path)
    counts = count_text(named, valid, tokenizer, tokenizer)
    pieces = tokenizer.read_pieces()
    assert counts == TextCounts(sum(pieces.lengths[ids[1:]]), sum(pieces.characters[ids[1:]]), len(ids) + 1)


def test_a_family_that_we_do_not_know_is_computed_by_transformers(folder: Path, tmp_path: Path) -> None:
    """GPT-2, random: its loss is that of its class."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 700, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "hf" / name, tmp_path / "gpt2" / name)
    subject = describe_subject(f"theirs={tmp_path}/gpt2")
    assert (subject.name, subject.kind, subject.longest, subject.seq_length) == ("theirs", "transformers", 32, 32)
    with pytest.raises(ConfigError, match=r"error\[E233\]: --seq-length=64 is longer than theirs is made for, 32"):
        check_options([subject], EvaluationOptions(seq_length=64))
    (found,) = measure([subject], texts_of(folder), EvaluationOptions(around="none"))
    ids = [i for text in DOCUMENTS for i in (subject.tokenizer.encode(text) if subject.tokenizer else [])]
    assert found.tokens == len(ids) - 1
    first = torch.tensor([ids[:33]])
    with torch.no_grad():
        logits = model(first[:, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, first[0, 1:]).item()
    (window,) = measure([subject], texts_of(folder), EvaluationOptions(around="none", samples=1))
    assert window.loss == pytest.approx(expected, rel=1e-6)
    with pytest.raises(CheckpointError, match=r"error\[E421\]"):
        describe_subject(str(tmp_path / "gpt2"), backend="ours")


@pytest.fixture
def not_a_number(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The export with one weight that is not a number."""
    copy = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    yield copy


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
    return int(ending.value.code or 0)


def test_the_program_shows_models_side_by_side(
    folder: Path, not_a_number: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run on a new set: today it said that nothing is left to do. A loss that is NaN: exit code 9."""
    new = f"new={folder}/new.jsonl"
    assert run_tool(monkeypatch, folder / "run", f"ours={folder}/hf", "--set", new, "--json", "--device", "cpu") == 0
    tree = json.loads(capsys.readouterr().out)
    assert [(m["name"], m["kind"], m["step"]) for m in tree["models"]] == [
        ("run@2", "checkpoint", 2),
        ("ours", "hf", None),
    ]
    assert [(r["model"], r["set"]) for r in tree["results"]] == [("run@2", "new"), ("ours", "new")]
    assert all(0 < r["bits_per_byte"] < r["bits_per_character"] for r in tree["results"])
    assert run_tool(monkeypatch, not_a_number, "--set", new, "--seq-length", 48, "--device", "cpu") == 9
    said = capsys.readouterr()
    assert "nan" in said.out and "error[E904]" in said.err
    assert run_tool(monkeypatch, folder / "run", "--samples", 5, "--reference", folder / "hf") == 0
    assert "by reference" in capsys.readouterr().out


def test_the_commands_of_the_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/evaluation.md, of which the last one compares two models on two sets."""
    for name, made in {"runs/mine": "run", "data/new_text_document.bin": "new_text_document.bin", "hf": "hf",
                       "data/new_text_document.idx": "new_text_document.idx", "finance.jsonl": "new.jsonl",
                       "general.jsonl": "zh.jsonl"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(folder / made)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = blocks_of(page)
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) == 3
    for _, tool, *words in commands:
        assert tool == "tools/evaluate.py"
        toy = [word.replace("runs/mine/hf", "hf").replace("/models/qwen3", "hf") for word in words]
        assert run_tool(monkeypatch, *toy, "--device", "cpu") == 0, words


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["run", "hf", "--step", "2"], 2, "E233"),
        (["hf"], 2, "E234"),
        (["run", "--set", "x"], 2, "E234"),
        (["run", "--set", "x=new.jsonl", "--set", "x=zh.jsonl"], 2, "E234"),
        (["run", "--samples", "0"], 2, "E233"),
        (["run", "--backend", "transformers"], 2, "E233"),
        (["run", "run"], 2, "E233"),
        (["run", "--set", "x=missing.jsonl"], 3, "E301"),
        (["run", "--step", "7"], 4, "E401"),
        (["rum"], 4, "E490"),
        (["run", "--device", "cuda:99"], 2, "E204"),
        (["run", "--device", "tpu"], 2, "E233"),
    ],
)
def test_what_is_refused(
    folder: Path, arguments: list[str], code: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert run_tool(monkeypatch, *arguments) == code
    assert f"error[{said}]" in capsys.readouterr().err


def test_a_model_without_tokenizer_ends_it_before_the_first_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "hf", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert run_tool(monkeypatch, folder / "run", tmp_path / "bare", "--set", f"x={folder}/new.jsonl") == 2
    said = capsys.readouterr().err
    assert "error[E233]" in said and "bare has no tokenizer" in said and "windows of" not in said


def test_documents_begin_as_prompts_do_where_the_data_has_gone(folder: Path, tmp_path: Path) -> None:
    """One rule for evaluation, generation and export: with bos for sentencepiece where nobody knows better."""
    from megatron_hammer.huggingface.text_model import open_saved

    manifest = open_checkpoint(shutil.copytree(folder / "run", tmp_path / "run"))
    gone = {"train": {str(tmp_path / "gone_text_document"): 1.0}}
    (manifest.folder / "manifest.json").unlink()
    write_manifest(replace(manifest, config=manifest.config | {"data": manifest.config["data"] | gone}))
    subject = describe_subject(str(tmp_path / "run"))
    assert subject.tokenizer is not None
    start = open_saved(open_checkpoint(tmp_path / "run")).start
    assert subject.begins_with_bos and start == (subject.tokenizer.bos_id,)
    check_options([subject], EvaluationOptions(around="both"))
    subject.tokenizer.bos_id = None
    check_options([subject], EvaluationOptions(around="eos"))
    with pytest.raises(ConfigError, match=r"E233.*--around both asks for bos, which"):
        check_options([subject], EvaluationOptions(around="both"))
    shutil.copytree(folder / "hf", tmp_path / "hf")
    for recorded in (False, True):  # an export knows, whatever its tokenizer does
        (tmp_path / "hf" / "certificate.json").write_text(json.dumps({"documents": {"begin_with_bos": recorded}}))
        assert describe_subject(str(tmp_path / "hf")).begins_with_bos is recorded


def test_a_dataset_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "other", 700, None, TokenizerRecord("f" * 32, 700)) as writer:
        writer.add(*load_tokenizer(folder / "hf").encode_documents([TEXTS["en"]]))
    with pytest.raises(RefusedError, match="E510"):
        figures(folder / "run", parse_sets([f"x={tmp_path}/other"]))
    empty = write_texts(tmp_path / "empty.jsonl", [""])
    with pytest.raises(DataError, match="E345"):
        figures(folder / "run", parse_sets([f"x={empty}"]))
