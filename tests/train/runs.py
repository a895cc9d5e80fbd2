"""Whole runs for tests: a small dataset with structure, commands that train on it, and what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.config import Config, load_config
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.training import train
from tests.model.tiny import make_context
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "configs" / "tiny.yaml"


def write_dataset(prefix: Path, documents: int, seed: int, vocab_size: int = 301) -> str:
    """Documents in which each token decides the next."""
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for _ in range(documents):
            tokens = np.empty(int(rng.integers(3, 200)), np.int64)
            tokens[0] = rng.integers(0, vocab_size)
            for i in range(1, len(tokens)):
                tokens[i] = (tokens[i - 1] * 5 + 7) % vocab_size
            writer.add(tokens, [len(tokens)])
    return str(prefix)


def write_fim_tokenizer(folder: Path) -> None:
    """A tokenizer of 301 ids, with the sentinels of fill-in-the-middle among them."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    backend = Tokenizer(models.BPE(vocab={chr(0x4E00 + i): i for i in range(297)}, merges=[]))
    backend.add_special_tokens(["<s>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"])
    backend.save(str(folder / "tokenizer.json"))


def overrides(data: Path, output: Path, *more: str) -> list[str]:
    """A run of 12 short steps on two blended sources and two validation sets."""
    return [
        f"data.train={{{data}/a: 2, {data}/b: 1}}", f"data.valid={{x: {data}/x, y: {data}/y}}", "model.vocab_size=301",
        "data.seq_length=32", "train.num_steps=12", "train.global_batch_size=8", "train.eval_interval_steps=4",
        "train.eval_samples=10", "checkpoint.save_interval_steps=3", "schedule.warmup_steps=2", "log.tensorboard=false",
        f"train.output={output}", *more,
    ]  # fmt: skip


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The launcher's command line."""
    return [sys.executable, "-m", "megatron_hammer.launch", "--nproc", str(ranks), str(TINY), *arguments]


def environment() -> dict[str, str]:
    """One thread a rank, whatever the machine."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(ranks: int, arguments: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run to the end, all processes with torch from the start (``tests/warm_python.py``)."""
    words = [warm_python(), *command(ranks, arguments)[1:]]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment())


def config_for(arguments: Sequence[str]) -> Config:
    """The config of those arguments."""
    return load_config(TINY, [argument for argument in arguments if not argument.startswith("--")])


def accepted_by(arguments: Sequence[str]) -> list[str]:
    """The names that the arguments accept, each as ``--accept=NAME``."""
    return [argument.removeprefix("--accept=") for argument in arguments if argument.startswith("--accept=")]


def train_here(rank: int, arguments: Sequence[str]) -> int:
    """Run in this process, in torch's default group if there is one: for ``run_distributed``."""
    config = config_for(arguments)
    ctx: ParallelContext = make_context(config)
    return train(prepare(config, ctx.world.size, accepted=accepted_by(arguments)), ctx)


def metrics(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is a matter of the clock and of the process."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens_per_second") > 0
        assert line.pop("step_seconds") > 0 and line.pop("tflops_causal") > 0
        line.pop("memory_bytes", None)
    return lines


def checkpoint_bytes(output: Path, step: int) -> dict[str, bytes]:
    """Every tensor file of one checkpoint."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def begin_run(folder: Path) -> None:
    """Datasets ``data/a, b, x, y`` in the folder, and ``run``, which has done 4 of 12 steps on them."""
    (folder / "data").mkdir()
    for seed, (name, documents) in enumerate({"a": 60, "b": 40, "x": 8, "y": 5}.items()):
        write_dataset(folder / "data" / name, documents, seed)
    more = ("train.num_steps=4", "schedule.decay_steps=12")
    assert train_here(0, overrides(folder / "data", folder / "run", *more)) == 0
