"""Held-out sets: by text alone, uniform, with every copy on one side."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import xxhash

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus.split import SplitSummary, split_corpus


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def sides(prefix: Path) -> tuple[set[str], set[str]]:
    return set(texts(Path(f"{prefix}.train.jsonl"))), set(texts(Path(f"{prefix}.valid.jsonl")))


def split(source: Path, prefix: Path, seed: int = 1, fraction: float | None = None, count: int | None = None
          ) -> SplitSummary:  # fmt: skip
    return split_corpus([source], prefix, seed, valid_fraction=fraction, valid_documents=count)


def test_lines_stay_as_they_are_and_in_order(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(b'{ "id":%d,  "text": "t%d" }\r\n' % (i, i) for i in range(400)) + b'{"text":"last"}')
    summary = split_corpus([source], tmp_path / "p.v1", 3, valid_fraction=0.2)
    train, valid = ((tmp_path / f"p.v1.{side}.jsonl").read_bytes().split(b"\n") for side in ("train", "valid"))
    assert train[-1] == valid[-1] == b""
    original = source.read_bytes().split(b"\n")
    assert sorted(train[:-1] + valid[:-1]) == sorted(original)
    for part in (train[:-1], valid[:-1]):
        places = [original.index(line) for line in part]
        assert places == sorted(places) and len(places) > 40
    assert summary.train["documents"] + summary.valid["documents"] == 401
    manifest = json.loads((tmp_path / "p.v1.split.json").read_bytes())
    assert manifest["sources"][0]["xxh3"] == xxhash.xxh3_128_hexdigest(source.read_bytes())
    assert manifest["outputs"] == [summary.train, summary.valid] and abs(manifest["valid_fraction"] - 0.2) < 1e-12


def test_a_text_has_one_side_everywhere(tmp_path: Path) -> None:
    generator = random.Random(1)
    known = [f"text {i}" for i in range(2000)]
    split(write(tmp_path / "a", known), tmp_path / "a", fraction=0.1)
    train, valid = sides(tmp_path / "a")
    assert train.isdisjoint(valid) and len(train | valid) == 2000

    other = [f"new {i}" for i in range(500)] + known * 2
    generator.shuffle(other)
    split(write(tmp_path / "b", other), tmp_path / "b", fraction=0.1)
    other_train, other_valid = sides(tmp_path / "b")
    assert other_valid & set(known) == valid and other_train & set(known) == train

    split(write(tmp_path / "a", known), tmp_path / "c", seed=2, fraction=0.1)
    assert sides(tmp_path / "c")[1] != valid
    split(write(tmp_path / "a", known), tmp_path / "d", fraction=0.2)
    assert valid < sides(tmp_path / "d")[1], "a larger share keeps what was held out"


def test_the_share_is_what_was_asked_for_and_independent_of_the_text(tmp_path: Path) -> None:
    """20,000 texts that differ in a counter: within four standard deviations, in each tenth too."""
    known = [f"{i}" for i in range(20_000)]
    split(write(tmp_path / "a", known), tmp_path / "p", seed=5, fraction=0.3)
    held_out = sides(tmp_path / "p")[1]
    counts = [sum(text in held_out for text in known[i : i + 2000]) for i in range(0, 20_000, 2000)]
    assert abs(sum(counts) - 6000) < 4 * (20_000 * 0.21) ** 0.5
    assert all(abs(count - 600) < 4 * (2000 * 0.21) ** 0.5 for count in counts)


def test_a_number_of_documents(tmp_path: Path) -> None:
    known = [f"text {i % 300}" for i in range(1000)]
    source = write(tmp_path / "a", known)
    for count in (1, 17, 299):
        summary = split(source, tmp_path / "p", count=count)
        train, valid = sides(tmp_path / "p")
        assert len(valid) == count and train.isdisjoint(valid) and len(train) == 300 - count
        assert summary.valid["documents"] == sum(text in valid for text in known)
    split(source, tmp_path / "p", count=17)
    fraction = json.loads((tmp_path / "p.split.json").read_bytes())["valid_fraction"]
    before = sides(tmp_path / "p")
    split(source, tmp_path / "q", fraction=fraction)
    assert sides(tmp_path / "q") == before, "the fraction in the manifest gives the same sides"


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["x", "y", "x"])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for fraction, count, code in ((0.0, None, "E287"), (1.0, None, "E287"), (None, 0, "E287"), (1e-12, None, "E365"),
                                  (None, 2, "E365"), (None, 3, "E365")):  # fmt: skip
        with pytest.raises((ConfigError, DataError)) as caught:
            split(source, tmp_path / "p", fraction=fraction, count=count)
        assert caught.value.code == code, (fraction, count)
    with pytest.raises(ConfigError, match=r"E287.*write 0.2: it is a share, no percentage"):
        split(source, tmp_path / "p", fraction=20)
    for inputs in ([tmp_path / "b.parquet"], [source, source]):
        with pytest.raises(ConfigError, match="E288"):
            split_corpus(inputs, tmp_path / "p", 1, valid_fraction=0.5)
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\nnonsense\n')
    with pytest.raises(DataError, match=r"E304\].*c.jsonl:2 "):
        split(tmp_path / "c.jsonl", tmp_path / "p", fraction=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "b.parquet", "c.jsonl"}


def test_folders_of_plain_text_go_through(tmp_path: Path) -> None:
    """Documents between empty lines, CRLF as LF; their sides are those of the same texts as JSON lines."""
    folder = tmp_path / "文 本"
    (folder / "deep").mkdir(parents=True)
    known = [f"第 {i} 篇\n第二行" for i in range(300)]
    (folder / "a.txt").write_bytes("\n\n".join(known[:200]).replace("\n", "\r\n").encode())
    (folder / "deep" / "b.MD").write_text("\n\n".join(known[200:]))
    summary = split_corpus([folder], tmp_path / "t", 1, valid_documents=30, key="content")
    assert (summary.train["documents"], summary.valid["documents"]) == (270, 30)
    found = [json.loads(line)["content"] for side in ("train", "valid")
             for line in (tmp_path / f"t.{side}.jsonl").read_text().splitlines()]  # fmt: skip
    assert sorted(found) == sorted(known)
    split(write(tmp_path / "same.jsonl", known), tmp_path / "l", count=30)
    assert sides(tmp_path / "l")[1] == set(found[270:])
    whole = split_corpus([folder], tmp_path / "w", 1, valid_documents=1, text_documents="file")
    assert whole.train["documents"] == 1


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    for name, content, rule in (
        ("gbk.txt", "这是一段用国标编码写成的中文文本，".encode("gbk") * 9, "it looks like GB18030.*iconv -f GB18030"),
        ("mark.md", b"\xef\xbb\xbftext", "byte order mark"),
        ("word.txt", b"%PDF-1.7", "a PDF file.*pdftotext"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"E30\d.*{name}.*{rule}"):
            split(tmp_path / name, tmp_path / "p", fraction=0.5)
        assert not list(tmp_path.glob("p.*"))
