"""``kernels.compile=layers``: one code for all layers, no name changed, evaluation and restarts as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.step import train_step
from tests.model.tiny import build, rank_batches, tiny_config, train
from tests.train.runs import checkpoint_bytes, metrics, overrides, train_here, write_dataset

COMPILED = {"kernels__compile": "layers", "model__num_layers": 3}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Count from zero, whatever was compiled before."""
    torch._dynamo.reset()
    counters.clear()


def test_layers_share_one_code_and_evaluation_has_none() -> None:
    """fullgraph=True refuses graph breaks; the other shapes are those of an evaluation's last micro-batches."""
    config, ctx = tiny_config(**COMPILED), ParallelContext.single()
    config.validate(1)
    model, optimizer = build(config, ctx)
    for step in (1, 2):
        train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx)
        with torch.no_grad():
            for shape in ((2, 32), (1, 32), (3, 17)):
                model(*torch.randint(0, 301, (2, *shape)))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"] and not counters["graph_break"]
    table = parameter_table(config.model, 0, 1, False)
    assert set(model.state_dict()) == {p.name for p in table} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_computes_what_the_layers_compute(recompute: str) -> None:
    """Four steps in fp32, where only the order of sums differs; the loss falls, so errors would grow."""
    expected, _ = train(0, tiny_config(model__num_layers=3), 4)
    got, _ = train(0, tiny_config(**COMPILED, train__recompute=recompute), 4)
    for (loss, norm, _), (loss_1, norm_1, _) in zip(got, expected, strict=True):
        assert loss == pytest.approx(loss_1, rel=1e-5) and norm == pytest.approx(norm_1, rel=1e-3)


def test_a_restart_is_bit_equal_and_another_setting_reads_it(tmp_path: Path) -> None:
    for seed, name in enumerate("abxy"):
        write_dataset(tmp_path / name, 12, seed)
    sizes = ("hidden_size=64", "ffn_hidden_size=176", "num_layers=3", "num_attention_heads=8", "num_query_groups=2")
    same = ("schedule.style=constant", "kernels.compile=layers", "train.precision=fp32", "train.micro_batch_size=2")
    same += tuple(f"model.{size}" for size in sizes)  # those of the other tests: compiled already
    assert train_here(0, overrides(tmp_path, tmp_path / "whole", *same, "train.num_steps=4")) == 0
    for steps in (2, 4):
        assert train_here(0, overrides(tmp_path, tmp_path / "parts", *same, f"train.num_steps={steps}")) == 0
    assert checkpoint_bytes(tmp_path / "parts", 4) == checkpoint_bytes(tmp_path / "whole", 4)
    assert [x["loss"] for x in metrics(tmp_path / "parts")] == [x["loss"] for x in metrics(tmp_path / "whole")]
    plain = (*same, "kernels.compile=none", "train.num_steps=5")
    assert train_here(0, overrides(tmp_path, tmp_path / "parts", *plain)) == 0


@pytest.mark.parametrize(
    "changes, conflict",
    [
        ({"parallel__tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2"),
        ({"kernels__layers": "te", "train__device": "cuda"}, "kernels.layers=te"),
        ({"data__attention_mask": "document"}, "data.attention_mask=document"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], conflict: str) -> None:
    with pytest.raises(ConfigError, match=rf"E215\].*compile=layers is not for .*{conflict}.*compile=operations"):
        tiny_config(**COMPILED, **changes).validate(2)
