"""The strict reader: what it yields, and the one line for every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_hammer.corpus import jsonl
from megatron_hammer.corpus.jsonl import JsonlCorpus, JsonlWriter, read_jsonl
from megatron_hammer.errors import DataError

GOOD = b'{"text": "one"}\n{"text": "\xe4\xba\x8c", "n": 2}\n'


def write(folder: Path, content: bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_yields_text_line_and_bytes(tmp_path: Path) -> None:
    records = list(read_jsonl(write(tmp_path, GOOD)))
    assert [tuple(r) for r in records] == [("one", 1, 16), ("二", 2, 24)]
    assert sum(r.raw_bytes for r in records) == len(GOOD)


def test_other_key_and_empty_text(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"content": ""}\n{"content": "x", "text": 3}')
    assert [r.text for r in read_jsonl(path, "content")] == ["", "x"]
    assert list(JsonlCorpus([path], "content")) == ["x"]  # training has no use for empty documents


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.booleans(), st.booleans(), st.booleans()
)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool, crlf: bool, last_ending: bool
) -> None:
    ending = b"\r\n" if crlf else b"\n"
    content = ending.join(json.dumps({"text": t}, ensure_ascii=ascii_only).encode() for t in texts)
    path = write(tmp_path_factory.mktemp("any"), content + ending * last_ending)
    assert [r.text for r in read_jsonl(path)] == texts


def test_compressed_files_read_alike(tmp_path: Path) -> None:
    plain = list(read_jsonl(write(tmp_path, GOOD * 5000)))
    for content, name in (
        (gzip.compress(GOOD * 5000), "a.jsonl.gz"),
        (gzip.compress(GOOD * 2000) + gzip.compress(GOOD * 3000), "two_members.jsonl.gz"),
        (zstandard.compress(GOOD * 5000), "a.jsonl.zst"),
        (zstandard.compress(GOOD * 2000) + zstandard.compress(GOOD * 3000), "two_frames.jsonl.zst"),
    ):
        assert list(read_jsonl(write(tmp_path, content, name))) == plain, name


BAD_LINES = [  # content, code, what the message must say
    (b"", "E302", "holds no document"),
    (GOOD + b'{"text": "ab\xff"}\n', "E303", ":3 is not valid UTF-8: byte 0xff at offset 12 of the line"),
    (GOOD + b'{"text": "\xe4\xba"}\n', "E303", "at offset 10"),
    (b"\xef\xbb\xbf" + GOOD, "E303", ":1 begins with a byte order mark (UTF-8)"),
    ('{"text": "x"}'.encode("utf-16"), "E303", "byte order mark (UTF-16)"),
    (GOOD + b'{"text": "x"\n', "E304", ":3 is not valid JSON"),
    (b'{"text": NaN}\n', "E304", "is not valid JSON"),
    (b'{"text": "a"} {"text": "b"}\n', "E304", "column"),
    (b'{"text": "' + b"[" * 3 + b"\x01" + b'"}\n', "E304", "is not valid JSON"),
    (b"[" * 100_000, "E304", "is not valid JSON"),
    (GOOD + b"\n" + GOOD, "E305", ":3 is a blank line"),
    (GOOD + b" \t\r\n", "E305", ":3 is a blank line"),
    (b"\n", "E305", ":1 is a blank line"),
    (b'["text"]\n', "E306", "holds an array, not a JSON object"),
    (b'"text"\n', "E306", "holds a string"),
    (b"null\n", "E306", "holds null"),
    (b'{"content": "x", "id": 1}\n', "E307", "has no key 'text' (its keys: content, id)"),
    (b'{"text": null}\n', "E307", "has null under 'text'"),
    (b'{"text": 7}\n', "E307", "has a number under 'text'"),
    (b'{"text": ["x"]}\n', "E307", "has an array under 'text'"),
    (b'{"text": "a\\ud800b"}\n', "E308", "holds half of a surrogate pair (\\ud800)"),
    (b'{"text": "x", "more": [{"\\udc00": 1}]}\n', "E308", "(\\udc00)"),
]


@pytest.mark.parametrize("content, code, message", BAD_LINES)
def test_bad_files_are_named(tmp_path: Path, content: bytes, code: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    line = str(caught.value)
    assert line.startswith(f"error[{code}]: {path}") and message in line and "\n" not in line


def test_good_lines_before_a_bad_one_are_yielded(tmp_path: Path) -> None:
    stream = read_jsonl(write(tmp_path, GOOD + b"x\n"))
    assert [next(stream).text, next(stream).text] == ["one", "二"]
    with pytest.raises(DataError):
        next(stream)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.jsonl", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=rf"E301.*{words}"):
            list(read_jsonl(path))
        with pytest.raises(DataError, match="E301"):
            JsonlCorpus([path])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_compression(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(GOOD * 9999) if name.endswith("gz") else zstandard.compress(GOOD * 9999)
    for content in (whole[:-9], whole[: len(whole) // 2], GOOD, b"\0" + whole):
        with pytest.raises(DataError, match=r"E309.*could not be decompressed"):
            list(read_jsonl(write(tmp_path, content, name)))


def test_compressed_file_with_a_plain_name(tmp_path: Path) -> None:
    for content, suffix in ((gzip.compress(GOOD), ".gz"), (zstandard.compress(GOOD), ".zst")):
        with pytest.raises(DataError, match=rf"E309.*its name does not say so; rename it to end in \{suffix}"):
            list(read_jsonl(write(tmp_path, content)))


def test_line_length_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 20)
    with pytest.raises(DataError, match=r"E304.*:2 is longer than 20 bytes"):
        list(read_jsonl(write(tmp_path, GOOD)))


def test_writer_round_trip_and_describe(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"text": "a\nb", "source": "x"})
        writer.write({"text": "龍"})
        assert not path.exists()
    assert writer.documents == 2
    assert [r.text for r in read_jsonl(path)] == ["a\nb", "龍"]
    assert JsonlCorpus([path]).describe()[0]["bytes"] == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["w.jsonl"]


def test_writer_leaves_the_old_file_after_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(KeyError), JsonlWriter(path) as writer:
        writer.write({"text": "new"})
        raise KeyError
    assert path.read_bytes() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
