#!/usr/bin/env python3
"""Profile a training step: time by part against the limit of the device, memory by kind, and a chrome trace.

    python tools/profile_step.py examples/configs/tiny.yaml model.vocab_size=8192 --out profile/
    python tools/profile_step.py CONFIG.yaml data.train=P train.global_batch_size=32 --out profile/ --steps 5

writes into FOLDER
    profile.png      the step, part by part, beside what each part would take at the limit; memory by kind
    profile.json     the same as numbers, with the slowest operations of each part
    trace.json.gz    every operation and kernel of the profiled steps: open it at https://ui.perfetto.dev
and prints the table. Model, optimizer and kernels are those of a training run with this config on one process (a GPU
where torch sees one); the data is data.train where it is set, else random tokens. Nothing of train.output is touched.

With --nproc N the step is that of N ranks, as the launcher starts them. Each writes its trace, trace-rankR.json.gz, and
the table says what rank 0 communicates, and how much of that overlaps with its computation. There are no limits then,
since they hold for one process.

The limit of a part is the longer of its floating-point operations at the rate of a large matrix product and of its
least bytes at the rate of a large copy. Both rates are measured first (one second), unless they are given.

A step of many micro-batches makes a large trace and tells nothing more: lower train.global_batch_size to 2 or 4
micro-batches. What a compiler has fused (kernels.compile=layers) is one part.

Exit codes: 0 done; 2 bad usage or configuration; 3 data; 6 disk; 10 out of memory; 130 interrupted (docs/errors.md).
"""

from __future__ import annotations

import os
from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity
from megatron_hammer.config import load_config


def main() -> int:
    parser = ArgumentParser(prog="profile_step.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="a preset, for example examples/configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="settings that replace the file's")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder for the results")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps to profile (default: %(default)s)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="limit of matrix products (default: measured)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s",
                        help="limit of bytes read and written, in 10^9 a second (default: measured)")  # fmt: skip
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="number of ranks (default: %(default)s)")
    parser.add_language("the picture")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its notes about itself; read when torch is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # memory freed under the profiler that is older than it
    from megatron_hammer.profile.profile import ProfileOptions, for_profiling, profile_step, profile_table

    flops = None if args.peak_tflops is None else args.peak_tflops * 1e12
    bandwidth = None if args.bandwidth is None else args.bandwidth * 1e9
    options = ProfileOptions(args.out, args.steps, flops, bandwidth, args.nproc, args.language)
    options.check()
    if args.nproc == 1:
        with Activity("profiling", in_place=False) as note:
            report = profile_step(config, options, note)
        print(profile_table(report))
        return 0
    from megatron_hammer.supervise.nodes import Node
    from megatron_hammer.supervise.start import launch

    config = for_profiling(config, options)
    config.validate(args.nproc)
    return launch(config, Node(args.nproc), "megatron_hammer.profile.profile:run_rank", {"options": options})


if __name__ == "__main__":
    run(main)
