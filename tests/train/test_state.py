"""Where a run begins: what is drawn, what is loaded, and that nothing is left that neither has given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.prepare import Prepared, prepare
from tests.train.runs import config_for, overrides, train_here


class Draws(TorchDispatchMode):
    """Counts the operations that draw random numbers, whatever generator they are given."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


HORIZON = "schedule.decay_steps=12"


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved its second step."""
    output = tmp_path_factory.mktemp("state") / "run"
    assert train_here(0, overrides(data, output, "train.num_steps=2", HORIZON)) == 0
    return output


@pytest.mark.parametrize("start", ["anew", "resume", "init_from"])
def test_only_a_run_with_new_weights_draws_them(data: Path, done: Path, tmp_path: Path, start: str) -> None:
    output = done if start == "resume" else tmp_path / "new"
    more = (f"checkpoint.init_from={done}",) if start == "init_from" else ()
    prepared = prepare(config_for(overrides(data, output, HORIZON, *more)), 1)
    with Draws() as draws:
        run = TrainLoop(prepared, ParallelContext.single())
    assert (draws.count > 0) == (start == "anew")
    assert all(bool(weight.any()) for weight in run.stages[0].parameters()), "all weights have values"


def _without_a_slice(manifest: Manifest) -> Manifest:
    """The last slice of the first file is in no file."""
    first, *others = manifest.files
    return dataclasses.replace(manifest, files=(dataclasses.replace(first, slices=first.slices[:-1]), *others))


def _without_a_tensor(manifest: Manifest) -> Manifest:
    """The last tensor is not in the checkpoint."""
    files = tuple(
        dataclasses.replace(file, slices=tuple(s for s in file.slices if s.tensor != len(manifest.tensors) - 1))
        for file in manifest.files
    )
    return dataclasses.replace(manifest, tensors=manifest.tensors[:-1], files=files)


@pytest.mark.parametrize("damage", [_without_a_slice, _without_a_tensor])
def test_a_weight_that_the_checkpoint_does_not_give_is_an_error(
    data: Path, done: Path, damage: Callable[[Manifest], Manifest]
) -> None:
    prepared: Prepared = prepare(config_for(overrides(data, done, HORIZON)), 1)
    assert prepared.resume is not None
    prepared = dataclasses.replace(prepared, resume=damage(prepared.resume))
    with pytest.raises(CheckpointError, match=r"E413.*(lacks \d+ elements|is missing)"):
        TrainLoop(prepared, ParallelContext.single())
