"""Everything worth a GPU, in parts that each take less than 8 minutes; a session that has a GPU runs it first.

    python benchmarks/gpu_suite.py [--part tests|step ...] [--small] [--results benchmarks/results]

tests   the tests marked gpu: equality with the CPU, no host synchronisation in a step, resume, NCCL where there are two
step    the training step of the 1.4B model on one GPU at accumulation 4: tokens/s, MFU, peak memory, p99; micro-batch 8
        as published, then what else fits

Each part writes RESULTS/gpu_suite-PART-DEVICE-DATE.json as soon as it ends. --small uses a toy model on whatever device
there is: the tests run it on the CPU, so that the suite itself is known to work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import build
from megatron_hammer.train.metrics import flops_per_token, peak_tflops
from megatron_hammer.train.step import train_step

HAMMERLLM = {"hidden_size": 2048, "ffn_hidden_size": 5632, "num_layers": 22, "num_attention_heads": 32,
             "num_query_groups": 4, "vocab_size": 105_789}  # fmt: skip
TOY = {"hidden_size": 64, "ffn_hidden_size": 176, "num_layers": 2, "num_attention_heads": 8, "num_query_groups": 2,
       "vocab_size": 301}  # fmt: skip
ACCUMULATION = 4  # the recipe's 16 only dilutes the optimizer, which is reported on its own
WARM_UP_STEPS, TIMED_STEPS = 3, 10


def run_tests(small: bool, device: torch.device) -> dict[str, Any]:
    """The tests that need a GPU."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"], cwd=root,
                          capture_output=True, text=True)  # fmt: skip
    return {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-15:]}


def time_step(micro_batch: int, compiled: bool, small: bool, device: torch.device) -> dict[str, Any]:
    """Median, p99 and memory of the step, and the optimizer's share of it."""
    config: Config = config_from_tree(
        {
            "model": TOY if small else HAMMERLLM,
            "data": {"seq_length": 64 if small else 2048},
            "kernels": {"compile": compiled},
            "train": {
                "precision": "bf16",
                "micro_batch_size": micro_batch,
                "global_batch_size": micro_batch * ACCUMULATION,
            },
        }
    )
    ctx = ParallelContext.single(device)
    model, optimizer = build(config, ctx)
    vocab_size, s = config.model.vocab_size or 0, config.data.seq_length
    samples = torch.randint(0, vocab_size, (ACCUMULATION, micro_batch, s + 1), device=device)
    batches = [(x[:, :-1], x[:, 1:]) for x in samples]

    def seconds(run: Any) -> float:
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        return time.perf_counter() - start

    steps = [
        seconds(lambda n=n: train_step(model, optimizer, batches, config, n, ctx))
        for n in range(1, WARM_UP_STEPS + TIMED_STEPS + 1)
    ]
    steps = steps[WARM_UP_STEPS:]
    rate = config.tokens_per_step / statistics.median(steps)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_tflops(config, name)
    full, causal = flops_per_token(config.model, s)
    return {
        "micro_batch": micro_batch,
        "compile": compiled,
        "tokens_per_second": round(rate, 1),
        "step_s_median": statistics.median(steps),
        "step_s_p99": sorted(steps)[-1],
        "optimizer_s": statistics.median(seconds(lambda: optimizer.step(1e-4)) for _ in range(5)),
        "mfu": None if peak is None else rate * full / peak / 1e12,
        "mfu_causal": None if peak is None else rate * causal / peak / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def run_steps(small: bool, device: torch.device) -> dict[str, Any]:
    """Each configuration in turn; one that does not fit is recorded as such."""
    results = []
    for micro_batch in (2,) if small else (8, 16):
        for compiled in (False,) if small else (False, True):
            try:
                results.append(time_step(micro_batch, compiled, small, device))
            except torch.OutOfMemoryError as error:
                results.append(
                    {"micro_batch": micro_batch, "compile": compiled, "out_of_memory": str(error).split(". ")[0]}
                )
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            print(json.dumps(results[-1]), flush=True)
    return {"steps": results}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = {"tests": run_tests, "step": run_steps}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        raise SystemExit("no CUDA device: use --small to try the suite itself")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    arguments.results.mkdir(parents=True, exist_ok=True)
    for part in arguments.part:
        began = time.perf_counter()
        result = {"part": part, "device": name, "torch": torch.__version__, **PARTS[part](arguments.small, device)}
        result["seconds"] = round(time.perf_counter() - began, 1)
        path = arguments.results / f"gpu_suite-{part}-{name.replace(' ', '_')}-{datetime.date.today()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
