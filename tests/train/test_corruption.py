"""A micro-batch that is run twice has the same bits; where a bit is flipped, rank and parameter are named."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError, DriftError
from megatron_hammer.config import Config
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.bit_hash import BitHash, whole_hash
from megatron_hammer.kernels.selection import select_backends
from megatron_hammer.optim.buckets import Bucket
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.corruption import CorruptionCheck, check_here
from megatron_hammer.train.cuda_graph import GraphedMicroBatch
from megatron_hammer.train.schedules import micro_batch
from megatron_hammer.train.step import Checks, train_step
from tests.distributed import run_distributed
from tests.host_waits import OperationNames
from tests.model.tiny import make_context, rank_batches, tiny_config
from tests.train.runs import checkpoint_bytes, metrics, overrides, train_here

CHECK = dict(train__sdc_check_interval_steps=1)


def flip(tensor: Tensor, bit: int = 0) -> None:
    """A bit of an fp32 element."""
    tensor.detach().view(-1).view(torch.int32)[5] ^= 1 << bit


@contextmanager
def flipped(kind: str, name: str, alone: bool) -> Iterator[None]:
    """While it is open, one bit flips in one of the two passes: of a parameter's gradient, or of what a layer gives.

    Args:
        kind: gradient or activation.
        name: of the parameter in the table; of an activation, the end of a module's name.
    """
    with pytest.MonkeyPatch.context() as patch:
        complete, begin, hooks = FlatStore.complete, FlatStore.begin, list[Any]()

        def now_complete(store: FlatStore, bucket: Bucket) -> None:
            if kind == "gradient" and store.watch is not None and store.watch.alone == alone:
                for i in bucket.parameters:
                    if store.table[i].name == name:
                        flip(store.gradients[i].main_grad)
            complete(store, bucket)

        def now_begin(store: FlatStore, first: bool, last: bool, watch: Any = None) -> None:
            begin(store, first, last, watch)
            while hooks:
                hooks.pop().remove()
            if kind == "activation" and watch is not None and watch.alone == alone:
                hooks.append(torch.nn.modules.module.register_module_forward_hook(_flip_output(name)))

        patch.setattr(FlatStore, "complete", now_complete)
        patch.setattr(FlatStore, "begin", now_begin)
        yield
        while hooks:
            hooks.pop().remove()


def _flip_output(kind: str) -> Any:
    done: list[bool] = []

    def hook(module: Any, _: Any, output: Any) -> None:
        if type(module).__name__ == kind and not done:
            done.append(True)
            flip(output, 24)  # of the exponent: a residual stream rounds the lowest bits away

    return hook


def take(rank: int, config: Config, steps: int, runner: Any = None) -> tuple[list[Any], list[Tensor]]:
    """Steps with the check where the config has it: their numbers, and the weights after them."""
    ctx = make_context(config)
    stages, optimizer = build_stages(config, ctx)
    interval = config.train.sdc_check_interval_steps
    check = CorruptionCheck(config, stages, optimizer, ctx) if interval else None
    run = micro_batch if runner is None else GraphedMicroBatch(optimizer.store.of_stages[0], runner())
    numbers: list[Any] = []
    for step in range(1, steps + 1):
        due = check if check is not None and check.is_due(step) else None
        report = train_step(
            stages,
            optimizer,
            rank_batches(config, step, ctx),
            config,
            step,
            ctx,
            run=run,
            checks=Checks(twice=due),
        )
        if report.corruption is not None and check is not None:
            check.raise_on(report.corruption, Path(config.train.output) / "incident.json")
        numbers.append((float(report.loss), float(report.grad_norm), bool(report.applied)))
    optimizer.store.wait()
    return numbers, [shard.tensors["weight"].clone() for shard in optimizer.shards()]


def same(rank: int, configs: list[Config]) -> None:
    """Each config with the check is the same to the bit as without it, and finds nothing."""
    for config in configs:
        train = dataclasses.replace(config.train, sdc_check_interval_steps=0)
        (numbers, weights), (plain, expected) = (
            take(rank, config, 2),
            take(rank, dataclasses.replace(config, train=train), 2),
        )
        assert numbers == plain
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def named(rank: int, cases: list[tuple[Config, int, str, str, bool]]) -> list[tuple[str, bool]]:
    """The message of each case (config, rank that has the flip, kind, name, pass), and whether weights changed."""
    said = []
    for config, at, kind, name, alone in cases:
        ctx = make_context(config)
        stages, optimizer = build_stages(config, ctx)
        check = CorruptionCheck(config, stages, optimizer, ctx)
        before = [shard.tensors["weight"].clone() for shard in optimizer.shards()]
        batches = rank_batches(config, 1, ctx)
        with flipped(kind if rank == at else "none", name, alone):
            report = train_step(stages, optimizer, batches, config, 1, ctx, checks=Checks(twice=check))
        after = [shard.tensors["weight"] for shard in optimizer.shards()]
        unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert report.corruption is not None
        with pytest.raises(DriftError) as caught:
            check.raise_on(report.corruption, Path(config.train.output) / "incident.json")
        assert (caught.value.code, caught.value.exit_code) == ("E1102", 11)
        said.append((f"{caught.value.what} {caught.value.rule}", unchanged))
        report = train_step(stages, optimizer, batches, config, 2, ctx, checks=Checks(twice=check))
        assert report.corruption is not None and not report.corruption.found, "the next check is of its own step"
    return said


TP2 = dict(parallel__tensor_model_parallel_size=2)
PP2 = dict(parallel__pipeline_model_parallel_size=2, model__num_layers=4)
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [
        dict(train__global_batch_size=2),
        dict(train__precision="fp16", train__recompute="full", train__global_batch_size=4),
        dict(train__deterministic_reduction="tree", train__precision="bf16", model__tie_word_embeddings=True),
    ],
    2: [
        dict(parallel__shard="gradients"),
        dict(parallel__shard="weights", train__global_batch_size=4, parallel__overlap_grad_reduce=False),
        dict(train__deterministic_reduction="tree", train__global_batch_size=4),
        dict(parallel__context_parallel_size=2, data__attention_mask="document"),
        PP2 | dict(train__global_batch_size=2),
    ],
    4: [
        TP2 | dict(parallel__sequence_parallel=True, parallel__shard="weights"),
        PP2 | dict(parallel__virtual_pipeline_stages=2, parallel__shard="gradients", train__global_batch_size=16),
        PP2 | TP2 | dict(model__tie_word_embeddings=True),
    ],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_healthy_run_has_the_same_bits_twice_and_those_of_a_run_without_the_check(ranks: int, tmp_path: Path) -> None:
    configs = [tiny_config(**CHECK, train__output=str(tmp_path), **changes) for changes in LAYOUTS[ranks]]
    for config in configs:
        config.validate(ranks)
    run_distributed(ranks, same, configs)
    assert not list(tmp_path.iterdir())


DOWN, NORM = "layers.0.mlp.down.weight", "layers.1.mlp_norm.weight"
ON = f"(host {socket.gethostname()})"


def test_two_ranks_one_flip(tmp_path: Path) -> None:
    """In the gradient of either pass and in an activation, whatever is divided over the ranks."""
    checked = partial(tiny_config, **CHECK, train__output=str(tmp_path))
    dp, one = checked(), checked(parallel__shard="weights", train__global_batch_size=4)
    cases = [
        (dp, 1, "gradient", DOWN, True),
        (dp, 0, "gradient", NORM, False),
        (checked(parallel__shard="gradients"), 1, "gradient", "embedding.weight", False),
        (one, 0, "gradient", "head.weight", True),
        (dp, 1, "activation", "MLP", False),
        (checked(**PP2), 0, "activation", "MLP", True),
        (checked(**PP2), 1, "gradient", "layers.3.mlp.down.weight", True),
        (checked(parallel__context_parallel_size=2, data__attention_mask="document"), 1, "gradient", DOWN, False),
    ]  # fmt: skip
    again = "had other bits when the first micro-batch was run again"
    every = run_distributed(2, named, cases)
    assert every[0] == every[1], "all ranks raise the same"
    said = [text for text, unchanged in every[0] if unchanged]
    for text, wanted in zip(
        said,
        [
            f"the gradient of {DOWN} on rank 1",
            f"the gradient of {NORM} on rank 0",
            "the gradient of embedding.weight on rank 1",
            "the gradient of head.weight on rank 0",
            "the losses and the gradient of head.weight (and 14 more) on rank 1",
            "the hidden states and the gradient of layers.",
            "the gradient of layers.3.mlp.down.weight on rank 1",
            f"the gradient of {DOWN} on rank 1",
        ],
        strict=True,
    ):
        assert text.startswith(f"step 1: {wanted}") and f"{ON} {again}" in text, text
    assert [text.endswith("again") for text in said] == [True] * 5 + [False] + [True] * 2
    assert said[5].endswith(f"on rank 0 {ON} {again} (then on 1 more rank, which computed with it)")


def test_four_ranks_one_flip(tmp_path: Path) -> None:
    """A gradient is its rank's own; an activation has been summed over the ranks that share it before it is seen."""
    config = tiny_config(**CHECK, **TP2, parallel__sequence_parallel=True, train__output=str(tmp_path))
    cases = [(config, 3, "gradient", NORM, True), (config, 2, "activation", "MLP", True)]
    (gradient, _), (activation, unchanged) = run_distributed(4, named, cases)[0]
    assert f"{NORM} on rank 3 (host" in gradient and "then" not in gradient and unchanged
    assert f" on rank 2 {ON} and rank 3 {ON} had other bits" in activation


def _run_with_flip(rank: int, arguments: list[str]) -> str:
    with flipped("gradient" if rank == 1 else "none", DOWN, alone=False):
        try:
            return f"exit code {train_here(rank, arguments)}"
        except DriftError as error:
            return str(error)


def _run(rank: int, arguments: list[str]) -> int:
    return train_here(rank, arguments)


def test_a_run_ends_on_all_ranks_before_the_update_and_goes_on_from_a_good_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    common = "train.sdc_check_interval_steps=5", "train.num_steps=6", "schedule.decay_steps=6", "train.eval_samples=2"
    output, other = tmp_path / "run", tmp_path / "other"
    first, second = run_distributed(2, _run_with_flip, overrides(data, output, *common))
    assert first == second and first.startswith(f"error[E1102]: step 5: the gradient of {DOWN} on rank 1 (host ")
    assert "nothing was updated" in first and "take its device out of use" in first
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000003"] and len(metrics(output)) == 4
    (incident,) = (output / "incidents").iterdir()
    tree = json.loads(incident.read_text())
    assert incident.name == "step-00000005.corruption.json" and str(incident) in first
    assert (tree["step"], tree["first_ranks"], tree["ranks"][0]["differs"]) == (5, [1], [DOWN])
    assert run_distributed(2, _run, overrides(data, output, *common)) == [0, 0]
    never = overrides(data, other, *common, "train.sdc_check_interval_steps=0")
    assert run_distributed(2, _run, never) == [0, 0]
    assert metrics(output) == metrics(other) and checkpoint_bytes(output, 6) == checkpoint_bytes(other, 6)


def test_nobody_waits_for_the_device_until_the_report_is_read() -> None:
    config = tiny_config(**CHECK)
    ctx = make_context(config)
    stages, optimizer = build_stages(config, ctx)
    check = CorruptionCheck(config, stages, optimizer, ctx)
    with OperationNames() as operations:
        for one in (check.alone, check.again):
            one.output(0, torch.zeros(2, 32))
            for bucket in optimizer.store.of_stages[0].buckets:
                one.gradients(optimizer.store.of_stages[0], bucket)
        report = check.check(1)
    assert not operations.waits() and not report.found
    assert check.check(2).found, "what was not shown differs"
    due = CorruptionCheck(tiny_config(train__sdc_check_interval_steps=3), stages, optimizer, ctx).is_due
    assert [step for step in range(1, 8) if due(step)] == [3, 6]


def test_with_graphs_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded without the check, which sees what each replay leaves."""
    from tests.train import test_cuda_graph

    monkeypatch.setattr(test_cuda_graph.cpu, "COMPILED", None)
    for size in (8, 2):
        config = tiny_config(**CHECK, **test_cuda_graph.PLAIN, train__global_batch_size=size)
        found, expected = take(0, config, 2, test_cuda_graph.Recordings), take(0, config, 2)
        assert found[0] == expected[0] and all(map(torch.equal, found[1], expected[1]))


def test_what_does_not_compute_the_same_bits_twice_is_refused_by_name() -> None:
    config = tiny_config(**CHECK, train__device="cuda")
    with pytest.raises(ConfigError, match=r"E224\]: train.sdc_check_interval_steps=1 needs kernels.determin.*on a GPU"):
        config.validate(1)
    tiny_config(**CHECK, train__device="cuda", kernels__deterministic=True).validate(1)
    scaled = dict(kernels__deterministic=True, kernels__layers="te", kernels__fp8="delayed", train__precision="bf16")
    with pytest.raises(ConfigError, match=r"E224\]: train.sdc_check_interval_steps=1 is not for kernels.fp8=delayed"):
        tiny_config(**CHECK, train__device="cuda", **scaled, train__micro_batch_size=8).validate(1)
    config = tiny_config(**CHECK)
    here, device = select_backends(config.kernels, Requirements()), torch.device("cpu")
    check_here(config, here, device)
    odd = here | {"attention": dataclasses.replace(here["attention"], name="odd", deterministic=False)}
    with pytest.raises(ConfigError, match=r"E224\]: train.sdc_check_interval_steps=1 is not for kernels.attention=odd"):
        check_here(config, odd, device)
    with pytest.raises(ConfigError, match=r"E224\]: .* needs kernels.deterministic=true on a GPU"):
        check_here(config, here, torch.device("cuda"))
    check_here(tiny_config(), odd, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"E204\]: train.sdc_check_interval_steps=-1"):
        tiny_config(train__sdc_check_interval_steps=-1).train.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_no_single_bit_goes_unseen_by_the_hashes(dtype: torch.dtype) -> None:
    """Of what need not lie in one piece, on a CPU as on a device."""
    hashes = [whole_hash(torch.device("cpu"), 60), BitHash(torch.device("cpu"), 60)]
    whole = torch.arange(60).to(dtype).view(6, 10)
    for hashed in hashes:
        before, part = hashed(whole.t()), whole.clone().t()
        bits = part.t().view(torch.uint8)
        for place in range(bits.numel()):
            bits.view(-1)[place] ^= 1 << place % 8
            assert hashed(part) != before
            bits.view(-1)[place] ^= 1 << place % 8
        assert hashed(part) == before
