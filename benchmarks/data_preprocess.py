"""``data.py preprocess``: the whole of ``tools/preprocess_data.py`` against what Megatron-LM's tool does at its core.

The peer is two processes of Python that parse a line with ``json`` and encode it with ``sentencepiece``
(``multiprocessing.Pool.imap``, 32 lines at once, as Megatron-LM hands them out), and a parent that writes the files.
Both get the same files, run as processes of their own, in turn; the tokens written are compared byte for byte.

The mix: all of ``zh.jsonl``, the first 40 MB of ``en.jsonl`` and of ``code.jsonl`` of one folder, as
``tools/make_sample_corpus.py --bytes-per-domain`` makes it (107 MB where the published figures were taken). Seconds
are from the start of the process to its end, CPU seconds those of the process and its children. Memory is the peak of
the proportional set size (PSS) of all its processes, sampled 20 times a second, or the largest resident set of the
first one, asked 100 times a second, where that is more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUFFIXES = (".bin", ".idx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus", type=Path, required=True, metavar="FOLDER", help="with zh.jsonl, en.jsonl and code.jsonl"
    )
    parser.add_argument("--tokenizer-model", type=Path, required=True, metavar="F.model", help="of sentencepiece")
    parser.add_argument(
        "--megabytes", type=float, default=40, help="of en and of code; zh is taken whole (default: 40)"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads of ours, processes of the peer (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="ours and the peer in turn (default: 3)")
    parser.add_argument("--starts", type=int, default=7, help="starts on one line of input (default: 7)")
    parser.add_argument("--folder", type=Path, help="for the outputs (default: the system's temporary folder)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="preprocess_benchmark", dir=args.folder) as folder:
        return _measure(args, Path(folder))


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    inputs = _make_mix(args.corpus, folder, int(args.megabytes * 1e6))
    size = sum(path.stat().st_size for path in inputs)
    tool = [str(ROOT / "tools" / "preprocess_data.py"), "--append-eod", "--prepend-bos", "--json-keys", "text"]
    tool += ["--tokenizer-model", str(args.tokenizer_model), "--workers", str(args.workers)]
    ours = [*tool, "--output-prefix", str(folder / "ours"), "--input", *map(str, inputs)]
    peer = [__file__, str(args.tokenizer_model), str(args.workers), str(folder / "peer"), *map(str, inputs)]
    rounds = []
    for _ in range(args.rounds):
        rounds.append({"ours": _run(ours), "peer": _run(peer)})
        hashes = [_hash_files(folder / name) for name in ("ours_text_document", "peer")]
        assert hashes[0] == hashes[1], f"ours and the peer's files differ: {hashes}"
    one = folder / "one.jsonl"
    with open(inputs[0], "rb") as file:
        one.write_bytes(file.readline())
    start = [*tool, "--output-prefix", str(folder / "one"), "--input", str(one)]
    starts = [_run(start) for _ in range(args.starts)]

    def median(runs: Sequence[dict[str, float]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    sides = {side: [r[side] for r in rounds] for side in ("ours", "peer")}
    return {
        "text_bytes": size,
        "workers": args.workers,
        "same_bytes": True,
        **{
            f"{side}_{name}": median(runs, name)
            for side, runs in sides.items()
            for name in ("seconds", "cpu_seconds", "peak_mb")
        },
        "ours_mb_s": size / 1e6 / median(sides["ours"], "seconds"),
        "peer_mb_s": size / 1e6 / median(sides["peer"], "seconds"),
        "ratio": median(sides["peer"], "seconds") / median(sides["ours"], "seconds"),
        **{f"start_{name}": median(starts, name) for name in ("seconds", "cpu_seconds", "peak_mb")},
        "rounds": rounds,
        "starts": starts,
    }


def _make_mix(corpus: Path, folder: Path, limit: int) -> list[Path]:
    """zh whole, of the others whole lines up to ``limit`` bytes or the one that passes it."""
    made = []
    for name in ("zh", "en", "code"):
        target = folder / f"{name}.jsonl"
        with open(corpus / f"{name}.jsonl", "rb") as source:
            target.write_bytes(source.read() if name == "zh" else source.read(limit) + source.readline())
        made.append(target)
    return made


def _run(command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a Python program and its children."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    peak, glances = 0.0, 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        # Not usage.ru_maxrss: that counts what this process had in memory when it started the other one.
        peak = max(peak, _most_resident_megabytes(process.pid))
        if glances % 5 == 0:
            peak = max(peak, _tree_megabytes(process.pid))
        glances += 1
        time.sleep(0.01)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": peak}


def _most_resident_megabytes(pid: int) -> float:
    """Largest resident set of a process so far; 0 once it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def _tree_megabytes(pid: int) -> float:
    """Proportional set size of a process and those below it; what has ended meanwhile counts nothing."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                total += _tree_megabytes(int(child))
    except OSError:
        pass
    return total


def _hash_files(prefix: Path) -> list[str]:
    found = []
    for suffix in SUFFIXES:
        with open(f"{prefix}{suffix}", "rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found


# ---- the peer ----


def _load(model: str) -> None:
    import sentencepiece

    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(line: bytes) -> list[int]:
    ids = _processor.encode(json.loads(line)["text"])
    return [_processor.bos_id(), *ids, _processor.eos_id()] if ids else []


def _peer(model: str, workers: int, prefix: str, inputs: list[str]) -> None:
    import struct

    import numpy as np

    _load(model)
    small = _processor.vocab_size() < 65500  # Megatron-LM's rule for 16 bits a token
    lengths = []
    with multiprocessing.Pool(workers, _load, (model,)) as pool, open(f"{prefix}.bin", "wb") as file:
        for path in inputs:
            with open(path, "rb") as lines:
                for ids in pool.imap(_encode, lines, 32):
                    lengths.append(len(ids))
                    file.write(np.array(ids, dtype=np.uint16 if small else np.int32).tobytes())
    sizes = np.array(lengths, dtype=np.int32)
    assert sizes.all(), "the peer's index is for corpora without empty documents"
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8 if small else 4, len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes())
        file.write(((np.cumsum(sizes, dtype=np.int64) - sizes) * (2 if small else 4)).tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())


if __name__ == "__main__":
    _peer(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
