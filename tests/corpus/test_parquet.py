"""Parquet files: rows in any cut give the same texts, and what is wrong with a file or a row is named."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import xxhash

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus import file_blocks, long, parse, readers
from megatron_hammer.corpus.documents import read_documents
from tests.corpus.reading import blocks_of, rejected_of, texts_of


def write_parquet(path: Path, texts: list[str | None], group: int = 10) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def test_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ["字" * k + "x" for k in range(57)]
    path = write_parquet(tmp_path / "a.parquet", list(expected))
    for block_bytes in (1, 300, 1 << 20):
        monkeypatch.setattr(file_blocks, "BLOCK_BYTES", block_bytes)
        whole = blocks_of(path)
        assert texts_of(path, whole) == expected
        assert whole[-1].last and whole[-1].file_hash == xxhash.xxh3_128_hexdigest(path.read_bytes())
        assert sum(b.raw_bytes for b in whole) == path.stat().st_size
        ranges = list(readers.plan_ranges([path], range_bytes=900))
        assert len(ranges) > 2 and texts_of(path, blocks_of(path, range_bytes=900)) == expected
        for stop in whole[:-1]:
            again = list(readers.read_range(path, next(readers.plan_ranges([path])), ["text"], resume=stop.end))
            assert texts_of(path, again) == expected[stop.end.offset :]


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "b"] * 10)
    with pytest.raises(DataError, match=r"E307.*a.parquet:2 has null"):
        texts_of(path, blocks_of(path))
    assert [(r.place, r.code) for r in rejected_of(path, blocks_of(path))] == [
        ((k, k + 1), "E307") for k in range(1, 30, 3)
    ]
    for key, words in (("nothing", "has no column 'nothing' .its columns: n, text"), ("n", "has int64 in the column")):
        with pytest.raises(DataError, match=f"E307.*{words}"):
            blocks_of(path, keys=[key])
    write_parquet(path, [])
    with pytest.raises(DataError, match=r"E302"):
        texts_of(path, blocks_of(path))
    content = write_parquet(path, [random.Random(k).randbytes(400).hex() for k in range(40)]).read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"E347"):
        blocks_of(path)
    assert [r.code for r in rejected_of(path, blocks_of(path, lenient=True))] == ["E347"]
    path.write_bytes(content[:200] + bytes(9000) + content[9200:])  # the footer is whole
    with pytest.raises(DataError, match=r"E347"):
        texts_of(path, blocks_of(path))
    assert [r.code for r in rejected_of(path, blocks_of(path))] == ["E347"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"E276.*pip install"):
        blocks_of(path)


def test_long_rows_are_taken_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "LONG_BYTES", 3000)
    monkeypatch.setattr(long, "_PIECE_BYTES", 100)
    expected = ["short", "字" * 2000, "", "x" * 5000, "more"]
    path = write_parquet(tmp_path / "a.parquet", list(expected))
    found = []
    for block in blocks_of(path):
        parsed = parse.parse_block(block, path, ["text"], True, in_pieces=True)
        found += parsed.texts[0]
        found += [t if isinstance(t, str) else "".join(t.pieces()) for t in parsed.long or []]
        assert (parsed.long is not None) == (block.text_bytes > 3000)
    assert found == expected
    assert texts_of(path, blocks_of(path)) == expected


@pytest.mark.parametrize(
    "kind",
    ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary",
     "dictionary of bytes", "extension"],
)  # fmt: skip
def test_every_type_that_holds_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """string_view is what Polars writes; bytes are texts where they are UTF-8."""
    import pyarrow
    import pyarrow.parquet

    texts = ["plain", "今天", "", "\U0001f600 naïve", "x" * 100, "今天"]
    values: list[str] | list[bytes] = [t.encode() for t in texts] if "binary" in kind or "bytes" in kind else texts
    if kind.startswith("dictionary"):
        column = pyarrow.array(values).dictionary_encode()
    elif kind == "extension":
        column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(values))
    else:
        column = pyarrow.array(values, getattr(pyarrow, kind)())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(6)), "text": column}), path, row_group_size=4)
    assert texts_of(path, blocks_of(path)) == texts
    assert [d.text for d in read_documents(path, "text")] == texts
    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 20)
    monkeypatch.setattr(long, "LONG_BYTES", 50)
    assert texts_of(path, blocks_of(path)) == texts


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
def test_bytes_that_are_no_text_cost_their_row(kind: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"a", b"\xff\xfe", None, b"b"], getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"E303.*a.parquet:2 is not valid UTF-8"):
        texts_of(path, blocks_of(path))
    errors: list[DataError] = []
    assert [d.text for d in read_documents(path, "text", on_bad=errors.append)] == ["a", "b"]
    assert [error.code for error in errors] == ["E303", "E307"]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"E307.*has 2 columns 'text'; give them different names"):
        texts_of(path, blocks_of(path))
