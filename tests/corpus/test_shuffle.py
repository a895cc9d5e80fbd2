"""The shuffle: same lines, same bytes for any memory and compression, uniform, and one line for every mistake."""

from __future__ import annotations

import argparse
import gzip
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import ConfigError, DataError, DiskError
from megatron_hammer.corpus import shuffle as module
from megatron_hammer.corpus import shuffle_input
from megatron_hammer.corpus.seeds import hash_seed
from megatron_hammer.corpus.shuffle import MIN_MEMORY_BYTES, Shuffle, shuffle_lines


def corpus(folder: Path, count: int, name: str = "a.jsonl", longest: int = 300) -> Path:
    """Distinct lines of very different lengths."""
    lengths = np.random.default_rng(count).integers(0, longest, count).tolist()
    path = folder / name
    path.write_bytes(b"".join(b"%d %s\n" % (i, b"x" * length) for i, length in enumerate(lengths)))
    return path


def run_small(inputs: list[Path], output: Path, seed: int, block: int, partition: int, segment: int) -> int:
    """Shuffle with limits far below any real memory, so that a small text takes every way; the number of partitions."""
    shuffle = Shuffle(inputs, output, seed)
    shuffle.block_bytes, shuffle.partition_weight, shuffle.segment_lines = block, partition, segment
    with shuffle:
        shuffle.scatter()
        return shuffle.gather().partitions


def expected(inputs: list[Path], seed: int) -> bytes:
    """The definition, told a second way: all lines sorted by (key, number)."""
    lines = b"".join(path.read_bytes() for path in inputs).splitlines(keepends=True)
    keys = np.random.Philox(key=hash_seed(seed, "shuffle", 16)).random_raw(len(lines)).tolist()
    return b"".join(line for _, _, line in sorted(zip(keys, range(len(lines)), lines)))


@pytest.mark.parametrize("block, partition, segment, several", [
    (10**6, 10**6, 10**6, False),  # in memory
    (10**6, 10**6, 100, False),  # in memory, but for too many lines
    (4000, 60_000, 1000, True),
    (700, 5000, 7, True),
    (50, 400, 1, True),  # lines longer than a block; partitions that are scattered again
])  # fmt: skip
def test_the_same_bytes_for_any_memory(
    tmp_path: Path, block: int, partition: int, segment: int, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PARTITION_BITS", 3)
    monkeypatch.setattr(shuffle_input, "_SCAN_BYTES", 128)
    source = corpus(tmp_path, 900)
    partitions = run_small([source], tmp_path / "out", 5, block, partition, segment)
    assert (tmp_path / "out").read_bytes() == expected([source], 5)
    assert (partitions > 2) == several
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"], "temporary files are gone"


class ReadsAtOnce(ThreadPoolExecutor):
    """A read-ahead that has always ended before the block in hand is looked at."""

    def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(*arguments, **named)
        wait([future])
        return future


def test_a_quick_reader_does_not_make_the_first_block_the_whole(tmp_path: Path) -> None:
    """Two blocks, the second read to the end of the input while the first is in hand: no line may be lost."""
    source = corpus(tmp_path, 3, longest=90)
    shuffle = Shuffle([source], tmp_path / "out", 5)
    shuffle.block_bytes = source.stat().st_size - 1
    shuffle._reading = ReadsAtOnce(1)
    with shuffle:
        shuffle.scatter()
        assert shuffle.gather().lines == 3
    assert (tmp_path / "out").read_bytes() == expected([source], 5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 90), max_size=40), min_size=1, max_size=4).filter(any),
    st.integers(1, 200),
    st.integers(1, 2000),
    st.integers(1, 50),
    st.integers(-(2**70), 2**70),
)
def test_any_files_and_limits(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[int]],
    block: int,
    partition: int,
    segment: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    inputs = []
    for number, lengths in enumerate(files):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b"".join(bytes([97 + (i + number) % 26]) * n + b"\n" for i, n in enumerate(lengths)))
        inputs.append(path)
    run_small(inputs, folder / "out", seed, block, partition, segment)
    assert (folder / "out").read_bytes() == expected(inputs, seed)


def test_compression_and_memory_do_not_matter(tmp_path: Path) -> None:
    plain = [corpus(tmp_path, 500), corpus(tmp_path, 700, "b.jsonl")]
    packed = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst"]
    packed[0].write_bytes(gzip.compress(plain[0].read_bytes()))
    packed[1].write_bytes(zstandard.compress(plain[1].read_bytes()))
    summary = shuffle_lines(plain, tmp_path / "plain.out", 7)
    again = shuffle_lines(packed, tmp_path / "packed.out", 7, MIN_MEMORY_BYTES)
    assert (tmp_path / "plain.out").read_bytes() == (tmp_path / "packed.out").read_bytes() == expected(plain, 7)
    assert summary.lines == again.lines == 1200 and summary.bytes == again.bytes
    assert (summary.partitions, again.partitions) == (0, 0)
    assert "1,200 lines" in str(summary) and "in memory" in str(summary)
    assert run_small(packed, tmp_path / "packed.out", 7, 3000, 10_000, 100) > 8
    assert (tmp_path / "plain.out").read_bytes() == (tmp_path / "packed.out").read_bytes()


@pytest.mark.parametrize("block, partition", [(10**6, 10**6), (500, 3000)])
def test_equal_keys_keep_the_order_of_the_input(tmp_path: Path, block: int, partition: int) -> None:
    """Three keys for 700 lines: no range of keys is small enough, and the partitions must come to an end."""
    source = corpus(tmp_path, 700)
    keys = np.random.default_rng(1).integers(0, 3, 700).astype(np.uint64) * np.uint64(2**62 + 1)
    given = iter(keys)
    shuffle = Shuffle([source], tmp_path / "out", 1)
    shuffle.block_bytes, shuffle.partition_weight, shuffle.segment_lines = block, partition, 90
    shuffle._keys = Mock(random_raw=lambda count: np.fromiter(given, np.uint64, count))
    with shuffle:
        shuffle.scatter()
        shuffle.gather()
    lines = source.read_bytes().splitlines(keepends=True)
    assert (tmp_path / "out").read_bytes() == b"".join(lines[i] for i in np.argsort(keys, kind="stable"))


def test_seeds_differ_and_the_output_may_be_an_input(tmp_path: Path) -> None:
    source = corpus(tmp_path, 200)
    content = source.read_bytes()
    shuffle_lines([source], tmp_path / "one", 1)
    shuffle_lines([source], tmp_path / "two", 2)
    assert len({content, (tmp_path / "one").read_bytes(), (tmp_path / "two").read_bytes()}) == 3
    shuffle_lines([source], source, 1)
    assert source.read_bytes() == (tmp_path / "one").read_bytes()


# ---- uniform ----


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from its expectation, for equal cells."""
    mean = counts.sum() / counts.size
    degrees = counts.size - 1
    return float(((counts - mean) ** 2 / mean).sum() - degrees) / (2 * degrees) ** 0.5


def orders(tmp_path: Path, lines: int, seeds: range, block: int, partition: int) -> list[tuple[int, ...]]:
    source = tmp_path / "n.jsonl"
    source.write_bytes(b"".join(b"%d\n" % i for i in range(lines)))
    found = []
    for seed in seeds:
        run_small([source], tmp_path / "out", seed, block, partition, 3)
        found.append(tuple(map(int, (tmp_path / "out").read_bytes().split())))
    return found


def test_every_order_of_four_lines_is_equally_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 seeds, four partitions; 24 cells of 25: a shuffle that misses one order, or triples it, fails by far."""
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: None)  # 600 of them cost more than the rest
    counts = Counter(orders(tmp_path, 4, range(600), 8, 100))
    assert len(counts) == 24
    assert abs(chi_square(np.array(list(counts.values())))) < 3
    biased = counts.copy()
    biased[(0, 1, 2, 3)] += 50  # what the test is able to see: one order three times as often as the others
    assert chi_square(np.array(list(biased.values()))) > 3


def test_places_neighbours_and_parity_in_a_larger_text(tmp_path: Path) -> None:
    """5,000 lines once: where they land, which stay neighbours, and in which order pairs come."""
    (order,) = orders(tmp_path, 5000, range(11, 12), 2000, 40_000)
    place = np.argsort(order)
    cells = np.histogram2d(np.arange(5000), place, bins=10)[0]
    assert abs(chi_square(cells)) < 3
    assert chi_square(np.histogram2d(np.arange(5000), np.roll(np.arange(5000), 700), bins=10)[0]) > 100
    neighbours = int((np.diff(order) == 1).sum())
    assert neighbours <= 5, "Poisson with mean 1"
    ascending = int((np.diff(place) > 0).sum())
    assert abs(ascending - 2499.5) < 4 * (5001 / 12) ** 0.5


def test_inputs_are_merged_in_proportion(tmp_path: Path) -> None:
    inputs = [tmp_path / "a", tmp_path / "b"]
    inputs[0].write_bytes(b"a\n" * 9000)
    inputs[1].write_bytes(b"b\n" * 3000)
    shuffle_lines(inputs, tmp_path / "out", 3)
    is_b = np.frombuffer((tmp_path / "out").read_bytes().replace(b"\n", b""), np.uint8) == ord("b")
    tenths = is_b.reshape(10, -1).sum(axis=1)
    assert tenths.sum() == 3000 and abs(tenths - 300).max() < 4 * (1200 * 0.25 * 0.75) ** 0.5


# ---- mistakes ----


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # a part of a test's name, which must be the same in every process


@pytest.mark.parametrize("name, content, code, where", [
    ("a.jsonl", b"one\n\ntwo\n", "E305", "a.jsonl:2 "),
    ("a.jsonl", b"one\r\n\r\ntwo\r\n", "E305", "a.jsonl:2 "),
    ("a.jsonl", b"one\n" * 700 + b"\n", "E305", "a.jsonl:701 "),
    ("a.jsonl", b"one\ntwo", "E362", "a.jsonl "),
    ("a.jsonl.gz", packed(b"one\ntwo"), "E362", "a.jsonl.gz "),
    ("a.jsonl.gz", packed(b"one\n" * 9)[:-9], "E309", "a.jsonl.gz"),
    ("a.jsonl.zst", b"no frame", "E309", "a.jsonl.zst"),
    ("a.jsonl", b"", "E302", "a.jsonl "),
])  # fmt: skip
@pytest.mark.parametrize("block", [20, 10**6])
def test_bad_text_is_named_and_nothing_is_left(
    tmp_path: Path, name: str, content: bytes, code: str, where: str, block: int
) -> None:
    good, bad = tmp_path / "good", tmp_path / name
    if code != "E302":
        good.write_bytes(b"fine\n" * 10)
    bad.write_bytes(content)
    (tmp_path / "out").write_bytes(b"as before")
    inputs = [good, bad] if good.exists() else [bad]
    with pytest.raises(DataError) as caught:
        run_small(inputs, tmp_path / "out", 1, block, 100, 3)
    assert caught.value.code == code and where in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "out").read_bytes() == b"as before"
    assert {p.name for p in tmp_path.iterdir()} <= {"good", name, "out"}


def test_blank_lines_behind_file_borders_have_the_right_number(tmp_path: Path) -> None:
    for block, segment in itertools.product((5, 16, 64, 1000), (1, 5, 1000)):
        for first, second in ((3, 11), (40, 1), (1, 40)):
            inputs = [tmp_path / "a", tmp_path / "b"]
            inputs[0].write_bytes(b"abc\n" * first)
            inputs[1].write_bytes(b"de\n" * second + b"\n" + b"f\n" * 5)
            with pytest.raises(DataError, match=rf"E305\]: \S+/b:{second + 1} "):
                run_small(inputs, tmp_path / "out", 1, block, 100, segment)


def test_a_line_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle_input, "MAX_LINE_BYTES", 1000)
    source = tmp_path / "a"
    source.write_bytes(b"x\n" + b"y" * 3000 + b"\n")
    with pytest.raises(DataError, match="E304"):
        run_small([source], tmp_path / "out", 1, 100, 100, 10)


def test_bad_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, 10)
    for inputs, output, memory, code in (
        ([source], "out", 1000, "E287"),
        ([source], "out.gz", MIN_MEMORY_BYTES, "E288"),
        ([source], ".", MIN_MEMORY_BYTES, "E288"),
        ([source, source], "out", MIN_MEMORY_BYTES, "E288"),
        ([source.with_suffix(".txt")], "out.jsonl", MIN_MEMORY_BYTES, "E288"),
    ):
        with pytest.raises(ConfigError) as caught:
            shuffle_lines(inputs, tmp_path / output, 1, memory)
        assert caught.value.code == code
    with pytest.raises(DataError, match="E301"):
        shuffle_lines([tmp_path / "absent"], tmp_path / "out", 1)
    with pytest.raises(DataError, match="E301"):
        shuffle_lines([tmp_path], tmp_path / "out", 1)
    full = os.statvfs_result((4096, 4096, 10, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: module.shutil._ntuple_diskusage(10, 10, full.f_bfree))
    with pytest.raises(DiskError, match=r"E601.*0\.0 GB free"):
        shuffle_lines([source], tmp_path / "out", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_one_process_an_output(tmp_path: Path) -> None:
    source, elsewhere = corpus(tmp_path, 10), tmp_path / "elsewhere"
    with Shuffle([source], tmp_path / "out", 1, temporary=elsewhere) as first:
        assert first.folder.parent == elsewhere and first.folder.is_dir()
        for temporary in (elsewhere, None):
            with pytest.raises(DataError, match="E363"):
                shuffle_lines([source], tmp_path / "out", 1, temporary=temporary)
        shuffle_lines([source], tmp_path / "below" / "out", 1, temporary=elsewhere)  # another output of this name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "below", "elsewhere"]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("after", ["scatter", "gather"])
def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_one_cleans_up(tmp_path: Path, after: str) -> None:
    source, output = corpus(tmp_path, 3000), tmp_path / "out"
    output.write_bytes(b"as before")
    code = f"""
import os, signal
from megatron_hammer.corpus import shuffle as module
s = module.Shuffle([{str(source)!r}], {str(output)!r}, 1)
s.block_bytes, s.partition_weight = 4000, 60_000
if {after == "gather"}:
    module.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
with s:
    s.scatter()
    if {after == "scatter"}:
        os.kill(os.getpid(), signal.SIGKILL)
    s.gather()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9 and output.read_bytes() == b"as before" and len(list(tmp_path.iterdir())) == 4
    with open(tmp_path / "out.shuffle.tmp", "ab") as left:
        left.write(bytes(10**6))  # what is left may be longer than what comes
    run_small([source], output, 1, 4000, 60_000, 1000)
    assert output.read_bytes() == expected([source], 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, 2000)

    def refuse(descriptor: int, parts: list[memoryview]) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "writev", refuse)
    with pytest.raises(OSError, match="No space"):
        run_small([source], tmp_path / "out", 1, 4000, 60_000, 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, 300)
    monkeypatch.setattr(module.os, "writev", lambda fd, parts: os.write(fd, b"".join(parts)[:37]))
    run_small([source], tmp_path / "out", 9, 4000, 20_000, 100)
    assert (tmp_path / "out").read_bytes() == expected([source], 9)


def test_memory_stays_within_its_limit(tmp_path: Path) -> None:
    """20 MB beside what Python and NumPy take, for 53 MB of text with lines of 4 bytes and of 1 MB."""
    source = tmp_path / "a"
    with open(source, "wb") as file:
        for _ in range(6):
            file.write(b"abc\n" * 200_000 + (b"y" * 999_999 + b"\n") * 8)
    code = f"""
import resource
from megatron_hammer.corpus.shuffle import shuffle_lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
s = shuffle_lines([{str(source)!r}], {str(tmp_path / "out")!r}, 1, 20_000_000)
print(s.lines, s.bytes, s.partitions, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines, size, partitions, kilobytes = map(int, done.stdout.split())
    assert (lines, size) == (1_200_048, 52_800_000) and partitions >= 16
    assert kilobytes < 26_000
    (tmp_path / "out").unlink()


def test_the_benchmark_runs_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    data_shuffle = importlib.import_module("data_shuffle")
    parser = argparse.ArgumentParser()
    data_shuffle.add_arguments(parser)
    arguments = ["--input", str(corpus(tmp_path, 9000)), "--gb", "0.02", "--folder", str(tmp_path / "disk"),
                 "--memory-mb", "17", "--rounds", "1"]  # fmt: skip
    result = json.loads(json.dumps(data_shuffle.measure(parser.parse_args(arguments))))
    assert result["text_bytes"] >= 20_000_000 and result["through_disk_share_of_limit"] > 0
    assert result["rounds"][0]["natural"]["peak_mb"] > 0 and list((tmp_path / "disk").iterdir()) == []
