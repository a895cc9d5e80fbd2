"""The tokenizer's sample: uniform, of the set of texts alone, two parts without a common text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import xxhash

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus import sample as tokenizer_text
from megatron_hammer.corpus.sample import sample_corpus
from megatron_hammer.corpus.seeds import hash_seed


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def expected(corpus: list[str], train: int, valid: int, seed: int) -> tuple[list[str], list[str]]:
    """The definition, told a second way: all distinct texts sorted by hash, cut where a size is reached."""
    hashing = hash_seed(seed, "sample")
    waiting = sorted({t for t in corpus if t}, key=lambda t: xxhash.xxh3_128_intdigest(t.encode(), hashing))
    parts: list[list[str]] = []
    for size in (valid, train):
        part: list[str] = []
        while waiting and sum(len(t.encode()) for t in part) < size:
            part.append(waiting.pop(0))
        parts.append(part)
    return parts[1], parts[0]


@pytest.mark.parametrize("longest", [30, 2000])
@pytest.mark.parametrize("train, valid", [(20_000, 2000), (500, 500), (3000, 0), (1, 1), (10**7, 100)])
def test_it_is_what_the_definition_says(tmp_path: Path, longest: int, train: int, valid: int) -> None:
    generator = random.Random(longest)
    corpus = [f"{i} " + "字" * generator.randint(0, longest) for i in range(600)] + ["", "7 twice"]
    corpus += corpus[:100]
    for attempt in range(2):
        generator.shuffle(corpus)
        half = generator.randint(1, len(corpus) - 1)
        inputs = [write(tmp_path / "a", corpus[:half]), write(tmp_path / "b", corpus[half:])]
        summary = sample_corpus(inputs, tmp_path / "out", train, valid, 5)
        found = texts(tmp_path / "out" / "train.jsonl"), texts(tmp_path / "out" / "valid.jsonl")
        assert found == expected(corpus, train, valid, 5), attempt
    assert set(found[0]).isdisjoint(found[1])
    assert summary.documents == 702 and summary.whole == (train == 10**7)
    assert ("all of it was taken" in str(summary)) == summary.whole
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert [s["xxh3"] for s in manifest["sources"]] == [xxhash.xxh3_128_hexdigest(p.read_bytes()) for p in inputs]
    assert manifest["outputs"] == [summary.train, summary.valid] and manifest["seed"] == 5
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train.jsonl", "valid.jsonl", "manifest.json"}


def test_seeds_and_the_two_hashes_are_independent(tmp_path: Path) -> None:
    corpus = [f"text {i}" for i in range(5000)]
    source = write(tmp_path / "a", corpus)
    samples = []
    for seed in (1, 2):
        sample_corpus([source], tmp_path / str(seed), 20_000, 100, seed)
        samples.append(set(texts(tmp_path / str(seed) / "train.jsonl")))
    size = len(samples[0])
    assert abs(len(samples[0] & samples[1]) - size * size / 5000) < 4 * (size * 0.25) ** 0.5
    assert hash_seed(1, "sample") != hash_seed(1, "split")


def test_every_place_of_the_input_is_equally_likely(tmp_path: Path) -> None:
    corpus = [f"{i:06d}" for i in range(20_000)]
    sample_corpus([write(tmp_path / "a", corpus)], tmp_path / "out", 6 * 6000, 6, 9)
    taken = set(texts(tmp_path / "out" / "train.jsonl"))
    assert len(taken) == 6000
    counts = [sum(text in taken for text in corpus[i : i + 2000]) for i in range(0, 20_000, 2000)]
    assert all(abs(count - 600) < 4 * (2000 * 0.21) ** 0.5 for count in counts)


def test_the_temporary_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of n = 20,000 texts for a sample of k = 200, some k (1 + ln(n / k)) = 1,120 are written."""
    written: list[int] = []
    real = tokenizer_text._Kept
    monkeypatch.setattr(
        tokenizer_text, "_Kept", lambda h, offset, size: (written.append(size), real(h, offset, size))[1]
    )
    sample_corpus([write(tmp_path / "a", [f"{i:06d}" for i in range(20_000)])], tmp_path / "out", 1194, 6, 9)
    assert 800 < len(written) < 1500


def test_parquet_and_text_files(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("three\nlines\nhere")
    sample_corpus([tmp_path], tmp_path / "out", 10**6, 1, 1)
    found = texts(tmp_path / "out" / "train.jsonl") + texts(tmp_path / "out" / "valid.jsonl")
    assert sorted(found) == ["one", "three\nlines\nhere", "two"]


def test_refusals(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["one", "two"])
    for train, valid, output, code in ((0, 1, "o", "E287"), (1, -1, "o", "E287"), (1, 1, "a.jsonl", "E288"),
                                       (1, 100, "o", "E365")):  # fmt: skip
        with pytest.raises((ConfigError, DataError)) as caught:
            sample_corpus([source], tmp_path / output, train, valid, 1)
        assert caught.value.code == code
    assert not list((tmp_path / "o").iterdir())
    with pytest.raises(DataError, match="E301"):
        sample_corpus([tmp_path / "absent"], tmp_path / "o", 1, 1, 1)
    with pytest.raises(DataError, match="E365"):
        sample_corpus([write(tmp_path / "b.jsonl", ["", ""])], tmp_path / "o", 1, 0, 1)
