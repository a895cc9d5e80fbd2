"""What is taken from a block and what is rejected, with place and cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import file_blocks, parse
from tests.corpus.reading import GOOD, blocks_of, rejected_of, texts_of


def test_bad_lines_are_noted_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {4: (b"", "E305"), 9: (b'{"text": "\xff"}', "E303"), 10: (b"{", "E304"), 11: (b"[1]", "E306"),
           30: (b'{"text": 1}', "E307"), 44: (b'{"text": "\\ud800"}', "E308")}  # fmt: skip
    lines = list(GOOD)
    for place, (line, _) in bad.items():
        lines.insert(place, line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for block_bytes in (1, 100, 1 << 20):
        monkeypatch.setattr(file_blocks, "BLOCK_BYTES", block_bytes)
        found = rejected_of(path, blocks_of(path))
        offsets = [sum(len(line) + 1 for line in lines[:place]) for place in bad]
        assert [(r.place.line - 1, r.place.offset, r.code, r.raw) for r in found] == [
            (place, offset, code, line) for offset, (place, (line, code)) in zip(offsets, bad.items())
        ]
        with pytest.raises(DataError, match=r"E305.*a.jsonl:5 \(byte"):
            texts_of(path, blocks_of(path))


def test_a_key_that_is_bad_rejects_the_document_for_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "1", "b": "2"}\n{"a": "3"}\n{"a": 4, "b": "5"}\n{"a": "6", "b": "7"}\n')
    (block,) = [b for b in blocks_of(path) if b.data]
    parsed = parse.parse_block(block, path, ["a", "b"], False)
    assert parsed.texts == [["1", "6"], ["2", "7"]]
    assert [(r.place.line, r.code) for r in parsed.rejected] == [(2, "E307"), (3, "E307")]


def test_bad_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff\xfebad\ngood too\n")
    with pytest.raises(DataError, match=r"E303.*a.txt:2 \(byte 5\) is not valid UTF-8: byte 0xff at offset 0"):
        texts_of(path, blocks_of(path, "line"))
    (rejected,) = rejected_of(path, blocks_of(path, "line"))
    assert rejected.place == (5, 2) and rejected.raw == b"\xff\xfebad"
    path.write_bytes(b"\xef\xbb\xbfmarked\n")
    with pytest.raises(DataError, match=r"E303.*byte order mark"):
        texts_of(path, blocks_of(path))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"E302"):
        texts_of(path, blocks_of(path))
