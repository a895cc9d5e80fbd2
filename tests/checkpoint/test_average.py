"""Averaged checkpoints: the mean of their weights, exported like any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.checkpoint import average
from megatron_hammer.checkpoint.average import average_checkpoints, choose_checkpoints, shares_of
from megatron_hammer.checkpoint.folder import find_checkpoints, open_checkpoint
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.read import read_logical
from megatron_hammer.huggingface.export import export_hf
from tests.train.runs import overrides, train_here, write_dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("averaged")
    for seed, name in enumerate("abxy"):
        write_dataset(folder / name, 8, seed)
    more = ("train.num_steps=3", "checkpoint.save_interval_steps=1", "checkpoint.keep_last=3", "train.eval_samples=1",
            "train.eval_interval_steps=3", "train.global_batch_size=2")  # fmt: skip
    assert train_here(0, overrides(folder, folder / "run", *more)) == 0
    return folder


@pytest.mark.parametrize(
    ("weights", "ema", "expected"),
    [(None, None, [1 / 3] * 3), ([1, 0, 3], None, [0.25, 0, 0.75]), (None, 0.9, [0.81, 0.09, 0.1])],
)
def test_the_mean_is_that_of_the_weights(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: list | None,
    ema: float | None,
    expected: list,
) -> None:
    monkeypatch.setattr(average, "_BLOCK_ELEMENTS", 1000)
    chosen = choose_checkpoints([str(trained / "run")], 3)
    shares = shares_of(3, weights, ema)
    assert shares == pytest.approx(expected) and sum(shares) == pytest.approx(1)
    target = open_checkpoint(average_checkpoints(chosen, shares, tmp_path / "out"))
    verify_checkpoint(target)
    assert target.kinds == {"weight"} and [entry["step"] for entry in target.state["averaged"]] == [1, 2, 3]
    for tensor in target.tensors:
        parts = [read_logical(manifest, tensor.name).double() for manifest in chosen]
        mean = sum(part * share for part, share in zip(parts, shares, strict=True))
        torch.testing.assert_close(read_logical(target, tensor.name), mean.float(), rtol=1e-6, atol=1e-9)


def test_it_is_exported_like_any(trained: Path, tmp_path: Path) -> None:
    chosen = choose_checkpoints([str(path) for path in find_checkpoints(trained / "run")[1:]], None)
    average_checkpoints(chosen, shares_of(2, None, None), tmp_path / "out")
    assert export_hf(tmp_path / "out", tmp_path / "hf", "float32")
    assert (tmp_path / "out" / "model.yaml").is_file()


def test_what_cannot_be_averaged_is_refused(trained: Path) -> None:
    run = str(trained / "run")
    for call in (lambda: choose_checkpoints([run], None), lambda: choose_checkpoints([run], 1),
                 lambda: choose_checkpoints([run, run], 2), lambda: shares_of(2, [1], None),
                 lambda: shares_of(2, [0, 0], None), lambda: shares_of(2, None, 1.0)):  # fmt: skip
        with pytest.raises(ConfigError, match="E201"):
            call()
    with pytest.raises(CheckpointError, match="has 3 checkpoints"):
        choose_checkpoints([run], 4)
