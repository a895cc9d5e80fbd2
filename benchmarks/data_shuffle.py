"""The out-of-core shuffle, as a share of what this disk can do.

The yardstick is two reads and two writes of the text at the rates measured here: a file of the same size written with
fsync, and read again after its pages were dropped from the cache. The shuffle is timed two ways:

- ``through_disk``: the input is dropped from the cache before the first pass; between the passes the partitions are
  synced and dropped, so that every byte is read twice and written twice, whatever memory the machine has;
- ``natural``: the input is dropped, the rest is left to the system, which may keep partitions in memory.

Both end with the output synced. Rounds alternate between disk and shuffle, because other users of the disk come and go;
medians are reported. Each run of the shuffle is a process of its own, whose peak memory is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_COPY_BYTES = 8 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="F.jsonl", help="real text, plain")
    parser.add_argument("--gb", type=float, default=8.0, help="size of text: the input is repeated (default: 8)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()),
                        help="on the disk to measure; needs 3 times --gb (default: %(default)s)")  # fmt: skip
    parser.add_argument("--memory-mb", type=int, default=1000, help="for the shuffle (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="disk and shuffle in turn (default: 3)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shuffle_benchmark", dir=args.folder) as folder:
        return _measure(args, Path(folder))


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text, output = folder / "text.jsonl", folder / "out.jsonl"
    size = _repeat(args.input, text, int(args.gb * 1e9))
    rounds = []
    for _ in range(args.rounds):
        write, read = _time_disk(folder / "disk", size)
        limit = 1 / (2 / write + 2 / read)
        figures: dict[str, Any] = {"disk_write_mb_s": write, "disk_read_mb_s": read, "limit_mb_s": limit}
        for way in ("through_disk", "natural"):
            _drop(text)
            code = [sys.executable, __file__, way, str(text), str(output), str(args.memory_mb * 1_000_000)]
            run = json.loads(subprocess.run(code, check=True, stdout=subprocess.PIPE, text=True).stdout)
            output.unlink()
            rate = size / 1e6 / run["seconds"]
            figures[way] = {"mb_s": rate, "share_of_limit": rate / limit, **run}
        rounds.append(figures)
    return {
        "text_bytes": size,
        "memory_mb": args.memory_mb,
        "limit_mb_s": statistics.median(r["limit_mb_s"] for r in rounds),
        **{
            f"{way}_{name}": statistics.median(r[way][name] for r in rounds)
            for way in ("through_disk", "natural")
            for name in ("mb_s", "share_of_limit", "cpu_seconds", "peak_mb")
        },
        "rounds": rounds,
    }


def _repeat(sources: list[Path], target: Path, size: int) -> int:
    """Whole copies of the sources until ``size`` is reached; the bytes written."""
    written = 0
    with open(target, "wb") as file:
        while written < size:
            for source in sources:
                with open(source, "rb") as part:
                    shutil.copyfileobj(part, file, _COPY_BYTES)
                written += source.stat().st_size
        os.fsync(file.fileno())
    return written


def _time_disk(path: Path, size: int) -> tuple[float, float]:
    """MB/s of writing and of reading."""
    block = os.urandom(_COPY_BYTES)
    count = max(size // _COPY_BYTES, 1)
    started = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    write = time.monotonic() - started
    _drop(path)
    buffer = bytearray(_COPY_BYTES)
    started = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.monotonic() - started
    path.unlink()
    return count * _COPY_BYTES / 1e6 / write, count * _COPY_BYTES / 1e6 / read


def _drop(path: Path) -> None:
    """Sync a file and take its pages out of the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _shuffle(way: str, text: Path, output: Path, memory_bytes: int) -> dict[str, float]:
    """One run, in a process of its own."""
    from megatron_hammer.corpus.shuffle import Shuffle

    started = time.monotonic()
    with Shuffle([text], output, 3407, memory_bytes) as shuffle:
        shuffle.scatter()
        scattered = time.monotonic()
        if way == "through_disk":
            for partition in shuffle.folder.iterdir():
                _drop(partition)
        dropped = time.monotonic()
        shuffle.gather()
        ended = time.monotonic()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": ended - started,
        "scatter_seconds": scattered - started,
        "sync_seconds": dropped - scattered,
        "gather_seconds": ended - dropped,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "user_seconds": usage.ru_utime,
        "peak_mb": usage.ru_maxrss / 1000,
    }


if __name__ == "__main__":
    print(json.dumps(_shuffle(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
