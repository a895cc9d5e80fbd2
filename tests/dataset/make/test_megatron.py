"""Command lines of Megatron-LM and GPT-NeoX, through our own program: taken as they are, or refused with the reason."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.dataset.reader import IndexedDataset

REPOSITORY = Path(__file__).resolve().parents[3]
TEXTS = ["one fish", "two fish", "red fish blue fish"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a sentencepiece model, and a Hugging Face folder whose template begins a text with bos."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("megatron")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "d.jsonl").write_text(json.dumps({"text": "one dish"}) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(folder / "t"), vocab_size=285, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "one", "two", "red", "blue", "fish", "dish"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (folder / "hf").mkdir()
    backend.save(str(folder / "hf" / "tokenizer.json"))
    return folder


@pytest.fixture
def preprocess(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The program in this process: a command line to the notes that it prints."""
    spec = importlib.util.spec_from_file_location("preprocess_data", REPOSITORY / "tools" / "preprocess_data.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.chdir(folder)

    def call(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *shlex.split(line)])
        assert program.main() == 0
        return capsys.readouterr().err

    return call


def documents(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.read(number).tolist() for number in range(dataset.num_sequences)]


PLAIN = "--input c.jsonl --output-prefix ours --tokenizer-model t.model --append-eod --workers 2"
# As they stand in scripts of Megatron-LM (its README, core 0.6 to 0.17; Megatron-DeepSpeed; 2023) and of GPT-NeoX.
SAME = [
    "--input c.jsonl --output-prefix P --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model t.model "
    "--workers 2 --partitions 2 --append-eod --log-interval 1000 --keep-sequential-samples",
    "--input c.jsonl --json-keys text --output-prefix P --dataset-impl mmap --tokenizer-type Llama2Tokenizer "
    "--tokenizer-model t.model --append-eod --workers 2 --chunk-size 25",
    "--input c.jsonl --output-prefix P --tokenizer-type SentencePieceTokenizer --tokenizer-model t.model --vocab-file "
    "t.vocab --vocab-size 40 --append-eod --workers 16 --find-optimal-num-workers --workers-to-check 4 8 "
    "--max-documents 50000",
    "--input c.jsonl --jsonl-keys text --output-prefix P --vocab-file t.model --dataset-impl mmap --tokenizer-type "
    "SPMTokenizer --append-eod --workers 2 --num-docs 3",
    "--input c.jsonl --output-prefix P --tokenizer-type SentencePieceTokenizer --tokenizer-name-or-path t.model "
    "--append-eod --lang english --make-vocab-size-divisible-by 128 --workers 1",
]  # fmt: skip


@pytest.mark.parametrize("line", SAME)
def test_scripts_of_theirs_make_the_same_dataset(preprocess, line):
    preprocess(PLAIN)
    notes = preprocess(line)
    assert documents("P_text_document") == documents("ours_text_document")
    options = [word for word in shlex.split(line) if word.startswith("--")]
    ours = {"--input", "--output-prefix", "--tokenizer-model", "--append-eod", "--workers", "--json-keys",
            "--jsonl-keys", "--tokenizer-name-or-path"}  # fmt: skip
    for option in set(options) - ours - ({"--vocab-file"} if "SPMTokenizer" in line else set()):
        assert f"note: {option}" in notes  # whatever is left aside is said


def test_a_hugging_face_tokenizer_begins_documents_as_its_template_does(preprocess):
    line = (
        "--input c.jsonl --output-prefix hf_out --tokenizer-type HuggingFaceTokenizer --tokenizer-model hf --append-eod"
    )
    assert "bos id 0" in preprocess(line)
    assert documents("hf_out_text_document") == [[0, 3, 7, 1], [0, 4, 7, 1], [0, 5, 7, 6, 7, 1]]
    assert "bos" not in preprocess(f"{line} --tokenizer-hf-no-include-special-tokens")
    assert documents("hf_out_text_document")[0] == [3, 7, 1]


def test_gpt_neox_separates_inputs_by_commas(preprocess):
    preprocess("--input c.jsonl,d.jsonl --output-prefix n --tokenizer-type HFTokenizer --vocab-file hf/tokenizer.json")
    assert len(documents("n_text_document")) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m", ["GPT2BPETokenizer", "tokenizer.json"]),
        ("--tokenizer-type NullTokenizer --vocab-size 100", ["NullTokenizer", "SentencePieceTokenizer"]),
        ("--tokenizer-type SentencePeiceTokenizer --tokenizer-model t.model", ["did you mean SentencePieceTokenizer"]),
        ("--tokenizer-type SentencePieceTokenizer --tokenizer-model hf", ["HuggingFaceTokenizer", "tokenizer.json"]),
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model t.model", ["type SentencePieceTokenizer"]),
        ("--tokenizer-type PretrainedFromHF --tokenizer-name-or-path meta-llama/Llama-2-7b-hf", ["hf download"]),
        ("--tokenizer-model t.model --split-sentences", ["--split-sentences", "BERT"]),
        ("--tokenizer-model t.model --ftfy", ["--ftfy", "beforehand"]),
        ("--tokenizer-model t.model --dataset-impl lazy", ["--dataset-impl=lazy", "mmap"]),
        ("--tokenizer-model t.model --tokenizer-special-tokens <a> <b>", ["<a> <b>"]),
    ],
)  # fmt: skip
def test_what_would_be_another_dataset_is_refused(preprocess, options, words):
    with pytest.raises(ConfigError) as caught:
        preprocess(f"--input c.jsonl --output-prefix refused {options}")
    assert caught.value.code == "E279"
    assert all(word in str(caught.value) for word in words)
    assert not Path("refused_text_document.bin").exists()


def test_a_tokenizer_is_needed(preprocess):
    with pytest.raises(ConfigError, match="--tokenizer-model"):
        preprocess("--input c.jsonl --output-prefix p")


def test_what_is_left_open_is_said(preprocess, folder):
    assert "--append-eod" in preprocess("--input c.jsonl --output-prefix open --tokenizer-model t.model")
    assert "no --append-eod" in preprocess("--input c.jsonl --output-prefix o --tokenizer-model t.model --prepend-bos")
    assert not preprocess("--input c.jsonl --output-prefix o --tokenizer-model t.model --append-eod")
    (folder / "plain.txt").write_text("one fish\n\ntwo fish\n")
    line = "--input plain.txt --output-prefix txt --tokenizer-model t.model --append-eod"
    assert "between empty lines is a document" in preprocess(line)
    assert len(documents("txt_text_document")) == 2
    assert "--json-keys body only names the output" in preprocess(f"{line} --json-key body")
    assert documents("txt_body_document") == documents("txt_text_document")


TOOLS = {
    "preprocess_data": "--json-keys --json-key --workers --threads --text-documents",
    "split_corpus": "--json-keys --json-key",
    "sample_corpus": "--json-keys --json-key",
    "reformat_corpus": "--json-keys --json-key --key --column --text-documents",
    "verify_tokenizer": "--json-keys --json-key",
    "train_tokenizer": "--json-keys --json-key --workers --threads --required-characters --required-chars "
                       "--text-documents",
    "count_tokens": "--json-keys --json-key --workers --threads",
    "merge_tokenizer": "--required-characters --required-chars",
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_an_option_has_one_name_in_all_programs(tool, monkeypatch):
    from megatron_hammer.base.cli import ArgumentParser

    found: dict[str, object] = {}

    def note(parser: ArgumentParser) -> None:
        found.update({option: action.default for action in parser._actions for option in action.option_strings})
        raise SystemExit

    monkeypatch.setattr(ArgumentParser, "parse_args", note)
    spec = importlib.util.spec_from_file_location(tool, REPOSITORY / "tools" / f"{tool}.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    with pytest.raises(SystemExit):
        program.main()
    assert set(TOOLS[tool].split()) <= set(found)
    assert found.get("--text-documents", "blank-line") == "blank-line"
