"""What hashes and digests cost a save and a load, and how long training waits for a save in the background, of one
rank, with the optimizer's state of a model of 100M.

    python benchmarks/protection.py FOLDER [--rounds N] [--threads N]

FOLDER lies on the disk that is measured; it is emptied. Saves with and without hashes alternate, and so do loads; the
best of all rounds counts, for both sides. On a machine that is busy with other things the seconds of a core say more.
Without: nothing is hashed, nothing added up, and the live state is not compared after a load. Reading back what was
written is part of both sides of a save.

Training waits for a save in the background in three places: where it begins, before the update, which must not change
weights that are still being copied, and where it hears of the save's end. In between this program multiplies matrices.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_hammer.checkpoint import commit, digest, tensor_files
from megatron_hammer.checkpoint.background import BUSY, FAILED, BackgroundSaver, SaveOutcome
from megatron_hammer.checkpoint.live_state import check_live_state
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
STEP_SECONDS = 0.2
STATE: dict[str, Any] = {"consumed_samples": 8, "samples_digest": "", "optimizer": {}}


class NoHash:
    """In place of a hash and of a sum."""

    total = 0

    def __init__(self, *arguments: Any) -> None: ...

    def update(self, data: Any) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 32

    def watch(self, buffers: Any) -> Any:
        return buffers


def background_save(folder: Path, shards: Sequence[Shard], tree: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds that training waits, those of a core that it spends itself, and those until the checkpoint is there."""
    shutil.rmtree(folder, ignore_errors=True)
    saver = BackgroundSaver(
        folder, shards, config_tree=tree, weights_dtype="bfloat16", tokenizer=None, retention=Retention(2),
        timeout_seconds=600, ctx=ParallelContext.single(), note=print,
    )  # fmt: skip
    factor, started, waited, busy, outcome = torch.randn(1024, 1024), time.perf_counter(), 0.0, 0.0, None

    def timed(work: Callable[[], Any]) -> Any:
        nonlocal waited, busy
        start, computed = time.perf_counter(), time.thread_time()
        found = work()
        waited, busy = waited + time.perf_counter() - start, busy + time.thread_time() - computed
        return found

    def hear() -> SaveOutcome | None:
        flags = saver.flags()
        return saver.heard(saver.phase, flags == BUSY, flags == FAILED)

    timed(lambda: saver.begin(1, shards, STATE))
    while outcome is None:
        until = time.perf_counter() + STEP_SECONDS
        while time.perf_counter() < until:
            torch.mm(factor, factor)
        timed(saver.before_update)
        outcome = timed(hear)
    assert outcome.error is None, outcome.error
    whole = time.perf_counter() - started
    saver.close()
    return waited, busy, whole


@contextmanager
def unprotected(switch: bool) -> Iterator[None]:
    """Nothing is hashed inside, if so wished."""
    if not switch:
        yield
        return
    with patch.object(tensor_files.xxhash, "xxh3_128", NoHash), patch.object(commit, "RectangleSum", NoHash):
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
    best: dict[str, float] = {}
    waits: list[tuple[float, float, float]] = []

    def save() -> None:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        save_checkpoint(arguments.folder, 1, shards, model=MODEL, config_tree=tree, state=STATE, tokenizer=None,
                        ctx=ctx)  # fmt: skip

    def load(plain: bool) -> None:
        manifest = read_manifest(arguments.folder / "step-00000001")
        load_shards(manifest, shards, model=MODEL, kinds=KINDS, ctx=ctx)
        if not plain:
            check_live_state(manifest, shards, 1, STATE, ctx)

    def measure(name: str, work: Any) -> None:
        start, busy = time.perf_counter(), time.process_time()
        work()
        best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
        best[f"cpu {name}"] = min(best.get(f"cpu {name}", 1e9), time.process_time() - busy)

    for _ in range(arguments.rounds):
        for plain in (True, False):
            with unprotected(plain):
                measure(f"save {plain}", save)
                measure(f"load {plain}", lambda plain=plain: load(plain))
        waits.append(background_save(arguments.folder, shards, tree))
    print(f"{size / 1e9:.2f} GB, digest in {digest.BACKEND}, {arguments.threads} threads")
    for what in ("save", "load"):
        plain, whole = best[f"{what} True"], best[f"{what} False"]
        rate = f"{size / whole / 1e9:.2f} GB/s"
        cpu = best[f"cpu {what} False"] - best[f"cpu {what} True"]
        print(f"{what}: {cpu:.3f} s of a core more, {cpu / plain:.1%} of the time without")
        print(f"{what}: {plain:.3f} s without, {whole:.3f} s with: {whole / plain - 1:+.1%}; {rate}")
    waited, busy, whole = min(waits)
    blocking = best["save False"]
    print(
        f"background: training waits {waited:.3f} s ({busy:.3f} s of a core), {waited / blocking:.1%} of a blocking "
        f"save; the checkpoint is there after {whole:.2f} s"
    )


if __name__ == "__main__":
    main()
