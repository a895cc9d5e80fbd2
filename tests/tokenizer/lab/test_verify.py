"""Two tokenizers are equal or shown to differ: every form, every planted fault; and the converter's program."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.tokenizer.convert import publish_tokenizer
from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS
from megatron_hammer.tokenizer.lab import verify
from megatron_hammer.tokenizer.lab.fuzz import break_utf8, fuzz_texts
from megatron_hammer.tokenizer.lab.verify import compare_tokenizers
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from tests.progress_lines import run_quietly
from tests.tokenizer.faults import plant
from tests.tokenizer.test_load import byte_level_backend, write_folder
from tests.tokenizer.texts import REPOSITORY, SYMBOLS, handmade_model, model_proto, real_model, write_model


@pytest.fixture(scope="module")
def folder(with_symbols: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "hf"
    publish_tokenizer(with_symbols.path, folder)
    return folder


def copy_folder(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    return run_quietly(command, timeout=120)


# ---- the fuzz corpus ----


def test_fuzz_texts_are_a_function_of_their_arguments_and_hold_every_kind() -> None:
    pieces, symbols, specials = ["的话", " glued", "piece"], SYMBOLS, ["<control>"]
    texts = list(fuzz_texts(3000, 1, pieces, symbols, specials))
    assert len(texts) == 3000 and texts[: len(FIXED_TEXTS)] == list(FIXED_TEXTS)
    assert texts == list(fuzz_texts(3000, 1, pieces, symbols, specials))
    assert texts[len(FIXED_TEXTS) :] != list(fuzz_texts(3000, 2, pieces, symbols, specials))[len(FIXED_TEXTS) :]
    assert list(fuzz_texts(2, 1)) == list(FIXED_TEXTS[:2]) and len(list(fuzz_texts(500, 1))) == 500
    drawn = "|".join(texts[len(FIXED_TEXTS) :])
    drawn.encode("utf-8")  # no half surrogates
    for needle in ("\0", "\x1b", SPACE, " " * 70, "<s>", "<control>", "glued的话", "<stron", "😀", "def f(", *symbols):
        assert needle in drawn, needle

    def only(encoding: str, other: str) -> int:
        """Different characters drawn that are in one script's character set alone."""
        return sum(bool(c.encode(encoding, "ignore")) and not c.encode(other, "ignore") for c in set(drawn))

    assert only("gb2312", "big5") > 1000 and only("big5", "gb2312") > 1000


def test_broken_bytes_are_never_text() -> None:
    generator = random.Random(5)
    for text in fuzz_texts(3000, 5):
        with pytest.raises(UnicodeDecodeError):
            break_utf8(text, generator).decode()


# ---- equal ----


def test_all_forms_of_a_conversion_are_equal(with_symbols: SentencePieceTokenizer, folder: Path) -> None:
    for other in (folder, folder / "tokenizer.json", folder / "tokenizer.model"):
        for a, b in ((with_symbols.path, other), (other, with_symbols.path)):
            comparison = compare_tokenizers(a, b, fuzz=1500, seed=7)
            assert comparison.error() is None, comparison.lines()
            assert comparison.texts == 1500 and comparison.tokens > 15_000
            assert comparison.byte_strings == (150 if other.suffix == ".model" else 0)


def test_a_hugging_face_folder_is_loaded_by_transformers(folder: Path) -> None:
    form = verify.load_form(folder)
    assert form.kind.startswith("Hugging Face folder")
    assert list(form.encode) == ["tokenizer(text, add_special_tokens=False)", "tokenizer(text)"]
    assert set(SYMBOLS) - set(form.symbols) == {"两个 词"}  # a raw space is never matched
    assert set(form.specials) == {"<unk>", "<s>", "</s>"}


def test_byte_level_pieces_are_decoded_for_the_fuzz_corpus(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a", byte_level_backend(), tokenizer_config={"eos_token": "<|endoftext|>"})
    form = verify.load_form(source / "tokenizer.json")
    assert " the" in form.pieces and not any("\u0120" in piece for piece in form.pieces)
    assert form.symbols == ["<tool>"]
    comparison = compare_tokenizers(source / "tokenizer.json", source / "tokenizer.json", fuzz=500)
    assert comparison.error() is None


def test_given_texts_are_counted(with_symbols: SentencePieceTokenizer, folder: Path) -> None:
    texts = ["", "今天天气", "x  y", "<s>\0</s>"]
    comparison = compare_tokenizers(with_symbols.path, folder, {"a": texts, "b": iter(texts[1:])})
    assert comparison.error() is None
    assert comparison.texts == 7 and comparison.tokens == 2 * sum(map(len, with_symbols.encode_batch(texts)))


# ---- different ----


@pytest.mark.parametrize(
    "fault", ["merges by id", "prefix", "symbols dropped", "NUL", "specials match", "bos", "a space lost"]
)
def test_planted_faults_are_found(
    fault: str, with_symbols: SentencePieceTokenizer, folder: Path, tmp_path: Path
) -> None:
    """The mistakes of stock conversions, planted into a folder; each is found in a form that shows it."""
    copy = copy_folder(folder, tmp_path / "hf")
    definition = json.loads((copy / "tokenizer.json").read_bytes())
    config = json.loads((copy / "tokenizer_config.json").read_bytes())
    plant(fault, definition)
    if fault == "specials match":
        config["split_special_tokens"] = False
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    comparison = compare_tokenizers(with_symbols.path, copy, fuzz=3000)
    error = comparison.error()
    assert error is not None and error.code == "E507"
    found = comparison.difference
    assert found is not None and found.ids[0] == with_symbols.encode(str(found.text)) != found.ids[1]
    if fault == "bos":  # only the default call shows it
        assert found.ways[1].endswith(" tokenizer(text)")


def test_the_first_difference_in_context(tmp_path: Path) -> None:
    pieces = [("ab", -1.0), ("bc", -2.0), ("a", -3.0), ("b", -4.0), ("c", -5.0), ("好", -6.0), (SPACE, -7.0)]
    a = write_model(handmade_model(pieces), tmp_path / "a.model")
    swapped = [("bc", -1.0), ("ab", -2.0), *pieces[2:]]  # same vocabulary but for the scores and two ids
    b = write_model(handmade_model(swapped), tmp_path / "b.model")
    text = "😀好\n" + "a" * 40 + " 好c" + "abc" + "好" * 40
    comparison = compare_tokenizers(a, b, {"t.jsonl": ["aaa", "好", text, "abc"]})
    difference = comparison.difference
    assert difference is not None
    assert (difference.where, difference.text) == ("t.jsonl, line 3", text)
    assert (difference.offset, difference.at) == (46, 49)  # characters and tokens: the smile is four bytes
    assert difference.ids[0][difference.at] == 259 and difference.ids[1][difference.at] == 261
    assert difference.pieces[0] == [
        "...",
        *difference.pieces[0][1:5],
        ">259 'ab'",
        "263 'c'",
        *difference.pieces[0][7:],
    ]
    assert (
        difference.pieces[1][5:7] == [">261 'a'", "259 'bc'"] and difference.pieces[1][:5] == difference.pieces[0][:5]
    )
    assert f"  text   {text[16:46]!r} | {text[46:76]!r}" in comparison.lines()
    assert comparison.texts == 3
    error = comparison.error()
    assert error is not None and "t.jsonl, line 3 from character 46" in str(error)


def test_one_list_of_ids_ends_earlier(tmp_path: Path) -> None:
    pieces = [("a", -3.0), (SPACE, -7.0)]
    a = write_model(handmade_model(pieces), tmp_path / "a.model")
    proto = handmade_model(pieces)
    proto.normalizer_spec.remove_extra_whitespaces = True
    b = write_model(proto, tmp_path / "b.model")
    difference = compare_tokenizers(a, b, {"t": ["aa "]}).difference
    assert difference is not None and difference.offset == 2
    assert difference.pieces == (["259 'a'", "259 'a'", ">260 '\u2581'"], ["259 'a'", "259 'a'", ">end"])


def test_sizes_and_special_ids_count_too(folder: Path, tmp_path: Path) -> None:
    copy = copy_folder(folder, tmp_path / "hf")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((copy / name).read_bytes())
        (copy / name).write_text(json.dumps(content | {"bos_token": "</s>", "add_bos_token": None}))
    error = compare_tokenizers(folder, copy, fuzz=50).error()
    assert error is not None and error.code == "E508" and "bos id (1 against 2)" in str(error)

    proto = model_proto(folder / "tokenizer.model")
    proto.pieces.add(piece="\U0010fffd", score=-1e6, type=proto.SentencePiece.NORMAL)
    longer = write_model(proto, tmp_path / "longer.model")
    error = compare_tokenizers(folder / "tokenizer.model", longer, {"t": ["hello"]}).error()
    assert error is not None and error.code == "E508" and "vocabulary size (2,500 against 2,501)" in str(error)


def test_bytes_that_are_no_text(plain: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentencepiece models only; a difference that no text shows."""
    load, forms = verify.load_form, []

    def load_spoilt(path: Any) -> verify.Form:
        form = load(path)
        forms.append(form)
        if len(forms) == 1:
            return form
        encode = form.encode_bytes["encode"]
        return dataclasses.replace(form, encode_bytes={"encode": lambda batch: [[*ids, 5] for ids in encode(batch)]})

    monkeypatch.setattr(verify, "load_form", load_spoilt)
    comparison = compare_tokenizers(plain.path, plain.path, fuzz=200)
    difference = comparison.difference
    assert difference is not None and isinstance(difference.text, bytes)
    assert difference.where == "fuzz (seed 3407), byte string 1" and difference.pieces[0][-1] == ">end"
    assert comparison.texts == 200 and comparison.byte_strings == 1
    assert all(isinstance(line, str) for line in comparison.lines())


# ---- refusals, programs ----


def test_what_cannot_be_compared(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="E230"):
        compare_tokenizers(plain.path, plain.path, fuzz=-1)
    with pytest.raises(ConfigError, match="E231"):
        compare_tokenizers(plain.path, plain.path)
    with pytest.raises(DataError, match="E310"):
        compare_tokenizers(plain.path, tmp_path / "absent", fuzz=1)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Nonsense"}')
    with pytest.raises(RefusedError, match="E509"):
        compare_tokenizers(plain.path, tmp_path, fuzz=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="E313"):
        compare_tokenizers(plain.path, tmp_path, fuzz=1)


def test_programs(with_symbols: SentencePieceTokenizer, plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    output = tmp_path / "new" / "hf"
    done = run_tool("convert_tokenizer.py", with_symbols.path, output)
    first, second = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and "2,500 ids" in first and second == "form: tokenizer.json"
    assert [path.name for path in output.parent.iterdir()] == ["hf"]

    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress('{"body": ""}\n{"body": "今天天气"}\n'.encode()))
    texts = ("--json-key", "body", "--texts", tmp_path / "t.jsonl.gz")
    absent = run_tool("verify_tokenizer.py", with_symbols.path, output, *texts, tmp_path / "absent.jsonl")
    assert absent.returncode == 3 and absent.stderr.startswith("error[E301]") and absent.stdout == ""
    equal = run_tool("verify_tokenizer.py", with_symbols.path, output, *texts, "--fuzz", 300)
    assert (equal.returncode, equal.stderr) == (0, ""), equal.stderr
    assert equal.stdout.startswith("compared 302 texts, ") and equal.stdout.endswith("\nequal\n")

    other = run_tool("verify_tokenizer.py", plain.path, output, "--fuzz", 300)
    assert other.returncode == 5 and other.stderr.startswith("error[E507]") and other.stderr.count("\n") == 1
    assert "first difference: fuzz (seed 3407), text " in other.stdout and "equal" not in other.stdout


# ---- the real ones ----


@pytest.mark.parametrize("name", ["llama2-7b", "internlm-7b", "hammerllm"])
def test_real_conversions_are_equal(name: str, converted: Callable[[str], Path]) -> None:
    """On fewer texts than the program's 100,000."""
    comparison = compare_tokenizers(real_model(f"{name}.model"), converted(name), fuzz=2000)
    assert comparison.error() is None, comparison.lines()


def test_base_and_result_of_the_merge_differ() -> None:
    models = real_model("hammerllm.model"), real_model("internlm-7b.model")
    comparison = compare_tokenizers(*models, fuzz=1000)
    assert comparison.difference is not None and len(comparison.settings) == 1
