"""Merging: the published tokenizer to the byte, the rules on small models, and refusals that leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError, HammerError, RefusedError
from megatron_hammer.tokenizer.convert import convert_tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.merge import MergedModel, merge_files, merge_models
from megatron_hammer.tokenizer.required_characters import RequiredCharacters, load_table, read_required
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.symbols import doubtful_symbols
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.progress_lines import run_quietly
from tests.tokenizer.texts import (
    REPOSITORY,
    SYMBOLS,
    Texts,
    handmade_model,
    model_proto,
    real_model,
    training_texts,
    write_model,
)

MODELS = REPOSITORY.parent / "shared" / "tokenizers"
NAMES = ["tokenizer.calibration.png", "tokenizer.merge.json", "tokenizer.model"]
RARE = "龘靐齉爩麤灪龖厵"


def run_tool(name: str, *arguments: object, seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    return run_quietly(command, env=environment)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def small(pieces: dict[str, float]) -> Any:
    return handmade_model(list(pieces.items()))


# ---- the published tokenizer ----


def test_the_published_tokenizer(tmp_path: Path) -> None:
    """105,789 of 105,789 pieces in text, score and type; the two corrections are those of the published symbols."""
    symbols = real_model("user_defined_symbols.txt").read_text(encoding="utf-8").split("\n")
    corrections = {"CLS>": "<CLS>", "</p >": "</p>"}
    assert set(corrections) <= set(symbols)
    corrected = tmp_path / "symbols.txt"
    corrected.write_text("\n".join(corrections.get(s, s) for s in symbols), encoding="utf-8")

    base, donor = real_model("internlm-7b.model"), real_model("llama_zh_128k.model")
    done = run_tool("merge_tokenizer.py", "--base", base, "--donor", donor, "--required-chars", "tgh2013",
                    "--user-defined-symbols", corrected, "--output", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "3,500 of 3,500 characters, ratio mean 0.9388603563642239, min 0.9241" in done.stdout
    assert "105,789 pieces = 103,168 of the base + 2,536 characters + 85 symbols" in done.stdout

    published = real_model("hammerllm.model")
    found = [(p.piece, np.float32(p.score), p.type) for p in model_proto(tmp_path / "out/tokenizer.model").pieces]
    expected = [(p.piece, np.float32(p.score), p.type) for p in model_proto(published).pieces]
    assert len(found) == 105_789
    assert sum(f == e for f, e in zip(found, expected, strict=True)) == 105_789
    assert (tmp_path / "out/tokenizer.model").read_bytes() == published.read_bytes()

    report = json.loads((tmp_path / "out/tokenizer.merge.json").read_text(encoding="utf-8"))
    calibration = report["calibration"]
    assert calibration["ratio_mean"] == 0.9388603563642239
    assert round(calibration["ratio_min"], 5) == 0.92412 and round(calibration["ratio_max"], 5) == 0.96074
    assert report["appended_characters"]["count"] == 2536 and len(report["appended_symbols"]) == 85
    assert {s["piece"] for s in report["changed_symbols"]} == {*"0123456789.!?", "<!--", "-->", "---"}


# ---- small models trained here ----


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("donor")
    return train_tokenizer(Texts(training_texts()), folder, 2500, required_characters=RARE)


@pytest.fixture(scope="module")
def required(donor: SentencePieceTokenizer) -> RequiredCharacters:
    """What the donor knows of level 1, and the rare ones."""
    known = {piece.piece for piece in model_proto(donor.path).pieces}
    common = "".join(character for character in read_required("tgh2013").common if character in known)
    assert len(common) > 300
    return RequiredCharacters("test", common + RARE, common)


@pytest.fixture(scope="module")
def symbols_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("symbols") / "symbols.txt"
    path.write_text("\n".join([*SYMBOLS, "龘", "the"]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def merged(
    plain: SentencePieceTokenizer,
    donor: SentencePieceTokenizer,
    required: RequiredCharacters,
    symbols_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[MergedModel, Path]:
    folder = tmp_path_factory.mktemp("merged") / "new" / "folder"
    return merge_files(plain.path, donor.path, required, symbols_file, folder), folder


def test_the_rules(
    merged: tuple[MergedModel, Path],
    plain: SentencePieceTokenizer,
    donor: SentencePieceTokenizer,
    required: RequiredCharacters,
) -> None:
    merge, folder = merged
    before, after = model_proto(plain.path), model_proto(folder / "tokenizer.model")
    given = {p.piece: p.score for p in model_proto(donor.path).pieces}
    had = {p.piece: p.score for p in before.pieces}
    kinds = before.SentencePiece

    ratios = [had[c] / given[c] for c in required.common if c in had]
    assert merge.calibration.mean == pytest.approx(math.fsum(ratios) / len(ratios), rel=1e-14)
    assert list(merge.calibration.ratios) == ratios
    lacking = [c for c in required.characters if c not in had]
    assert set(RARE) <= set(lacking)

    expected = [[p.piece, p.score, p.type] for p in before.pieces]
    expected += [[c, float(np.float32(given[c] * merge.calibration.mean)), kinds.NORMAL] for c in lacking]
    for symbol in [*(s.replace(" ", "\u2581") for s in SYMBOLS), "龘", "the"]:
        entry = next((e for e in expected if e[0] == symbol), None)
        if entry is None:
            expected.append([symbol, 0.0, kinds.USER_DEFINED])
        else:
            entry[1:] = [0.0, kinds.USER_DEFINED]
    assert [[p.piece, p.score, p.type] for p in after.pieces] == expected
    assert {piece for piece, _, _ in merge.changed_symbols} >= {"龘", "the", "7"}  # appended just before, too
    assert merge.size == len(expected)
    after.ClearField("pieces")
    before.ClearField("pieces")
    assert after == before  # settings are the base's


def test_the_result_works(merged: tuple[MergedModel, Path], plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(merged[1])
    for text in (*RARE, *SYMBOLS, "the"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) == 1, text
    assert len(plain.encode("龘")) > 1
    assert len(tokenizer.encode("\uff10")) > 1  # \357\274\220 is no zero: escapes are not decoded
    for text in training_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    convert_tokenizer(tokenizer, tmp_path)  # which proves the folder


def test_report_and_picture(merged: tuple[MergedModel, Path], plain: SentencePieceTokenizer) -> None:
    merge, folder = merged
    assert sorted(p.name for p in folder.iterdir()) == NAMES
    assert (folder / "tokenizer.calibration.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "tokenizer.merge.json").read_text(encoding="utf-8"))
    proto = model_proto(folder / "tokenizer.model")
    assert report["sha256"] == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    assert report["pieces"] == len(proto.pieces)
    assert report["base"]["pieces"] == plain.vocab_size == report["appended_characters"]["first_id"]
    for index, character in enumerate(report["appended_characters"]["characters"], start=plain.vocab_size):
        assert proto.pieces[index].piece == character
    for entry in [*report["appended_symbols"], *report["changed_symbols"]]:
        assert proto.pieces[entry["id"]].piece == entry["piece"]
        assert proto.pieces[entry["id"]].type == proto.SentencePiece.USER_DEFINED
    assert report["calibration"]["ratio_mean"] == merge.calibration.mean


def test_byte_stable(
    merged: tuple[MergedModel, Path],
    plain: SentencePieceTokenizer,
    donor: SentencePieceTokenizer,
    required: RequiredCharacters,
    symbols_file: Path,
    tmp_path: Path,
) -> None:
    """Two fresh interpreters with other hash seeds write the same three files, also over old ones."""
    characters = tmp_path / "test"
    characters.write_text(required.characters, encoding="utf-8")
    for seed in ("1", "2"):
        done = run_tool("merge_tokenizer.py", "--base", plain.path.parent, "--donor", donor.path, "--required-chars",
                        characters, "--user-defined-symbols", symbols_file, "--output", tmp_path / seed,
                        seed=seed)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "1") == content(tmp_path / "2")
    merge_files(plain.path, donor.path, required, symbols_file, tmp_path / "1")
    assert content(tmp_path / "1") == content(merged[1])


def test_without_symbols(
    plain: SentencePieceTokenizer, donor: SentencePieceTokenizer, required: RequiredCharacters, tmp_path: Path
) -> None:
    merge = merge_files(plain.path, donor.path, required, None, tmp_path)
    assert merge.size == plain.vocab_size + len(merge.characters) and set(RARE) <= set(merge.characters)


# ---- the rules on models made by hand ----


def test_random_models(tmp_path: Path) -> None:
    """Against the rules written down a second time, in NumPy, for vocabularies of any overlap."""
    alphabet = "甲乙丙丁戊己庚辛壬癸"
    for seed in range(100):
        generator = random.Random(seed)
        size = generator.randint(1, 10)
        base = {c: -generator.uniform(1, 50_000) for c in generator.sample(alphabet, size)}
        full = {c: -generator.uniform(1, 50_000) for c in alphabet}
        merge = merge_models(
            SentencePieceTokenizer(write_model(small(base), tmp_path / "b.model")),
            SentencePieceTokenizer(write_model(small(full), tmp_path / "d.model")),
            RequiredCharacters("x", alphabet, alphabet),
            [],
        )
        both = [c for c in alphabet if c in base]
        above, below = (np.array([np.float32(scores[c]) for c in both], np.float64) for scores in (base, full))
        ratio = float((above / below).mean())
        assert merge.calibration.mean == pytest.approx(ratio, rel=1e-14)
        (tmp_path / "m.model").write_bytes(merge.model)
        appended = model_proto(tmp_path / "m.model").pieces[259 + size :]
        assert [p.piece for p in appended] == [c for c in alphabet if c not in base]
        for piece in appended:
            exact = float(np.float32(full[piece.piece])) * ratio
            assert piece.score == pytest.approx(exact, rel=2**-24 + 1e-13)  # one rounding to float32


def test_scoreless_characters_do_not_calibrate(tmp_path: Path) -> None:
    """A user-defined or zero score says nothing, and must not become a division by zero."""
    base = write_model(small({"甲": -10.0, "乙": -20.0, "丙": -5.0}), tmp_path / "b.model")
    proto = small({"甲": -20.0, "乙": 0.0, "丙": -1.0, "丁": -7.0})
    proto.pieces[-2].type = proto.SentencePiece.USER_DEFINED
    donor = write_model(proto, tmp_path / "d.model")
    merge = merge_files(base, donor, RequiredCharacters("x", "甲乙丙丁", "甲乙丙丁"), None, tmp_path / "out")
    assert merge.calibration.characters == "甲" and merge.calibration.mean == 0.5
    assert model_proto(tmp_path / "out/tokenizer.model").pieces[-1].score == -3.5


# ---- refusals ----


def refuse(tmp_path: Path, error: type[HammerError], words: str, **changes: Any) -> None:
    """Merging two small models with one thing changed is one line, and no output."""
    base = write_model(changes.get("base", small({"甲": -1.0, "ab": -2.0})), tmp_path / "b.model")
    donor = write_model(changes.get("donor", small({"甲": -2.0, "乙": -3.0})), tmp_path / "d.model")
    symbols = tmp_path / "s.txt"
    symbols.write_text(changes.get("symbols", "<br>\n"), encoding="utf-8")
    characters = changes.get("characters", "甲乙")
    with pytest.raises(error, match=words) as caught:
        merge_files(changes.get("base_path", base), donor, RequiredCharacters("x", characters, characters), symbols,
                    tmp_path / "out")  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_symbols(tmp_path: Path) -> None:
    refuse(tmp_path, ConfigError, r"E265.*s\.txt holds no symbol", symbols="\n\n")
    refuse(tmp_path, ConfigError, r"E261.*'<br>' occurs twice", symbols="<br>\nx\n<br>\n")
    refuse(tmp_path, ConfigError, r"E261.*'</s>' is the name of a control", symbols="</s>\n")
    base = small({"甲": -1.0, "<pad>": -2.0})
    base.pieces[-1].type = base.SentencePiece.CONTROL
    refuse(tmp_path, ConfigError, r"E267.*'<pad>' is a control", symbols="<pad>\n", base=base)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    refuse(tmp_path, RefusedError, r"E503.*d\.model lacks 1 of the 2 required .*\(丙\)", characters="甲乙丙")
    refuse(tmp_path, RefusedError, r"E503.*lacks 6 of .*\(丙丁戊己庚辛\)", characters="甲乙丙丁戊己庚辛")
    refuse(tmp_path, RefusedError, r"E504.*none of the 1 calibration characters", characters="乙")
    unigram = small({"甲": -2.0, "乙": -3.0})
    unigram.trainer_spec.model_type = 1
    refuse(tmp_path, RefusedError, r"E505.*is a UNIGRAM model and the base a BPE one", donor=unigram)
    refuse(tmp_path, RefusedError, r"E505.*are no BPE models.*log probabilities", base=unigram, donor=unigram)
    base = small({"甲": -1.0, "乙": -2.0})
    base.pieces[-1].type = base.SentencePiece.UNUSED
    refuse(tmp_path, DataError, r"E318.*'乙'", base=base)


def test_a_list_that_the_donor_was_not_trained_for_names_the_right_one(tmp_path: Path) -> None:
    """As the published common_char_file.txt, which has characters beyond the table and beyond the donor."""
    table = "".join(character for character, _ in load_table())
    strange = "".join(map(chr, range(0x3400, 0x3400 + 30)))
    base, donor = small({"甲": -1.0, "乙": -2.0}), small(dict.fromkeys(table, -1.0))
    rule = rf"lacks 30 of the 31 required characters of x that the base lacks \({strange}\); take --required-chars tgh"
    refuse(tmp_path, RefusedError, rule, characters="甲丙" + strange, base=base, donor=donor)
    refuse(
        tmp_path, RefusedError, r"\(.{200} and 50 more\)", characters="甲" + "".join(map(chr, range(0x20000, 0x200FA)))
    )


def test_symbols_with_a_slip_of_the_pen() -> None:
    listed = ["<SEP>", "CLS>", "</p >", "<br>", "br>", "</td>", "</td >", "->", "a > b", "x>y", ">", "<h2/>"]
    assert doubtful_symbols(listed) == {"CLS>": "<CLS>", "</p >": "</p>"}


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the real tokenizers beside the checkout")
def test_the_published_lists_are_answered_with_the_right_ones(tmp_path: Path) -> None:
    words = ["merge_tokenizer.py", "--base", MODELS / "internlm-7b.model", "--donor", MODELS / "llama_zh_128k.model",
             "--user-defined-symbols", MODELS / "user_defined_symbols.txt", "--output", tmp_path / "out"]  # fmt: skip
    failed = run_tool(*words, "--required-chars", MODELS / "common_char_file.txt")
    assert failed.returncode == 5 and "take --required-chars tgh2013" in failed.stderr
    (named,) = re.findall(r"lacks 30 of the 1491 .*\((.+?)\); ", failed.stderr)
    assert len(named) == 30
    notes = failed.stderr.splitlines()[:-1]
    assert [note.split("symbol ")[1].split()[0] for note in notes] == ["'CLS>'", "'</p"]


def test_bad_files(tmp_path: Path, plain: SentencePieceTokenizer) -> None:
    (tmp_path / "t.json").write_text("{}")
    refuse(tmp_path, DataError, "E310", base_path=tmp_path / "none.model")
    refuse(tmp_path, DataError, "E313", base_path=tmp_path / "t.json")
    whole = plain.path.read_bytes()
    cut = tmp_path / "cut.model"
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        cut.write_bytes(whole[:size])
        refuse(tmp_path, DataError, r"E312.*cut\.model is not a whole sentencepiece model", base_path=cut)


def test_a_tokenizer_json_is_refused(tmp_path: Path, plain: SentencePieceTokenizer) -> None:
    (tmp_path / "hf").mkdir()
    convert_tokenizer(plain, tmp_path / "hf")
    refuse(tmp_path, DataError, r"E317.*is no sentencepiece model", base_path=tmp_path / "hf" / "tokenizer.json")


def test_the_programs_refuse_in_one_line(tmp_path: Path, donor: SentencePieceTokenizer) -> None:
    failed = run_tool("merge_tokenizer.py", "--base", donor.path, "--donor", donor.path, "--required-chars", "tgh2013",
                      "--output", tmp_path / "out")  # fmt: skip
    assert failed.returncode == 5 and failed.stderr.startswith("error[E503]") and failed.stderr.count("\n") == 1
    assert failed.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--required-characters", "--required-chars"])
def test_training_takes_the_table(option: str, tmp_path: Path) -> None:
    """Each of the 8,105 gets a piece from a text that has hardly any of them."""
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t[:2000]}) for t in training_texts()[:6]))
    done = run_tool("train_tokenizer.py", "--input", tmp_path / "t.jsonl", "--output", tmp_path / "out", "--vocab-size",
                    8800, option, "tgh2013")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {piece.piece for piece in model_proto(tmp_path / "out/tokenizer.model").pieces}
    assert set(read_required("tgh2013").characters) <= found
