"""Long documents in pieces: the same texts and the same refusals as in one piece, and their bytes in memory once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import long, parse, readers
from megatron_hammer.corpus.long import LongText, long_text, parse_long_line
from tests.dataset.make.test_hostile import BAD, GOOD

PATH = Path("a.jsonl")
TEXTS = st.text(
    st.one_of(st.sampled_from('\\"/\n\t\0字\U0001f600\ud7ff\ue000ud8'), st.characters(exclude_categories=["Cs"]))
)


@pytest.fixture(params=[1, 5, 16, 100])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of some bytes."""
    monkeypatch.setattr(long, "_PIECE_BYTES", max(request.param, 13))  # at least an escaped pair
    monkeypatch.setattr(long, "_LONG_STRING", request.param)
    yield


def joined(text: str | LongText) -> str:
    return text if isinstance(text, str) else "".join(text.pieces())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, TEXTS, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"", b"  \n"]))
def test_any_line_gives_its_texts(small: None, text: str, other: str, ascii_only: bool, ending: bytes) -> None:
    value = {other: 1, "a": [other, {"text": other}], "text": text, "more": other}
    line = json.dumps(value | {"text": text}, ensure_ascii=ascii_only).encode() + ending
    expected = [json.loads(line)["text"], json.loads(line)["more"]]
    assert [joined(t) for t in parse_long_line(PATH, 1, 0, bytearray(line), ["text", "more"])] == expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_any_plain_text_comes_back(small: None, text: str) -> None:
    assert joined(long_text(text.encode())) == text


@pytest.mark.parametrize("name", BAD)
def test_the_same_lines_are_refused(small: None, name: str) -> None:
    line, cause = BAD[name]
    if name in ("blank", "spaces", "carriage return"):
        return  # never long
    with pytest.raises(DataError) as caught:
        parse_long_line(PATH, 7, 100, line + b"\n", ["text"])
    assert caught.value.code == cause and caught.value.what.startswith("a.jsonl:7 (byte 100)")
    if len(line) > 2000:
        assert len(str(caught.value)) < 500


def test_the_same_lines_are_taken(small: None) -> None:
    for line in GOOD:
        assert joined(parse_long_line(PATH, 1, 0, line, ["text"])[0]) == json.loads(line, parse_int=float)["text"]


def test_bad_places_in_long_strings(small: None) -> None:
    rng = random.Random(0)
    filler = '字 \\u4e2d\\ud83d\\ude00 \\\\ \\" x'.encode()
    bad_bytes = {b"\xff": "E303", b"\xe5\xad": "E303", b"\x01": "E304", b"\\x": "E304", b"\\u12g4": "E304",
                 b"\\ud800": "E308", b"\\ude00": "E308", b"\\ud800\\u0041": "E308"}  # fmt: skip
    for bad, cause in bad_bytes.items():
        for _ in range(10):
            line = b'{"text": "' + filler * rng.randint(0, 9) + bad + filler * rng.randint(0, 9) + b'"}'
            with pytest.raises(DataError) as caught:
                parse_long_line(PATH, 1, 0, line, ["text"])
            assert caught.value.code == cause, (line, str(caught.value))


def test_bad_plain_text_names_its_place(small: None) -> None:
    with pytest.raises(UnicodeDecodeError, match=r"at 301$") as caught:
        long_text("字".encode() * 100 + b"x\xff" + b"y" * 50)
    assert "invalid start byte" in caught.value.reason


def test_memory_holds_the_bytes_once(tmp_path: Path) -> None:
    """Although one character makes Python's string four times as large."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    size = 60_000_000
    path.write_bytes(b'{"text": "\xf0\x9f\x98\x80' + b"x\\ny " * (size // 5) + b'"}\n')
    tracemalloc.start()
    characters = 0
    for whole_file in readers.plan_ranges([path]):
        for block in readers.read_range(path, whole_file, ["text"]):
            parsed = parse.parse_block(block, path, ["text"], True, in_pieces=True)
            for text in parsed.long or []:
                assert isinstance(text, LongText)
                characters += sum(map(len, text.pieces()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 1 + size // 5 * 4
    assert peak < 1.2 * size + 40e6, peak
