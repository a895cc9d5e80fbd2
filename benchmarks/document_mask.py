"""The training step under data.attention_mask=document against causal, same model and tokens, alternating.

    python benchmarks/document_mask.py [--precision bf16|fp32] [--compile] [--seq-lengths 256 512 1024 2048] [--steps 8]
        [--small]

The quick start's model (``shapes.py``), micro-batches of 1,024 tokens or one sample, 2 accumulated. Samples are windows
over lognormal documents (sigma 1) of several mean lengths. Prints one JSON line a sequence length: the median CPU time
of a step of this process in milliseconds, and its ratio to causal. CPU time, as it suffers least from other programs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, TOY, WARM_UP_STEPS, Shape

from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.step import train_step

MEANS = (1000, 300, 100)  # tokens of a document
ACCUMULATION = 2


def document_bounds(seq_length: int, samples: int, mean: int, rng: np.random.Generator) -> np.ndarray:
    """Cumulative lengths of the documents in some samples: random windows over a stream."""
    count = 10 * seq_length // mean + 100
    ends = np.cumsum(np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1, count).astype(np.int64)))
    bounds = [np.zeros(1, np.int64)]
    for sample in range(samples):
        start = rng.integers(0, max(1, ends[-1] - seq_length))
        inside = ends[(ends > start) & (ends < start + seq_length)] - start
        bounds.append(sample * seq_length + np.append(inside, seq_length))
    return np.concatenate(bounds).astype(np.int32)


def config_of(shape: Shape, mask: str, seq_length: int, micro_batch: int, precision: str, compiled: bool) -> Config:
    """The model of this shape at this length."""
    return config_from_tree(
        {
            "model": shape.model_fields,
            "data": {"seq_length": seq_length, "attention_mask": mask},
            "kernels": {"compile": "operations" if compiled else "none"},
            "train": {
                "micro_batch_size": micro_batch,
                "global_batch_size": micro_batch * ACCUMULATION,
                "precision": precision,
            },
        }
    )


def measure(shape: Shape, seq_length: int, precision: str, compiled: bool, steps: int) -> dict[str, Any]:
    """Every variant takes each step in turn."""
    micro_batch, ctx = max(1, 1024 // seq_length), ParallelContext.single()
    runs = {}
    for mask in ("causal", "document"):
        config = config_of(shape, mask, seq_length, micro_batch, precision, compiled)
        runs[mask] = (config, *build(config, ctx))
    seconds: dict[int | None, list[float]] = {mean: [] for mean in (None, *MEANS)}
    documents: dict[int | None, list[int]] = {mean: [] for mean in MEANS}
    for step in range(1, WARM_UP_STEPS + steps + 1):
        rng = np.random.default_rng(step)
        samples = [
            torch.from_numpy(rng.integers(0, shape.vocabulary, (micro_batch, seq_length + 1)))
            for _ in range(ACCUMULATION)
        ]
        for mean in seconds:
            config, model, optimizer = runs["causal" if mean is None else "document"]
            batches = []
            for x in samples:
                packed = None
                if mean is not None:
                    bounds = document_bounds(seq_length, micro_batch, mean, rng)
                    packed = PackedSequences.from_cu_seqlens(bounds, ctx.device)
                    documents[mean].append(len(bounds) - 1)
                batches.append(Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), documents=packed))
            start = time.process_time()
            train_step(model, optimizer, batches, config, step, ctx).loss.item()
            seconds[mean].append(time.process_time() - start)
    medians = {mean: statistics.median(values[WARM_UP_STEPS:]) for mean, values in seconds.items()}
    line: dict[str, Any] = {
        "seq_length": seq_length,
        "micro_batch": micro_batch,
        "precision": precision,
        "compile": compiled,
        "causal_ms": round(medians[None] * 1e3, 1),
    }
    for mean in MEANS:
        line[f"documents_of_{mean}"] = {
            "documents_a_micro_batch": round(statistics.mean(documents[mean]), 1),
            "ms": round(medians[mean] * 1e3, 1),
            "ratio": round(medians[mean] / medians[None], 3),
        }
    return line


def main() -> None:
    """One line a sequence length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seq-lengths", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a toy model: to try the program")
    arguments = parser.parse_args()
    shape = TOY if arguments.small else SHAPES["quick"]
    for seq_length in arguments.seq_lengths:
        line = measure(shape, seq_length, arguments.precision, arguments.compile, arguments.steps)
        print(json.dumps(line | {"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
