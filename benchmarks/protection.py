"""What hashes and digests cost a save and a load, and how long training waits for a save in the background, of one
rank, with the optimizer's state of a model of 100M.

    python benchmarks/protection.py FOLDER [--rounds N] [--threads N]

FOLDER lies on the disk that is measured; it is emptied. Saves with and without hashes alternate, and so do loads; the
medians of all rounds count, and the median of the rounds' own ratios. On a machine that is busy with other things the
seconds of a core say more. Without: nothing is hashed, nothing added up, and the live state is not compared after a
load. Reading back what was written is part of both sides of a save; without hashes a byte of every line of 64 is looked
at there, since on a virtual machine a block that nobody touches comes faster (1.4 GB in 0.63 s; 0.79 s where a byte of
every line is looked at, and as long where all of them are hashed).

Training waits for a save in the background in three places: where it begins, before the update, which must not change
weights that are still being copied, and where it hears of the save's end. In between this program multiplies matrices.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_hammer.checkpoint import commit, one_pass, tensor_files
from megatron_hammer.checkpoint.background import BUSY, FAILED, BackgroundSaver, SaveOutcome
from megatron_hammer.checkpoint.live_state import LiveSums, check_live_state
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.retention import Retention
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import Config, ModelConfig, config_to_tree
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import place
from megatron_hammer.parallel.sharding import Shard

MODEL = ModelConfig(
    hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, num_layers=4, vocab_size=32000
)  # fmt: skip
KINDS = ("weight", "exp_avg", "exp_avg_sq")
STEP_SECONDS = 0.2  # as of 28 tokens a step of this model at 100 GFLOP/s: real ones are longer
START_SECONDS = 1.0  # for the process beside the rank to start, and for how fast matrices are multiplied without it
STATE: dict[str, Any] = {"consumed_samples": 8, "samples_digest": "", "optimizer": {}}


class CopyOnly:
    """In place of ``OnePass``: the same copy, neither hash nor sum."""

    total = 0

    def __init__(self, *arguments: Any) -> None:
        self._copy = one_pass.OnePass().take

    def take(self, source: memoryview, target: memoryview | None = None) -> None:
        """The copy; a byte of every line where there is none."""
        if target is None:
            np.frombuffer(source, np.uint8)[::64].max(initial=0)
        else:
            self._copy(source, target)

    def hexdigest(self) -> str:
        return "0" * 32


@dataclass(frozen=True, order=True)
class Wait:
    """What one save in the background has cost training."""

    waited: float
    """Seconds: the sum of the next three."""
    begin: float
    update: float
    """Before the update, for the rest of the copy."""
    hear: float
    computed: float
    """Seconds of a core that training has spent itself in the time that it waited."""
    whole: float
    """Seconds until the checkpoint is there."""
    slower: float
    """By how much the matrix products between the waits came slower than before the save."""


def background_save(folder: Path, shards: Sequence[Shard], tree: dict[str, Any]) -> Wait:
    """Save once while matrices are multiplied, as in steps; the process beside has started before, as in a run."""
    shutil.rmtree(folder, ignore_errors=True)
    saver = BackgroundSaver(
        folder, shards, config_tree=tree, weights_dtype="bfloat16", tokenizer=None, retention=Retention(2),
        timeout_seconds=600, ctx=ParallelContext.single(), note=print,
        remark=print,
    )  # fmt: skip
    factor, waits, busy, outcome = torch.randn(1024, 1024), dict.fromkeys(("begin", "update", "hear"), 0.0), 0.0, None

    def timed(what: str, work: Callable[[], Any]) -> Any:
        nonlocal busy
        start, computed = time.perf_counter(), time.thread_time()
        found = work()
        waits[what] += time.perf_counter() - start
        busy += time.thread_time() - computed
        return found

    def hear() -> SaveOutcome | None:
        flags = saver.flags()
        return saver.heard(saver.phase, flags == BUSY, flags == FAILED)

    def compute(seconds: float) -> int:
        until, products = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            torch.mm(factor, factor)
            products += 1
        return products

    compute(START_SECONDS)
    alone = compute(START_SECONDS) / START_SECONDS
    started, products, steps = time.perf_counter(), 0, 0
    timed("begin", lambda: saver.begin(1, shards, STATE))
    while outcome is None:
        products, steps = products + compute(STEP_SECONDS), steps + 1
        timed("update", saver.before_update)
        outcome = timed("hear", hear)
    assert outcome.error is None, outcome.error
    whole = time.perf_counter() - started
    saver.close()
    slower = alone / (products / (steps * STEP_SECONDS)) - 1
    return Wait(sum(waits.values()), *waits.values(), busy, whole, slower)


@contextmanager
def unprotected(switch: bool) -> Iterator[None]:
    """Nothing is hashed inside, if so wished."""
    if not switch:
        yield
        return
    with patch.object(tensor_files, "OnePass", CopyOnly), patch.object(commit, "OnePass", CopyOnly):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the rank; default: all cores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shards = [
        Shard(p, 0, p.numel, {kind: torch.randn(p.numel) for kind in KINDS})
        for p in parameter_table(MODEL, place(MODEL))
    ]
    size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    ctx, tree = ParallelContext.single(), config_to_tree(Config(model=MODEL))
    found: dict[str, list[float]] = {}
    waits: list[Wait] = []

    def save() -> None:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        save_checkpoint(arguments.folder, 1, shards, model=MODEL, config_tree=tree, state=STATE, tokenizer=None,
                        ctx=ctx)  # fmt: skip

    def load(plain: bool) -> None:
        manifest = read_manifest(arguments.folder / "step-00000001")
        if plain:
            load_shards(manifest, shards, model=MODEL, kinds=KINDS, ctx=ctx)
            return
        sums = LiveSums(manifest, shards)
        load_shards(manifest, shards, model=MODEL, kinds=KINDS, ctx=ctx, filled=sums.begin)
        check_live_state(manifest, shards, 1, STATE, ctx, sums)

    def measure(name: str, work: Any) -> None:
        start, busy = time.perf_counter(), time.process_time()
        work()
        found.setdefault(name, []).append(time.perf_counter() - start)
        found.setdefault(f"cpu {name}", []).append(time.process_time() - busy)

    for number in range(arguments.rounds):
        for plain in ((True, False), (False, True))[number % 2]:
            with unprotected(plain):
                measure(f"save {plain}", save)
                measure(f"load {plain}", lambda plain=plain: load(plain))
        waits.append(background_save(arguments.folder, shards, tree))
    print(f"{size / 1e9:.2f} GB, hashes in {one_pass.BACKEND}, {arguments.threads} threads")
    for what in ("save", "load"):
        plain, whole = (statistics.median(found[f"{what} {switch}"]) for switch in (True, False))
        rate = f"{size / whole / 1e9:.2f} GB/s"
        cpu = statistics.median(found[f"cpu {what} False"]) - statistics.median(found[f"cpu {what} True"])
        rounds = [b / a - 1 for a, b in zip(found[f"{what} True"], found[f"{what} False"], strict=True)]
        print(f"{what}: {cpu:.3f} s of a core more, {cpu / plain:.1%} of the time without")
        print(f"{what}: {plain:.3f} s without, {whole:.3f} s with: {whole / plain - 1:+.1%}; {rate}")
        print(f"{what}, round by round: {statistics.median(rounds):+.1%} ({min(rounds):+.1%} to {max(rounds):+.1%})")
    best_wait, blocking = min(waits), statistics.median(found["save False"])
    print(
        f"background: training waits {best_wait.waited:.3f} s ({best_wait.computed:.3f} s of a core), "
        f"{best_wait.waited / blocking:.1%} of a blocking save: {best_wait.begin:.3f} s to begin, "
        f"{best_wait.update:.3f} s before the update, {best_wait.hear:.3f} s to hear"
    )
    print(
        f"background: the checkpoint is there after {best_wait.whole:.2f} s, in which matrix products take "
        f"{best_wait.slower:.0%} longer"
    )
    print("all rounds: " + ", ".join(f"{wait.waited / blocking:.1%}" for wait in waits))


if __name__ == "__main__":
    main()
