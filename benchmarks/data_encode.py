"""``data.py encode``: our encoder against sentencepiece on real text, ids compared.

    python benchmarks/data.py encode --tokenizer hammerllm.model --limit-mb 40 \
        --texts zh=full/zh.jsonl en=full/en.jsonl code=full/code.jsonl

Documents lie in memory as ``str``. A round runs sentencepiece (``encode(list, num_threads)``, which makes lists), then
ours with cold caches (a new encoder), then ours again with the caches that this left. Both use the same number of
threads; the ids of the first round must be equal. Medians of the rounds are reported, and CPU time, which says more on
a machine that others use: a rate by CPU time is what ``threads`` idle cores would reach.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, load_processor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="F.model", help="a sentencepiece model")
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=F.jsonl", help="with the key text, plain")
    parser.add_argument("--limit-mb", type=float, default=40.0, help="of each file, from its begin (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="of both encoders (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of both encoders in turn (default: 5)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    loads = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        tokenizer = SentencePieceTokenizer(args.tokenizer)
        loads.append(time.perf_counter() - start)
    results: dict[str, Any] = {
        "encoder": tokenizer.encoder,
        "threads": args.threads,
        "rounds": args.rounds,
        "load_seconds": statistics.median(loads),
    }
    for item in args.texts:
        name, _, path = item.partition("=")
        results[name] = _measure_texts(args, _read(Path(path), args.limit_mb))
    return results


def _measure_texts(args: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    peer = load_processor(args.tokenizer.read_bytes(), args.tokenizer)
    seconds: dict[str, list[tuple[float, float]]] = {"sentencepiece": [], "cold": [], "warm": []}
    for number in range(args.rounds):
        expected, spent = _timed(lambda: peer.encode(texts, num_threads=args.threads))
        seconds["sentencepiece"].append(spent)
        ours = SentencePieceTokenizer(args.tokenizer)
        for way in ("cold", "warm"):
            (ids, lengths), spent = _timed(lambda ours=ours: ours.encode_documents(texts, args.threads))
            seconds[way].append(spent)
            if number == 0:
                _compare(expected, ids, lengths)
        tokens = len(ids)
        del expected, ids, lengths
    wall = {way: statistics.median(w for w, _ in runs) for way, runs in seconds.items()}
    cpu = {way: statistics.median(c for _, c in runs) for way, runs in seconds.items()}
    return {
        "documents": len(texts),
        "megabytes": megabytes,
        "tokens": tokens,
        "ids": "identical",
        **{f"{way}_mb_s": megabytes / wall[way] for way in wall},
        **{f"{way}_mb_s_by_cpu": megabytes * args.threads / cpu[way] for way in cpu},
        **{f"{way}_ratio": wall["sentencepiece"] / wall[way] for way in ("cold", "warm")},
        **{f"{way}_ratio_by_cpu": cpu["sentencepiece"] / cpu[way] for way in ("cold", "warm")},
        "seconds_wall_cpu": seconds,
    }


def _timed(run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What ``run`` returns; wall and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def _compare(expected: list[list[int]], ids: np.ndarray, lengths: np.ndarray) -> None:
    ends = np.cumsum(lengths)
    for number, (theirs, end, length) in enumerate(zip(expected, ends, lengths)):
        if not np.array_equal(theirs, ids[end - length : end]):
            raise SystemExit(f"document {number}: other ids than sentencepiece's")


def _read(path: Path, limit_mb: float) -> list[str]:
    """The texts of the first lines that together have about ``limit_mb``."""
    texts: list[str] = []
    size = 0
    with open(path, "rb") as file:
        for line in file:
            if size >= limit_mb * 1e6:
                break
            size += len(line)
            texts.append(orjson.loads(line)["text"])
    return texts
