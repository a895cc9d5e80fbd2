"""Reading text strictly: what comes, and the one line for every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus.documents import TextCorpus, read_texts

GOOD = b'{"text": "one"}\n{"text": "\xe4\xba\x8c", "n": 2}\n'


def write(folder: Path, content: bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: Path, key: str = "text") -> list[str]:
    return [text for texts, _ in read_texts(path, key) for text in texts]


def test_texts_and_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert read(path) == ["one", "二"]
    assert sum(size for _, size in read_texts(path)) == len(GOOD)


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"},\n {"text": "b"}]\n', b'[\n{"text": "a"}\n]\n', b'[{"text": "a"}]', b'[[{"text": 1}]']
)
def test_one_array_of_documents_is_named_with_its_cure(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"E30[46].*it is one JSON array, .*: jq -c '\.\[\]' \S+array.json > NEW.jsonl"):
        read(write(tmp_path, content, "array.json"))


def test_an_object_over_several_lines_is_named_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"E304.*an object stands on one line each: jq -c \. "):
        read(write(tmp_path, b'{\n  "text": "a"\n}\n'))


def test_other_key_and_empty_text(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"content": ""}\n{"content": "x", "text": 3}')
    assert read(path, "content") == ["", "x"]
    assert list(TextCorpus([path], "content")) == ["x"]  # training has no use for empty documents


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.booleans(), st.booleans(), st.booleans()
)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool, crlf: bool, last_ending: bool
) -> None:
    ending = b"\r\n" if crlf else b"\n"
    content = ending.join(json.dumps({"text": t}, ensure_ascii=ascii_only).encode() for t in texts)
    path = write(tmp_path_factory.mktemp("any"), content + ending * last_ending)
    assert read(path) == texts


def test_compressed_files_read_alike(tmp_path: Path) -> None:
    plain = read(write(tmp_path, GOOD * 5000))
    for content, name in (
        (gzip.compress(GOOD * 5000, mtime=0), "a.jsonl.gz"),
        (gzip.compress(GOOD * 2000, mtime=0) + gzip.compress(GOOD * 3000, mtime=0), "two_members.jsonl.gz"),
        (zstandard.compress(GOOD * 5000), "a.jsonl.zst"),
        (zstandard.compress(GOOD * 2000) + zstandard.compress(GOOD * 3000), "two_frames.jsonl.zst"),
    ):
        assert read(write(tmp_path, content, name)) == plain, name


BAD_LINES = [  # content, code, what the message must say
    (b"", "E302", "holds no document"),
    (GOOD + b'{"text": "ab\xff"}\n', "E303", ":3 (byte 40) is not valid UTF-8: byte 0xff at offset 12 of the line"),
    (GOOD + b'{"text": "\xe4\xba"}\n', "E303", "at offset 10"),
    (b"\xef\xbb\xbf" + GOOD, "E303", ":1 (byte 0) begins with a byte order mark (UTF-8)"),
    ('{"text": "x"}'.encode("utf-16"), "E303", "byte order mark (UTF-16)"),
    (GOOD + b'{"text": "x"\n', "E304", ":3 (byte 40) is not valid JSON"),
    (b'{"text": NaN}\n', "E304", "is not valid JSON"),
    (b'{"text": "a"} {"text": "b"}\n', "E304", "column"),
    (b'{"text": "' + b"[" * 3 + b"\x01" + b'"}\n', "E304", "is not valid JSON"),
    (b"[" * 100_000, "E304", "is not valid JSON"),
    (GOOD + b"\n" + GOOD, "E305", ":3 (byte 40) is a blank line"),
    (GOOD + b" \t\r\n", "E305", ":3 (byte 40) is a blank line"),
    (b"\n", "E305", ":1 (byte 0) is a blank line"),
    (b'["text"]\n', "E306", "holds an array, not a JSON object"),
    (b'"text"\n', "E306", "holds a string"),
    (b"null\n", "E306", "holds null"),
    (b'{"content": "x", "id": 1}\n', "E307", "has no key 'text' (its keys: content, id)"),
    (b'{"text": null}\n', "E307", "has null under 'text'"),
    (b'{"text": 7}\n', "E307", "has a number under 'text'"),
    (b'{"text": ["x"]}\n', "E307", "has an array under 'text'"),
    (b'{"text": "a\\ud800b"}\n', "E308", "holds half of a surrogate pair (\\ud800)"),
    (b'{"more": [{"\\udc00": 1}]}\n', "E307", "has no key 'text'"),
]


@pytest.mark.parametrize("content, code, message", BAD_LINES)
def test_bad_files_are_named(tmp_path: Path, content: bytes, code: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"error[{code}]: {path}") and message in line and "\n" not in line


def test_missing_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "zh_text_document.idx").touch()
    for path, words in (
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "zh_text_document", "is the prefix of an indexed dataset, not a text file; name the text"),
    ):
        with pytest.raises(DataError, match=rf"E301.*{words}"):
            read(path)
        with pytest.raises(DataError, match="E301"):
            TextCorpus([path])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_compression(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(GOOD * 9999) if name.endswith("gz") else zstandard.compress(GOOD * 9999)
    for content in (whole[:-9], whole[: len(whole) // 2], GOOD, b"\0" + whole):
        with pytest.raises(DataError, match=r"E309.*could not be decompressed"):
            read(write(tmp_path, content, name))


def test_compressed_file_with_a_plain_name(tmp_path: Path) -> None:
    for content, suffix in ((gzip.compress(GOOD), ".gz"), (zstandard.compress(GOOD), ".zst")):
        with pytest.raises(DataError, match=rf"E309.*its name does not say so; rename it to end in \{suffix}"):
            read(write(tmp_path, content))


def test_a_corpus_describes_its_files(tmp_path: Path) -> None:
    one, two = write(tmp_path, GOOD, "b.jsonl"), write(tmp_path, GOOD[:16], "a.jsonl")
    described = TextCorpus([one, tmp_path]).describe()  # as named; a folder's files sorted
    assert [(entry["name"], entry["bytes"]) for entry in described] == [
        ("b.jsonl", len(GOOD)), ("a.jsonl", 16), ("b.jsonl", len(GOOD)),
    ]  # fmt: skip
    assert described[1]["sha256"] == hashlib.sha256(two.read_bytes()).hexdigest()


def test_documents_of_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path, "one\nmore\n\n二\n".encode(), "a.txt")
    assert list(TextCorpus([path])) == ["one\nmore", "二"]
    assert list(TextCorpus([path], text_documents="file")) == ["one\nmore\n\n二\n"]
    assert list(TextCorpus([path], text_documents="line")) == ["one", "more", "二"]
    assert list(TextCorpus([path], text_documents="blank-line")) == ["one\nmore", "二"]
