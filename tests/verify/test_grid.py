"""Layouts against one process: losses, norms, gradients of steps in fp32, two steps whole in fp64, and each goes on
from the checkpoint of another.

A subset of the grid runs in which every two values meet at least once, for a step before the checkpoint and one after
it; the whole grid for 20 steps is under the marker ``slow``, which only HAMMER_FULL_GRID runs: 1 for all, 160:320 for
the layouts with these numbers.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.loader import micro_batches
from megatron_hammer.verify.compare import (
    LayoutSizes,
    PieceKey,
    compare_pieces,
    whole_tensors,
)
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.shrink import alone
from tests.distributed import run_distributed
from tests.model.tiny import exact_steps, random_documents, tiny_config
from tests.verify.grid import (
    STEPS,
    Layout,
    config_of,
    covering,
    findings_of,
    many_steps,
    pairs_of,
    ranks_of,
    whole_grid,
    with_kinds,
)

GRID = whole_grid()
COVERING = covering(GRID)
FULL_GRID = os.environ.get("HAMMER_FULL_GRID", "")


def name_of(layout: Layout) -> str:
    short = {"tensor_model_parallel_size": "tp", "pipeline_model_parallel_size": "pp", "context_parallel_size": "cp",
             "virtual_pipeline_stages": "v", "data": "dp"}  # fmt: skip
    sizes = [f"{short[name]}{layout[name]}" for name in short if layout[name] > 1]
    flags = ["sp"] if layout["sequence_parallel"] else []
    flags += ["chunks"] if layout["tp_comm_overlap"] == "chunks" else []
    return "-".join([*sizes, *flags, layout["shard"], layout["attention_mask"]])


@cache
def many_alone(config: Config, steps: int) -> list[tuple[Outcome, dict[PieceKey, np.ndarray]]]:
    """What one process has in each step, and its gradient as whole tensors."""
    return [(outcome, whole_tensors(outcome.pieces)) for outcome in many_steps(0, config, steps, None, None)]


@dataclass
class Checkpoints:
    """Those of the layouts that were checked before, by model; which one a layout goes on from is drawn."""

    folder: Path
    of_model: dict[str, list[Path]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(16))

    def draw(self, model: str) -> Path | None:
        """One of the model's, of whatever layout; None where there is none yet."""
        saved = self.of_model.get(model)
        return self.random.choice(saved) if saved else None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("grid"))


def accepts(config: Config, world_size: int) -> bool:
    try:
        config.validate(world_size)
    except ConfigError:
        return False
    return True


def on_ranks(layout: Layout, function: Any, *arguments: Any) -> list[Any]:
    if ranks_of(layout) == 1:
        return [function(0, *arguments)]
    return run_distributed(ranks_of(layout), function, *arguments, timeout=250)


def check_steps(
    of_ranks: list[list[Outcome]], expected: list[tuple[Outcome, dict[PieceKey, np.ndarray]]], what: str
) -> None:
    """Losses, norms and each element of the gradients in fp32, which is held against the largest of its tensor."""
    assert all(len(found) == len(expected) for found in of_ranks)
    for step, ((one, gradient), ranks) in enumerate(zip(expected, zip(*of_ranks, strict=True), strict=True)):
        for found in ranks:
            pair = found.losses + found.norms
            assert pair == pytest.approx(one.losses + one.norms, rel=1e-5), f"loss and norm, {what}, step {step + 1}"
        findings = compare_pieces(list(ranks), gradient, 1e-5, LayoutSizes(1, 1, 1))[1]
        assert not findings, (what, step + 1, findings[:5])


def check(layout: Layout, checkpoints: Checkpoints, steps: int, variant: str = "llama", style: str = "adamw") -> None:
    config = config_of(layout, variant, style)
    model = f"{variant}, {config.model.num_layers} layers, {config.data.attention_mask}, {style}"
    findings = findings_of(config, on_ranks(layout, exact_steps, config))
    assert not findings, findings[:5]
    # Steps in fp32; the checkpoint of the half is what later layouts may go on from.
    resume, save = checkpoints.draw(model), checkpoints.folder / name_of(layout)
    expected = many_alone(alone(config), steps)
    check_steps(on_ranks(layout, many_steps, config, steps, None, save), expected, "from the start")
    checkpoints.of_model.setdefault(model, []).append(save)
    if resume is not None:
        resumed = on_ranks(layout, many_steps, config, steps, resume, None)
        check_steps(resumed, expected[steps // 2 :], f"resumed from {resume.name}")


def test_every_pair_of_values_is_covered() -> None:
    covered = set().union(*map(pairs_of, COVERING))
    assert covered == set().union(*map(pairs_of, GRID)) and len(COVERING) < len(GRID) // 4


KINDS = with_kinds(COVERING)


class Numbers:
    """Data whose tokens are their places in the run."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def read(self, first: int, count: int) -> Batch[np.ndarray]:
        s = self.config.data.seq_length
        windows = np.arange(first * s, (first + count) * s).reshape(count, s)
        documents = None
        if self.config.data.attention_mask == "document":
            documents = random_documents(self.config, first, range(count))
        return Batch(windows, windows, documents=documents)


def test_every_layout_reads_the_samples_of_one_process() -> None:
    """Each token of a step's global batch once, by the loader and the split of samples. The digest of samples, which
    each rank makes of the numbers of the global batch, then says what they have read."""
    seen = set()
    for layout in GRID:
        config, dp, cp = config_of(layout), layout["data"], layout["context_parallel_size"]
        b, samples, s = config.train.micro_batch_size, config.train.global_batch_size, config.data.seq_length
        if (how := (dp, cp, b, layout["attention_mask"])) in seen:
            continue
        seen.add(how)
        data: Any = Numbers(config)
        tokens = [
            batch.shard(place, cp).tokens.ravel()
            for rank in range(dp)
            for batch in micro_batches(data, samples, samples, b, rank, dp)
            for place in range(cp)
        ]
        read = np.sort(np.concatenate(tokens))
        assert np.array_equal(read, np.arange(samples * s, 2 * samples * s)), how
    assert len(seen) > 12


def test_every_value_meets_muon() -> None:
    values = {value for layout in COVERING for value in layout.items()}
    assert values == {value for layout, _, style in KINDS if style == "muon" for value in layout.items()}
    assert sum(style == "muon" for *_, style in KINDS) < len(KINDS) // 2


@pytest.mark.parametrize(
    "layout, variant, style", KINDS, ids=[f"{name_of(layout)}-{'-'.join(kinds)}" for layout, *kinds in KINDS]
)
def test_covering_layouts(layout: Layout, variant: str, style: str, checkpoints: Checkpoints) -> None:
    check(layout, checkpoints, 2, variant, style)


@pytest.mark.slow
@pytest.mark.skipif(not FULL_GRID, reason="the whole grid: HAMMER_FULL_GRID=1 runs it, 160:320 a part of it")
@pytest.mark.timeout(0)
def test_the_whole_grid(checkpoints: Checkpoints) -> None:
    first, _, last = FULL_GRID.partition(":") if ":" in FULL_GRID else ("", "", "")
    for number, layout in list(enumerate(GRID))[int(first or 0) : int(last or len(GRID))]:
        check(layout, checkpoints, STEPS)
        print(number, name_of(layout), "equal", flush=True)


PAIRED: dict[str, dict[str, Any]] = {
    "TP": dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True),
    "chunks": dict(
        parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True, parallel__tp_comm_overlap="chunks"
    ),
    "interleaved": dict(parallel__pipeline_model_parallel_size=2, parallel__virtual_pipeline_stages=2),
    "CP": dict(parallel__context_parallel_size=2),
    "weights": dict(parallel__shard="weights"),
    "gradients": dict(parallel__shard="gradients"),
    "documents": dict(data__attention_mask="document"),
    # From here on what is on no axis of the grid.
    "shard_size": dict(parallel__shard_size=2),
    "weights kept": dict(parallel__shard="weights", parallel__reshard_after_forward=False),
    "without overlap": dict(parallel__overlap_param_gather=False, parallel__overlap_grad_reduce=False),
    "tied": dict(model__tie_word_embeddings=True),
    "full recompute": dict(train__recompute="full"),
    "selective recompute": dict(train__recompute="selective"),
    "Muon": dict(optimizer__style="muon", optimizer__newton_schulz="fp32"),
    "tree": dict(train__deterministic_reduction="tree"),
    "z-loss": dict(train__z_loss=1e-2),
}
ON_THE_GRID = 7


@pytest.mark.slow
@pytest.mark.skipif(not FULL_GRID, reason="pairs of settings that are on no axis: HAMMER_FULL_GRID=1 runs them")
@pytest.mark.timeout(0)
def test_pairs_of_settings_compute_what_one_process_computes() -> None:
    """Two steps in fp64 on four ranks, of every pair that is accepted and has a setting beside the grid's axes."""
    proved = 0
    for one, other in itertools.combinations(PAIRED, 2):
        config = tiny_config(
            **PAIRED[one] | PAIRED[other],
            model__num_layers=4,
            parallel__gradient_bucket_bytes=400_000,
            optimizer__eps=1e-3,
        )
        if other in list(PAIRED)[:ON_THE_GRID] or not accepts(config, 4):
            continue
        findings = findings_of(config, run_distributed(4, exact_steps, config, timeout=250))
        assert not findings, (one, other, findings[:5])
        proved += 1
    assert proved == 93
