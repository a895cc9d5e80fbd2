"""Our training step against transformers' Trainer on this machine's cores, in alternating runs.

    python benchmarks/cpu_step.py [--sizes quick mid] [--precisions bf16 fp32] [--rounds 3]

Each run is a process of its own. Prints every run, then the medians and ratios against the better of the peer's modes,
and what share of the rate of the bare matrix products of these shapes, as our run makes them (``bare_products.py``
names them), taken in the same rounds, each side reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics

from sides import run

from megatron_hammer.base.system import processor_name, processor_text

LIMIT, OURS, PEERS = (
    "bare_products.py",
    ("our_step.py", "eager"),
    (("hf_trainer.py", "compile"), ("hf_trainer.py", "eager")),
)


# What decides how fast products and our kernels are, by the names that Linux gives.
FEATURES = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma", "asimd", "bf16", "sve")


def processor() -> str:
    """The model and which of ``FEATURES`` it has, as Linux tells; without Linux what Python knows."""
    flags = processor_text().split()
    known = ", ".join(name for name in FEATURES if name in flags)
    return f"{processor_name()} ({known or 'its instructions are not known'})"


def printed(line: dict) -> dict:
    """It, after printing it."""
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    """Alternate the sides and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["quick", "mid"], choices=["quick", "mid"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import torch
    import transformers

    print(
        f"{os.cpu_count()} cores, {processor()}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    table = [
        "| size | precision | ours | peer, better mode | ratio | share of the products' rate, ours / peer | "
        "memory ours / peer, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in arguments.sizes:
        for precision in arguments.precisions:
            runs: dict[tuple[str, str], list[dict]] = {}
            limits = []
            for _ in range(arguments.rounds):
                limits.append(printed(run(LIMIT, size, "-", precision)))
                for script, mode in (OURS, *PEERS):
                    line = printed(run(script, size, mode, precision))
                    runs.setdefault((script, mode), []).append(line)
            rates = {key: statistics.median(r["tokens_per_second"] for r in lines) for key, lines in runs.items()}
            peer = max(PEERS, key=lambda key: rates[key])
            limit, made = statistics.median(line["gflops"] for line in limits), limits[0]["products"]
            shares = [statistics.median(r["gflops"] for r in runs[k]) / limit for k in (OURS, peer)]
            memory = [statistics.median(r["memory_mb"] for r in runs[k]) for k in (OURS, peer)]
            table.append(
                f"| {size} | {precision} | {rates[OURS]:,.0f} tokens/s | {rates[peer]:,.0f} ({peer[1]}) | "
                f"{rates[OURS] / rates[peer]:.2f} | {shares[0]:.0%} / {shares[1]:.0%} of {limit:.0f} GFLOP/s, {made} | "
                f"{memory[0]:.0f} / {memory[1]:.0f} |"
            )
    print("\n".join(table))


if __name__ == "__main__":
    main()
