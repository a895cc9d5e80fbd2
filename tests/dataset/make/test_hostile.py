"""Hostile JSON lines: every bad line is named or counted exactly, and changes nothing for the good ones beside it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import file_blocks, jsonl, parse
from megatron_hammer.dataset.make.output import BuildSummary
from tests.dataset.built import build_datasets

# ---- what a reader of JSON lines meets in the wild ----

BAD: dict[str, tuple[bytes, str]] = {  # line without its ending, cause
    "blank": (b"", "E305"),
    "spaces": (b" \t ", "E305"),
    "carriage return": (b"\r", "E305"),
    "cut": (b'{"text": "cut', "E304"),
    "cut inside an escape": (b'{"text": "a\\u12', "E304"),
    "bare word": (b"text", "E304"),
    "two records": (b'{"text": "a"}{"text": "b"}', "E304"),
    "two records and a lone CR": (b'{"text": "a"}\r{"text": "b"}', "E304"),
    "NUL bytes": (b"\0\0\0\0", "E304"),
    "NUL inside a string": (b'{"text": "a\0b"}', "E304"),
    "control character": (b'{"text": "a\x1fb"}', "E304"),
    "NaN as text": (b'{"text": NaN}', "E304"),
    "single quotes": (b"{'text': 'a'}", "E304"),
    "trailing comma": (b'{"text": "a",}', "E304"),
    "comment": (b'{"text": "a"} // b', "E304"),
    "deep arrays": (b'{"text": ' + b"[" * 100_000, "E304"),
    "deep objects": (b'{"text": ' + b'{"a":' * 100_000, "E304"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "E304"),
    "invalid UTF-8": (b'{"text": "\xff"}', "E303"),
    "overlong UTF-8": (b'{"text": "\xc0\xaf"}', "E303"),
    "surrogate as UTF-8": (b'{"text": "\xed\xa0\x80"}', "E303"),
    "beyond Unicode": (b'{"text": "\xf4\x90\x80\x80"}', "E303"),
    "cut UTF-8": (b'{"text": "\xe4\xb8"}', "E303"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le").replace(b"\n", b""), "E304"),
    "lone surrogate": (b'{"text": "\\ud800"}', "E308"),
    "lone surrogate as text, and NaN": (b'{"n": NaN, "text": "a\\udfffb"}', "E308"),
    "array": (b'["text"]', "E306"),
    "string": (b'"text"', "E306"),
    "number": (b"1e5", "E306"),
    "huge number": (b"9" * 5000, "E304"),
    "no key, and NaN": (b'{"n": NaN}', "E307"),
    "NaN and a syntax error": (b'{"text": "a", "n": NaN', "E304"),
    "null": (b"null", "E306"),
    "no key": (b'{"texts": "a"}', "E307"),
    "null text": (b'{"text": null}', "E307"),
    "number as text": (b'{"text": 1}', "E307"),
    "list as text": (b'{"text": ["a"]}', "E307"),
    "last of duplicate keys": (b'{"text": "a", "text": 3}', "E307"),
}

GOOD = [  # odd, but right
    b'{"text": "plain"}',
    b'{"text": ""}',
    b'{"text": "CRLF"}\r',
    b' \t{ "text" : "spaces" } ',
    b'{"text": "NUL \\u0000 escaped"}',
    b'{"text": "pair \\ud83d\\ude00 and \xf0\x9f\x98\x80"}',
    b'{"text": "mark \xef\xbb\xbf inside"}',
    b'{"text": "lone \xe2\x80\xa8 separators \xe2\x80\xa9 \xc2\x85 \\r \\n are no line ends"}',
    b'{"text": "first of duplicate keys", "text": "the last one counts"}',
    b'{"n": 123456789012345678901234567890, "text": "numbers"}',
    b'{"n": ' + b"7" * 400 + b', "text": "a long number"}',
    b'{"n": ' + b"7" * 9000 + b', "text": "a number beyond what Python converts"}',
    b'{"text": "not a number", "n": NaN}',
    b'{"text": "infinities", "n": [Infinity, -Infinity, {"m": NaN}]}',
    b'{"text": "beyond a double", "n": 1e400}',
    b'{"text": "half a pair in a value", "b": "x\\ud800"}',
    b'{"text": "half a pair in a key", "b": {"\\udfff": 1}, "\\ud8ff": 2}',
    b'{"text": "' + b"x\\u4e2d" * 3000 + b'"}',
]


def build_one(
    inputs: list[Path], tokenizer: Path, prefix: Path, on_error: str = "skip", workers: int = 2
) -> BuildSummary:
    (summary,) = build_datasets(inputs, ["text"], tokenizer, prefix, True, True, workers, on_error)  # type: ignore[arg-type]
    return summary


def content(prefix: Path) -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))  # type: ignore[return-value]


def test_the_good_lines_are_json() -> None:
    """As Python reads it, but for its limit on the digits of a number."""
    for line in GOOD:
        assert isinstance(json.loads(line, parse_int=float)["text"], str)


@pytest.mark.parametrize("name", BAD)
def test_each_kind_is_named(tmp_path: Path, tokenizer: Path, name: str) -> None:
    line, cause = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*GOOD, line, *GOOD]) + b"\n")
    offset = sum(len(good) + 1 for good in GOOD)
    with pytest.raises(DataError) as caught:
        build_one([path], tokenizer, tmp_path / "p", "stop")
    assert caught.value.code == cause and caught.value.what == f"{path}:{len(GOOD) + 1} (byte {offset})"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    summary = build_one([path], tokenizer, tmp_path / "p", "skip")
    assert summary.rejected == {cause: 1} and summary.documents == 2 * len(GOOD)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_good_lines_alone_decide_the_bytes(
    tmp_path: Path, tokenizer: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the rejected lines come back byte for byte, for any number of workers and any block size."""
    rng = random.Random(suffix)
    lines = [(line, None) for line in rng.choices(GOOD, k=120)] + [*BAD.values()] * 2
    rng.shuffle(lines)
    lines.append((GOOD[0], None))  # the file ends well

    def write(name: str, kept: list[bytes]) -> Path:
        data = b"\n".join(kept)  # no line ending in the end
        path = tmp_path / name
        path.write_bytes(
            gzip.compress(data) if suffix == ".gz" else zstandard.compress(data) if suffix == ".zst" else data
        )
        return path

    mixed = write(f"mixed.jsonl{suffix}", [line for line, _ in lines])
    clean = write(f"clean.jsonl{suffix}", [line for line, cause in lines if cause is None])
    build_one([clean], tokenizer, tmp_path / "clean", "stop")
    causes = [cause for _, cause in lines if cause is not None]
    expected = {cause: causes.count(cause) for cause in causes}
    quarantines, headers = set(), set()
    for workers, block_bytes in ((1, 1 << 20), (2, 5000), (4, 300), (16, 2000)):
        monkeypatch.setattr(file_blocks, "BLOCK_BYTES", block_bytes)
        summary = build_one([mixed], tokenizer, tmp_path / "p", "quarantine", workers)
        assert content(tmp_path / "p") == content(tmp_path / "clean"), (workers, block_bytes)
        assert summary.rejected == expected and summary.documents == 121
        quarantines.add((tmp_path / "p_text_document.rejected.jsonl").read_bytes())
        headers.add((tmp_path / "p_text_document.meta.json").read_bytes())
    assert len(quarantines) == 1 and len(headers) == 1
    (source,) = json.loads(headers.pop())["sources"]
    assert source["rejected"] == expected and source["documents"] == 121

    records = [json.loads(line) for line in quarantines.pop().splitlines()]
    offset = 0
    for number, (line, cause) in enumerate(lines, 1):
        if cause is not None:
            record = records.pop(0)
            raw = bytes.fromhex(record["raw_hex"]) if "raw_hex" in record else record["raw"].encode()
            assert (record["file"], record["line"], record["byte"], record["cause"]) == (
                str(mixed),
                number,
                offset,
                cause,
            )
            assert raw == line and record["message"].startswith(f"{mixed}:{number} (byte {offset}) ")
        offset += len(line) + 1
    assert records == []


def test_files_that_are_no_corpus(tmp_path: Path, tokenizer: Path) -> None:
    """An empty, a cut and a misnamed file among good ones."""
    good = tmp_path / "a.jsonl"
    good.write_bytes(b"\n".join(GOOD) + b"\n")
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(good.read_bytes() * 20)[:-30])
    inputs = [good, tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz", good]
    summary = build_one(inputs, tokenizer, tmp_path / "p")
    assert summary.rejected == {"E302": 1, "E309": 1} and summary.documents > 2 * len(GOOD)
    header = json.loads((tmp_path / "p_text_document.meta.json").read_text())
    assert [s["rejected"] for s in header["sources"]] == [{}, {"E302": 1}, {"E309": 1}, {}]
    misnamed = tmp_path / "d.jsonl"
    misnamed.write_bytes(gzip.compress(good.read_bytes()))
    with pytest.raises(DataError, match=r"E309.*rename it to end in .gz"):  # a mistake of the user, not of the text
        build_one([good, misnamed], tokenizer, tmp_path / "q")


def test_a_great_many_blank_lines(tmp_path: Path, tokenizer: Path) -> None:
    """Noting each does not add up: a block holds few of them."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 50_000 + GOOD[0] + b"\n" * 50_000)
    tracemalloc.start()
    summary = build_one([path], tokenizer, tmp_path / "p")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary.rejected == {"E305": 99_999} and summary.documents == 1
    assert peak < 40e6, peak


def test_a_long_rejected_line_is_kept_in_part(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "_RAW_BYTES", 50)
    bad = b'{"text": "' + b"y" * 90 + b"\n"
    (tmp_path / "a.jsonl").write_bytes(GOOD[0] + b"\n" + bad + bad[:30] + b"\n")
    build_one([tmp_path / "a.jsonl"], tokenizer, tmp_path / "p", "quarantine")
    records = [json.loads(line) for line in (tmp_path / "p_text_document.rejected.jsonl").read_bytes().splitlines()]
    assert [(r["raw"], r.get("raw_bytes")) for r in records] == [
        (bad[:50].decode(), len(bad) - 1),
        (bad[:30].decode(), None),
    ]


def test_a_document_of_millions_of_characters(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes whole; beyond the limit it is one rejected line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*GOOD, b'{"text": "' + b"model world " * 700_000 + b'"}', *GOOD]) + b"\n")
    summary = build_one([path], tokenizer, tmp_path / "p", "stop")
    assert summary.documents == 2 * len(GOOD) + 1 and summary.tokens > 700_000
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2 << 20)
    assert build_one([path], tokenizer, tmp_path / "p").rejected == {"E304": 1}
    with pytest.raises(DataError, match=rf"E304.*a.jsonl:{len(GOOD) + 1} .*is longer than"):
        build_one([path], tokenizer, tmp_path / "q", "stop")
