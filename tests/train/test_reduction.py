"""Runs with sums in a fixed tree (``train.deterministic_reduction``): the number of ranks changes no bit of them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.read import read_logical
from megatron_hammer.model.parameters import logical_shapes
from tests.distributed import run_distributed
from tests.train.runs import config_for, metrics, overrides, train_here


def test_runs_on_other_numbers_of_ranks_are_equal_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Evaluation, checkpoints and all lines of metrics: 1 rank; 4 ranks; 2 ranks, then 4, then 1."""
    fixed = (
        "train.deterministic_reduction=tree",
        "train.num_steps=6",
        "train.eval_interval_steps=3",
        "train.eval_samples=10",
    )
    outputs = [tmp_path / name for name in ("one", "four", "changing")]
    for output, dp in zip(outputs, (1, 4)):
        run_distributed(dp, train_here, overrides(data, output, *fixed))
    for until, dp in ((2, 2), (4, 4), (6, 1)):
        more = (f"train.num_steps={until}", "schedule.decay_steps=6")
        run_distributed(dp, train_here, overrides(data, outputs[2], *fixed, *more))
    one, four, changing = (metrics(output) for output in outputs)
    assert one == four
    assert [line["loss"] for line in changing] == [line["loss"] for line in one]
    assert [line["grad_norm"] for line in changing] == [line["grad_norm"] for line in one]
    for line, other in zip(one, changing, strict=True):  # of each source, over resumes as well
        by_source = {key: value for key, value in line.items() if key.startswith("source/")}
        assert by_source == {key: other.get(key) for key in by_source} and "source/a/loss" in by_source
        drawn = {name: line[f"source/{name}/tokens"] for name in ("a", "b") if f"source/{name}/tokens" in line}
        assert len(drawn) < 2 or sum(drawn.values()) == line["consumed_tokens"]
    manifests = [read_manifest(output / "checkpoints" / "step-00000006") for output in outputs]
    for name in logical_shapes(config_for(overrides(data, outputs[0])).model):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            first, *rest = (read_logical(manifest, name, kind) for manifest in manifests)
            assert all(torch.equal(first, other) for other in rest), (name, kind)
