"""Our training step on random tokens, the counterpart of hf_trainer.py: prints one JSON line.

    python benchmarks/our_step.py quick|mid eager|compile fp32|bf16

tokens_per_second is that of the median step after 3 warm-ups; rss_mb the peak, rss_import_mb that of the imports.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import torch

from megatron_hammer.config import config_from_tree
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import build
from megatron_hammer.train.step import train_step

SHAPES = {  # hidden, ffn, layers, heads, groups, sequence, vocabulary, micro-batch, accumulation, steps
    "quick": (256, 704, 4, 8, 2, 256, 8192, 4, 2, 24),
    "mid": (512, 1408, 8, 8, 2, 512, 32000, 4, 2, 10),
}


def peak_mb() -> int:
    """Largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Time one configuration."""
    name, mode, precision = sys.argv[1:4]
    h, f, layers, heads, groups, s, v, micro, accumulation, steps = SHAPES[name]
    imported = peak_mb()
    config = config_from_tree(
        {
            "model": dict(
                hidden_size=h,
                ffn_hidden_size=f,
                num_layers=layers,
                num_attention_heads=heads,
                num_query_groups=groups,
                vocab_size=v,
            ),
            "data": dict(seq_length=s),
            "kernels": dict(compile=mode == "compile"),
            "train": dict(
                num_steps=steps, micro_batch_size=micro, global_batch_size=micro * accumulation, precision=precision
            ),
        }
    )
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    seconds = []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        batches = [torch.randint(0, v, (micro, s + 1), generator=generator) for _ in range(accumulation)]
        start = time.perf_counter()
        report = train_step(model, optimizer, [(b[:, :-1], b[:, 1:]) for b in batches], config, step, ctx)
        float(report.loss)
        seconds.append(time.perf_counter() - start)
    tokens = micro * accumulation * s
    median = statistics.median(seconds[3:])
    flops = 6 * (layers * (2 * h * h + 2 * h * h * groups // heads + 3 * h * f) + v * h) + 6 * layers * h * s
    print(
        json.dumps(
            dict(
                who="ours",
                size=name,
                mode=mode,
                precision=precision,
                tokens_per_second=round(tokens / median, 1),
                gflops=round(tokens / median * flops / 1e9, 1),
                first_s=round(seconds[0], 1),
                rss_import_mb=imported,
                rss_mb=peak_mb(),
            )
        )
    )


if __name__ == "__main__":
    main()
