"""A Qwen3 of 1.7B's shape in and out at its real size: imported, two steps on TP 2, exported, certificate.

    python benchmarks/real_size.py FOLDER [--layers 28] [--seq-length 64] [group.field=value ...]

The weights are random, of transformers' own class and config. What a stage needs no more is removed when the next one
begins, so that FOLDER holds at most a run's last checkpoint and the export. Prints the seconds of each stage, and by
how much the machine's available memory fell. All 28 layers have 1.72 billion parameters: 26 GiB of states in fp32 with
AdamW, 20.6 with optimizer.style=muon, and 22.4 with all that comes on top; fewer layers keep all other sizes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_hammer.dataset.writer import IndexedWriter

ROOT = Path(__file__).parents[1]
SHAPE = dict(
    vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, tie_word_embeddings=True, max_position_embeddings=40_960, rope_theta=1e6,
)  # fmt: skip
LOOK_SECONDS = 0.2  # between two looks at the machine's memory


def available_gib() -> float:
    """What processes may still take."""
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print what a stage took."""
    begun, before, lowest, done = time.monotonic(), available_gib(), [available_gib()], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            lowest[0] = min(lowest[0], available_gib())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    yield
    done.set()
    watcher.join()
    print(f"{name}: {time.monotonic() - begun:,.0f} s, {before - lowest[0]:.1f} GiB of memory", flush=True)


def call(*command: object) -> None:
    """Run a program of ours; its output is shown."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def write_model(folder: Path, layers: int) -> None:
    """Random weights in bf16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **SHAPE)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    folder: Path = args.folder
    folder.mkdir(parents=True)
    theirs, ours, run, out = (folder / name for name in ("theirs", "ours", "run", "out"))
    with stage("random weights of transformers' class"):
        # In a process of its own, whose memory is gone when it ends.
        call("-c", f"import sys; sys.path.insert(0, 'benchmarks'); from pathlib import Path; import real_size; "
                   f"real_size.write_model(Path({str(theirs)!r}), {args.layers})")  # fmt: skip
    with stage("import"):
        call("tools/hf_to_checkpoint.py", "--hf", theirs, "--save", ours)
    shutil.rmtree(theirs)
    rng = np.random.default_rng(0)
    with IndexedWriter(folder / "data", vocab_size=SHAPE["vocab_size"]) as writer:
        writer.add(rng.integers(0, SHAPE["vocab_size"], 16 * args.seq_length), [16 * args.seq_length])
    with stage("two steps on TP 2, and their checkpoint"):
        call("-m", "megatron_hammer.launch", "--nproc", 2, ours / "model.yaml", f"checkpoint.init_from={ours}",
             f"data.train={folder / 'data'}", f"data.seq_length={args.seq_length}", "train.num_steps=2",
             "train.micro_batch_size=1", "train.global_batch_size=1", "train.precision=fp32",
             "parallel.tensor_model_parallel_size=2", "log.tensorboard=false", f"train.output={run}",
             *args.overrides)  # fmt: skip
    shutil.rmtree(ours)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        print({key: json.loads(line)[key] for key in ("step", "loss", "grad_norm")})
    with stage("export and certificate"):
        call("tools/checkpoint_to_hf.py", "--load", run, "--output", out, "--dtype", "bfloat16")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
