"""A tokenizer through the whole main job: trained, merged and converted here, or of any kind that people bring."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.tokenizer.convert import convert_tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.required_characters import TABLE_NAME, read_required
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.huggingface.continued import generate
from tests.tokenizer.texts import Texts, training_texts
from tests.train.runs import metrics, train_here

ROOT = Path(__file__).parents[1]
SYMBOLS = ["<br>", "两个 词", "\\357\\274", "def ", "7"]
SHORT_RUN = ["train.num_steps=4", "data.seq_length=64", "train.global_batch_size=4", "schedule.warmup_steps=1",
             "log.tensorboard=false"]  # fmt: skip


def run_tool(name: str, *arguments: object) -> str:
    """A tool's ``main`` in this process, where torch and transformers are imported once for all; what it printed.

    ``test_tokenizer_and_data_pages.py`` runs the same chain as programs.
    """
    before, said = sys.argv, io.StringIO()
    sys.argv = [name, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(said):
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    finally:
        sys.argv = before
    assert ended.value.code == 0
    return said.getvalue()


# ---- made by these tools ----


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the whole job, and what ``generate.py`` printed. Each step takes what the one before it wrote."""
    out = tmp_path_factory.mktemp("job")
    corpus, data, hf = out / "corpus", out / "data", out / "tokenizer"
    domains = [corpus / f"{name}.jsonl" for name in ("zh", "en", "code")]
    (out / "symbols.txt").write_text("".join(f"{symbol}\n" for symbol in SYMBOLS), encoding="utf-8")
    run_tool("make_sample_corpus.py", "--out", corpus, "--bytes-per-domain", 100_000)
    train = ["train_tokenizer.py", "--input"]
    run_tool(*train, *domains, "--vocab-size", 1500, "--output", out / "base.model")
    run_tool(*train, domains[0], "--vocab-size", 9000, "--required-chars", "tgh2013", "--output", out / "donor.model")
    run_tool("merge_tokenizer.py", "--base", out / "base.model", "--donor", out / "donor.model",
             "--required-chars", "tgh2013", "--user-defined-symbols", out / "symbols.txt",
             "--output", out / "merged")  # fmt: skip
    run_tool("convert_tokenizer.py", out / "merged" / "tokenizer.model", hf)
    preprocess = ["preprocess_data.py", "--append-eod", "--prepend-bos", "--input"]
    run_tool(*preprocess, *domains, "--tokenizer-model", out / "merged" / "tokenizer.model", "--output-prefix", data)
    valid = corpus / "zh.valid.jsonl"
    run_tool(*preprocess, valid, "--tokenizer-model", hf, "--output-prefix", out / "valid")
    code = train_here(0, [f"tokenizer.path={hf}", f"data.train={data}_text_document",
                          f"data.valid={{zh: {out}/valid_text_document}}", f"train.output={out}/run", *SHORT_RUN,
                          "train.eval_interval_steps=4", "train.eval_samples=4"])  # fmt: skip
    assert code == 0
    run_tool("checkpoint_to_hf.py", "--load", out / "run", "--output", out / "hf")
    prompts = ["--prompt", "渡口的<br>晨雾", "--prompt", "def main(", "--max-new-tokens", 4]
    return out, run_tool("generate.py", "--hf", out / "hf", *prompts)


def test_a_tokenizer_of_these_tools_goes_through_the_whole_job(job: tuple[Path, str]) -> None:
    out, said = job
    merged = load_tokenizer(out / "merged" / "tokenizer.model")
    assert isinstance(merged, SentencePieceTokenizer)
    characters = read_required(TABLE_NAME).characters
    assert len(characters) == 8105 and all(len(merged.encode(c)) == 1 for c in characters)
    assert all(len(merged.encode(symbol)) == 1 for symbol in SYMBOLS if " " not in symbol)
    for prefix in ("data", "valid"):  # made with the .model and with the folder: the same tokenizer
        dataset = IndexedDataset(out / f"{prefix}_text_document")
        assert dataset.header is not None and dataset.header.tokenizer.fingerprint == merged.fingerprint
    lines = metrics(out / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["valid/zh/bits_per_byte"] > 0
    manifest = open_checkpoint(out / "run")
    assert manifest.tokenizer is not None and manifest.tokenizer.fingerprint == merged.fingerprint
    certificate = json.loads((out / "hf" / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    shown = said.split("--- ")
    assert shown[1].startswith("1 of 2\n渡口的<br>晨雾") and shown[2].startswith("2 of 2\ndef main(")


def test_the_model_and_the_folder_make_the_same_dataset(job: tuple[Path, str]) -> None:
    out, _ = job
    for kind, path in (("model", out / "merged" / "tokenizer.model"), ("export", out / "hf")):
        run_tool("preprocess_data.py", "--input", out / "corpus" / "zh.valid.jsonl", "--tokenizer-model", path,
                 "--output-prefix", out / kind, "--append-eod", "--prepend-bos")  # fmt: skip
        for suffix in (".bin", ".idx"):
            assert (out / f"{kind}_text_document{suffix}").read_bytes() == (
                out / f"valid_text_document{suffix}"
            ).read_bytes()


# ---- brought by people ----


def llama3_style() -> Backend:
    """A byte-level BPE as Llama 3's file is built, trained on little text."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    backend = Backend(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(training_texts()[:12], trainer)
    marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    backend.add_special_tokens(marks)
    # Llama 3 adds its first mark to every text by itself: a document must not get it twice.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A", special_tokens=[(marks[0], backend.token_to_id(marks[0]))]
    )
    return backend


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One path of each kind that ``load_tokenizer`` knows."""
    folder = tmp_path_factory.mktemp("kinds")
    model = train_tokenizer(Texts(training_texts()[:12]), folder / "t.model", 1500)
    for name in ("folder", "json only"):
        (folder / name).mkdir()
    convert_tokenizer(model, folder / "folder")
    for path in (folder / "folder").glob("*.json"):
        (folder / "json only" / path.name).write_bytes(path.read_bytes())
    llama3 = folder / "llama3"
    llama3.mkdir()
    backend = llama3_style()
    backend.save(str(llama3 / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (llama3 / "tokenizer_config.json").write_text(json.dumps(config))
    alone = folder / "alone"  # a tokenizer.json and nothing beside it: its marks are known by their names
    alone.mkdir()
    backend.save(str(alone / "tokenizer.json"))
    return {
        "model": folder / "t.model",
        "folder": folder / "folder",
        "json": folder / "json only" / "tokenizer.json",
        "llama3 folder": llama3,
        "llama3 json": alone / "tokenizer.json",
    }


@pytest.mark.parametrize("kind", ["model", "folder", "json", "llama3 folder", "llama3 json"])
def test_every_kind_of_tokenizer_goes_through_the_job(kinds: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """``--tokenizer-model``, ``tokenizer.path``, the checkpoint, the export, and a prompt."""
    from transformers import AutoTokenizer

    path = kinds[kind]
    tokenizer = load_tokenizer(path)
    texts = [text[:1500] for text in training_texts()]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run_tool("preprocess_data.py", "--input", tmp_path / "t.jsonl", "--tokenizer-model", path,
             "--output-prefix", tmp_path / "d", "--append-eod", "--prepend-bos")  # fmt: skip
    dataset = IndexedDataset(tmp_path / "d_text_document")
    for index in (0, len(texts) - 1):
        assert dataset.read(index).tolist() == [tokenizer.bos_id, *tokenizer.encode(texts[index]), tokenizer.eos_id]
    code = train_here(0, [f"tokenizer.path={path}", f"data.train={tmp_path}/d_text_document",
                          f"data.valid={{x: {tmp_path}/d_text_document}}", f"train.output={tmp_path}/run", *SHORT_RUN,
                          "train.num_steps=2", "train.eval_interval_steps=2", "train.eval_samples=4"])  # fmt: skip
    assert code == 0 and metrics(tmp_path / "run")[-1]["valid/x/bits_per_byte"] > 0
    export_hf(tmp_path / "run", tmp_path / "hf", prove=prove, note=lambda text: None)
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in texts[:5]:
        assert exported(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    (said,) = generate(tmp_path / "hf", ["import json"], 3, 0.0, 1, 0)
    assert said.startswith("import json")


def tools_with_a_tokenizer() -> Iterator[Any]:
    for path in sorted((ROOT / "tools").glob("*.py")):
        if "tokenizer-model" in path.read_text(encoding="utf-8"):
            yield pytest.param(path.name, id=path.name)


@pytest.mark.parametrize("tool", list(tools_with_a_tokenizer()))
def test_every_option_says_what_it_takes(tool: str) -> None:
    said = " ".join(run_tool(tool, "--help").split())
    assert "sentencepiece .model, tokenizer.json, .tiktoken or a folder with one" in said
