"""What becomes of documents that cannot be used: the same three ways in every corpus program, the same quarantine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.documents import Skipped, TextCorpus
from megatron_hammer.corpus.reformat import reformat_corpus
from megatron_hammer.corpus.sample import sample_corpus
from megatron_hammer.corpus.shuffle import shuffle_lines
from megatron_hammer.corpus.split import split_corpus

GOOD = [json.dumps({"text": f"document {i} 今天"}, ensure_ascii=False).encode() for i in range(40)]
BAD = {b"{": "E304", b'{"text": 3}': "E307", b'{"text": "\xff"}': "E303", b'{"text": "\\ud800"}': "E308"}


def split(source: Path, folder: Path, on_error: OnError) -> tuple[Any, Path, list[bytes]]:
    summary = split_corpus([source], folder / "p", 7, valid_documents=3, on_error=on_error)
    lines = [line for name in ("train", "valid") for line in (folder / f"p.{name}.jsonl").read_bytes().splitlines()]
    return summary.skipped, folder / "p.rejected.jsonl", lines


def sample(source: Path, folder: Path, on_error: OnError) -> tuple[Any, Path, list[bytes]]:
    summary = sample_corpus([source], folder, 10**6, 30, 7, on_error=on_error)
    lines = [line for name in ("train", "valid") for line in (folder / f"{name}.jsonl").read_bytes().splitlines()]
    return summary.skipped, folder / "rejected.jsonl", lines


def reformat(source: Path, folder: Path, on_error: OnError) -> tuple[Any, Path, list[bytes]]:
    summary = reformat_corpus("jsonl", [source], folder / "o.jsonl", on_error=on_error)
    return summary.skipped, folder / "o.jsonl.rejected.jsonl", (folder / "o.jsonl").read_bytes().splitlines()


def corpus(source: Path, folder: Path, on_error: OnError) -> tuple[Any, Path, list[bytes]]:
    """As tools/train_tokenizer.py reads; the second reading counts nothing again."""
    with Skipped(on_error, folder / "r.jsonl") as skipped:
        texts = TextCorpus([source], on_bad=skipped.on_bad)
        first, second = list(texts), list(texts)
    assert first == second
    return skipped, folder / "r.jsonl", [json.dumps({"text": t}, ensure_ascii=False).encode() for t in first]


PROGRAMS = [split, sample, reformat, corpus]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_good_documents_are_taken_and_the_bad_ones_kept_apart(
    program: Callable[..., tuple[Any, Path, list[bytes]]], tmp_path: Path
) -> None:
    lines = list(GOOD)
    for i, bad in enumerate(BAD):
        lines.insert(5 * i + 2, bad)
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match="E304"):
        program(source, tmp_path / "stop", "stop")
    texts = {json.loads(line)["text"] for line in GOOD}
    for on_error in ("quarantine", "skip"):
        skipped, quarantine, found = program(source, tmp_path / "out", on_error)
        assert skipped.counts == dict.fromkeys(BAD.values(), 1)
        assert {json.loads(line)["text"] for line in found} == texts and len(found) == len(GOOD)
        assert quarantine.exists() == (on_error == "quarantine"), "an old one does not stay"
        if on_error == "quarantine":
            records = [json.loads(line) for line in quarantine.read_bytes().splitlines()]
            assert [(r["cause"], r["line"]) for r in records] == [
                (cause, lines.index(bad) + 1) for bad, cause in BAD.items()]  # fmt: skip
            raws = [bytes.fromhex(r["raw_hex"]) if "raw_hex" in r else r["raw"].encode() for r in records]
            assert raws == list(BAD) and {r["file"] for r in records} == {str(source)}


def test_shuffle_leaves_out_empty_lines_and_a_torn_end(tmp_path: Path) -> None:
    source, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_bytes(b"\n".join([*GOOD[:9], b"", *GOOD[9:20], b"\r", GOOD[20]]) + b'\n{"text": "torn')
    other.write_bytes(b"\n" + b"\n".join(GOOD[21:]) + b"\n")
    with pytest.raises(DataError, match="E362"):
        shuffle_lines([source, other], tmp_path / "o.jsonl", 3)
    outputs = set()
    for memory in (16 << 20, 1 << 30):
        summary = shuffle_lines([source, other], tmp_path / "o.jsonl", 3, memory, on_error="quarantine")
        content = (tmp_path / "o.jsonl").read_bytes()
        outputs.add(content)
        assert sorted(content.splitlines()) == sorted(GOOD) and summary.lines == len(GOOD)
        assert summary.skipped.counts == {"E305": 3, "E362": 1} and "left out for E305: 3" in str(summary)
        records = [json.loads(line) for line in (tmp_path / "o.jsonl.rejected.jsonl").read_bytes().splitlines()]
        assert sorted((Path(r["file"]).name, r["cause"], r["line"]) for r in records) == [
            ("a.jsonl", "E305", 10), ("a.jsonl", "E305", 22), ("a.jsonl", "E362", 0), ("b.jsonl", "E305", 1)
        ]  # fmt: skip
        assert [r["raw"] for r in records if r["cause"] == "E362"] == ['{"text": "torn']
    assert len(outputs) == 1
    with pytest.raises(DataError, match="E305"):
        shuffle_lines([other], tmp_path / "o.jsonl", 3)
    assert not (tmp_path / "o.jsonl.rejected.jsonl").exists()
    clean = tmp_path / "clean.jsonl"
    clean.write_bytes(b"\n".join(GOOD) + b"\n")
    for on_error in ("stop", "skip"):
        shuffle_lines([clean], tmp_path / f"{on_error}.jsonl", 3, on_error=on_error)  # type: ignore[arg-type]
    assert (tmp_path / "stop.jsonl").read_bytes() == (tmp_path / "skip.jsonl").read_bytes()
