"""Recompute changes what is kept and when it is computed, and nothing else: the same bits, each operation once more."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.kernels.libraries.te import attention as te_attention
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.selection import kernel_requirements, select_backends
from megatron_hammer.model import recompute
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.model import te_double, te_sources
from tests.model.tiny import build, rank_batches, tiny_config, train
from tests.train.runs import checkpoint_bytes, metrics, overrides, train_here, write_dataset

SETTINGS = [("selective", None), ("full", None), ("full", 2)]  # of three layers


def config_of(mode: str, layers: int | None, **changes: Any) -> Config:
    """Three layers: the first, one between two, the last."""
    changes = {"model__num_layers": 3, **changes}
    config = tiny_config(train__recompute=mode, train__recompute_layers=layers, **changes)
    tp = config.parallel.tensor_model_parallel_size
    config.validate(tp)
    return config


def assert_same(one: Any, other: Any, what: str) -> None:
    """Losses, norms and weights of two trainings, bit for bit."""
    assert one[0] == other[0], f"{what}: {one[0]} {other[0]}"
    for name, tensor in one[1].items():
        assert torch.equal(tensor.nan_to_num(7.0), other[1][name].nan_to_num(7.0)), f"{what}: {name}"


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_bits(precision: str, mask: str, kernels: str) -> None:
    """Two steps of four micro-batches and their updates, from a seed of this run; an odd length."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    changes = {f"kernels__{name}": kernels for name in ("norm", "rope", "swiglu")}
    changes |= dict(train__precision=precision, data__attention_mask=mask, train__seed=seed, data__seq_length=29)
    expected = train(0, config_of("none", None, **changes), 2)
    for mode, layers in SETTINGS:
        assert_same(expected, train(0, config_of(mode, layers, **changes), 2), f"{mode} {layers} {seed}")


@pytest.mark.parametrize("tp, sp, mask", [(2, False, "causal"), (2, True, "causal"), (4, True, "document")])
def test_equal_bits_on_several_ranks(tp: int, sp: bool, mask: str) -> None:
    changes: dict[str, Any] = dict(parallel__tensor_model_parallel_size=tp, parallel__sequence_parallel=sp)
    changes |= dict(train__precision="bf16", data__attention_mask=mask)
    expected = run_distributed(tp, train, config_of("none", None, **changes), 2)
    for mode, layers in SETTINGS:
        got = run_distributed(tp, train, config_of(mode, layers, **changes), 2)
        for rank in range(tp):
            assert_same(expected[rank], got[rank], f"rank {rank}, {mode} {layers}")


def test_compiled_operations_agree() -> None:
    """Not bit for bit: compiled, x + branch is normalised before it is rounded to 16 bits, and the kept sum after.

    A bf16 rounding is 0.4 %, and one of every few normalised elements moves by one; a loss averages 64 of them.
    """
    changes: dict[str, Any] = dict(kernels__compile="operations", train__precision="bf16")
    changes |= {f"kernels__{name}": "torch" for name in ("norm", "rope", "swiglu")}
    expected = train(0, config_of("none", None, **changes), 1)[0][0]
    for mode, layers in SETTINGS:
        loss, norm, _ = train(0, config_of(mode, layers, **changes), 1)[0][0]
        assert loss == pytest.approx(expected[0], rel=1e-3) and norm == pytest.approx(expected[1], rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_bits_of_one_chain(dtype: torch.dtype) -> None:
    """Norm, attention and SwiGLU with the products that read them, on other shapes than the model's."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, branch, weight, wide, narrow = random(7, 3, 20), random(7, 3, 20), random(20), random(20, 60), random(10, 20)

    def chain(operations: Operations) -> Tensor:
        normed, summed = operations.add_rms_norm(x, branch, weight, 1e-5)
        q, k, v = (normed @ wide).view(7, 3, 6, 10).split((2, 2, 2), 2)
        out = operations.attention(q, k, v, None).flatten(2)
        normed, summed = operations.add_rms_norm(summed, out, weight, 1e-5)
        return (operations.swiglu(normed) @ narrow).sum() + summed.square().sum()

    leaves = (x, branch, weight, wide, narrow)
    expected = chain(Operations())
    gradients = torch.autograd.grad(expected, leaves)
    selective = recompute.Selective()
    with selective.region(nullcontext)():
        got = chain(selective.operations(Operations()))
    assert torch.equal(got, expected)
    for one, other in zip(torch.autograd.grad(got, leaves), gradients, strict=True):
        assert torch.equal(one, other)


class Counted:
    """The plain operations, counting their runs."""

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}

    def operations(self) -> Operations:
        """With counters."""
        plain = Operations()
        names = ("add_rms_norm", "rope", "swiglu", "attention")
        return dataclasses.replace(plain, **{name: self._counting(name, getattr(plain, name)) for name in names})

    def _counting(self, name: str, function: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            self.runs[name] = self.runs.get(name, 0) + 1
            return function(*arguments)

        return counting


def test_each_operation_runs_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """selective: not for the linear layer and again for its own backward. Evaluation: once, with nothing kept."""
    counted = Counted()
    monkeypatch.setattr("megatron_hammer.train.build.select_operations", lambda *_: counted.operations())
    ctx = ParallelContext.single()
    more = {"none": 0, "selective": 3, "full": 3}
    for mode, rope_again in (("none", 0), ("selective", 0), ("full", 3)):
        config = config_of(mode, None, train__global_batch_size=2)
        model, optimizer = build(config, ctx)
        counted.runs.clear()
        train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx)
        again = more[mode]
        norms = 7 + 2 * again  # the last norm is outside of the layers
        assert counted.runs == {
            "add_rms_norm": norms, "rope": 3 + rope_again, "swiglu": 3 + again, "attention": 3 + again
        }, mode  # fmt: skip
        counted.runs.clear()
        with torch.no_grad():
            assert not model.hidden(rank_batches(config, 1, ctx)[0].tokens).requires_grad
        assert counted.runs == {"add_rms_norm": 7, "rope": 3, "swiglu": 3, "attention": 3}


# ---- memory -----------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Every storage that any operation of a region made, by weak reference."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        """Bytes of those that still exist."""
        return sum(size for storage, size in self.seen.values() if not storage.expired())


def kept_bytes(config: Config) -> int:
    """What exists after a forward because backward will want it, without the garbage collector's help."""
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    tokens = rank_batches(config, 1, ctx)[0].tokens
    known = [tokens, optimizer.store.grads, *model.parameters(), *model.rope(tokens.shape[1])]
    gc.disable()
    try:
        with Alive(known) as alive:
            hidden = model.hidden(tokens)
        assert hidden.requires_grad
        return alive.alive()
    finally:
        gc.enable()


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_bytes_are_those_of_the_formula(precision: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, for what one layer more keeps; embedding and last norm cancel."""
    monkeypatch.setattr(cpu, "LARGE_BYTES", 2**40)  # no block has room for an alignment of ours
    changes = {f"kernels__{name}": kernels for name in ("norm", "rope", "swiglu")}
    changes |= dict(train__precision=precision, train__global_batch_size=2, train__micro_batch_size=2)
    # Rows enough for torch's 16-bit attention on a CPU (FP32_ELEMENTS_ON_CPU).
    changes |= dict(model__hidden_size=128, model__num_attention_heads=2, model__num_query_groups=1)
    changes |= dict(data__seq_length=200)
    for mode, layers in (("none", None), ("selective", None), ("full", None), ("full", 1)):
        more, less = (config_of(mode, layers, **changes, model__num_layers=n) for n in (3, 2))
        rows = select_backends(more.kernels, kernel_requirements(more, torch.device("cpu")))
        expected = recompute.activation_bytes(more, rows) - recompute.activation_bytes(less, rows)
        assert kept_bytes(more) - kept_bytes(less) == expected, (mode, layers)


def test_bytes_of_the_target_model() -> None:
    """The counts of performance.md (58.0 KiB a token and layer; 4 with full), and 35: it keeps attention's output."""
    statistics = 4 * (2 + 32)  # fp32: two norms, 32 heads
    kib = {"none": 58.0 * 1024 + statistics, "selective": 35.0 * 1024, "full": 4.0 * 1024}
    sizes = dict(hidden_size=2048, ffn_hidden_size=5632, num_layers=22, num_attention_heads=32, num_query_groups=4)
    changes = {f"model__{name}": size for name, size in sizes.items()} | {"train__precision": "bf16"}
    for mode, each in kib.items():
        config = config_of(mode, None, **changes, train__micro_batch_size=8, data__seq_length=2048)
        assert recompute.activation_bytes(config, {}) == each * 22 * 16384
    for changed in ({"parallel__sequence_parallel": False}, {"parallel__sequence_parallel": True}):
        whole = config_of("none", None, **changes, **changed, parallel__tensor_model_parallel_size=2)
        rows = whole.train.micro_batch_size * whole.data.seq_length * 22
        # Sums and normed rows, and their statistics; the heads' are 4 x 16.
        shared = (16 * 1024 + 4 * 2) / (2 if whole.parallel.sequence_parallel else 1)
        assert recompute.activation_bytes(whole, {}) == rows * (shared + 42 * 1024 / 2 + 4 * 16)


def test_recompute_does_not_import_the_compiler() -> None:
    """It takes 140 MB, at the quick start's size more than recompute saves; ``torch.utils.checkpoint`` brings it."""
    code = (
        "import sys; from tests.model.tiny import tiny_config, train\n"
        "for mode in ('full', 'selective'): train(0, tiny_config(train__recompute=mode), 1)\n"
        "print([name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_a_mark_is_not_taken_for_another_tensor() -> None:
    """Marks hold the address of a storage that is gone; one that was written over is saved itself."""
    selective = recompute.Selective()
    operations = selective.operations(Operations())
    gate_up = torch.randn(5, 6, requires_grad=True)
    with selective.region(nullcontext)():
        marks = selective.marks
        assert marks is not None
        for _ in range(50):
            operations.swiglu(gate_up)  # freed at once
            other = torch.randn(5, 3)
            assert selective._pack(other).data_ptr() == other.data_ptr()
        product = operations.swiglu(gate_up)
        assert isinstance(selective._pack(product), recompute._Note)
        assert isinstance(selective._pack(product.t()[1:]), recompute._Note)
        assert torch.equal(recompute._unpack(selective._pack(product.t()[1:])), product.t()[1:])
        with torch.no_grad():
            product.mul_(2)
        assert torch.equal(selective._pack(product), product)
        assert len(marks) == 51 and sum(mark.storage.expired() for mark in marks.values()) == 50
    assert selective.marks is None


def test_backward_can_run_twice() -> None:
    """With the graph retained, the operation runs once more for each."""
    selective = recompute.Selective()
    operations = selective.operations(Operations())
    gate_up, weight = torch.randn(4, 6, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    with selective.region(nullcontext)():
        out = (operations.swiglu(gate_up) @ weight).sum()
    expected = torch.autograd.grad((Operations().swiglu(gate_up) @ weight).sum(), (gate_up, weight))
    for retain in (True, False):
        for got, wanted in zip(torch.autograd.grad(out, (gate_up, weight), retain_graph=retain), expected, strict=True):
            assert torch.equal(got, wanted)


# ---- Transformer Engine, errors, whole runs ---------------------------------------------------------------------


def _on_the_double(rank: int, config: Config) -> Any:
    with te_double.installed() as events, pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hammer.train.build.select_operations", lambda *_: Operations(attention=te_attention))
        trained = train(rank, config, 2)
        return *trained, [e["fp8"] for e in events if e["event"] == "linear"]


@pytest.mark.parametrize("fp8", ["off", "current", "delayed"])
@pytest.mark.parametrize("tp", [1, 2])
def test_equal_bits_on_transformer_engine_layers(tp: int, fp8: str) -> None:
    """On the double; a layer that runs again does so in fp8 where the first time was."""
    changes: dict[str, Any] = dict(kernels__layers="te", kernels__fp8=fp8, model__ffn_hidden_size=192)
    changes |= dict(parallel__tensor_model_parallel_size=tp, parallel__sequence_parallel=tp > 1)
    changes |= dict(train__precision="fp32" if fp8 == "off" else "bf16")
    results = {
        (mode, layers): run_distributed(tp, _on_the_double, config_of(mode, layers, **changes))
        if tp > 1
        else [_on_the_double(0, config_of(mode, layers, **changes))]
        for mode, layers in [("none", None), *SETTINGS]
    }
    for setting, got in results.items():
        for rank in range(tp):
            assert_same(results["none", None][rank], got[rank], f"rank {rank}, {setting}")
            assert set(got[rank][2]) == {fp8 != "off"}, setting
    assert len(results["full", None][0][2]) > len(results["none", None][0][2]), "layers must have run again"


@pytest.mark.parametrize("fp8", ["off", "current", "delayed"])
def test_equal_bits_on_the_library_itself(fp8: str, sources: Path) -> None:
    """Its Linear, RMSNorm, fp8 and checkpoint, from its sources, over a stub of its kernels."""
    # In a process of the pool: this one may have imported what the sources must not find (pydantic, by way of Ray).
    [(expected, *results)] = run_distributed(1, _on_sources, sources, fp8)
    for setting, found in zip(SETTINGS, results, strict=True):
        assert_same(expected, found, f"{setting}")


def _kept_on_sources(rank: int, root: Path, mode: str) -> tuple[int, int]:
    """What one layer more keeps with the library's own norm and linear layers, and what the formula says."""
    sizes = dict(model__hidden_size=128, model__num_attention_heads=2, model__num_query_groups=1, data__seq_length=200)
    changes: dict[str, Any] = dict(kernels__layers="te", train__precision="bf16", train__global_batch_size=2, **sizes)
    with te_sources.imported(root):
        more, less = (config_of(mode, None, **changes, model__num_layers=n) for n in (3, 2))
        rows = select_backends(more.kernels, kernel_requirements(more, torch.device("cpu")))
        said = recompute.activation_bytes(more, rows) - recompute.activation_bytes(less, rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "LARGE_BYTES", 2**40)
            return kept_bytes(more) - kept_bytes(less), said


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_the_library_s_norms_are_made_again(mode: str, sources: Path) -> None:
    """Its linear layers save what they are given, so a note can stand for it; its norm keeps nothing that lasts."""
    [(kept, said)] = run_distributed(1, _kept_on_sources, sources, mode)
    assert kept == said


def _on_sources(rank: int, root: Path, fp8: str) -> list[Any]:
    """A short run of each setting, the one without recompute first."""
    changes: dict[str, Any] = dict(kernels__layers="te", kernels__fp8=fp8, model__ffn_hidden_size=192)
    changes |= dict(train__precision="bf16")
    with te_sources.imported(root) as te, pytest.MonkeyPatch.context() as patch:
        for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):  # of a GPU, whose numbers no layer draws
            patch.setattr(te.distributed, name, lambda *_, **__: None)
        return [train(rank, config_of(mode, layers, **changes), 3) for mode, layers in (("none", None), *SETTINGS)]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train__recompute="none", train__recompute_layers=1), r"E214\].*recompute_layers=1.*recompute=none"),
        (dict(train__recompute="selective", train__recompute_layers=1), "recompute_layers=1.*recompute=selective"),
        (dict(train__recompute="full", train__recompute_layers=3), "recompute_layers=3.*num_layers=2"),
        (dict(train__recompute="full", train__recompute_layers=0), "recompute_layers=0.*at least 1"),
    ],
)
def test_misuse_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes).validate(1)


def test_a_resumed_run_may_change_the_setting(tmp_path: Path) -> None:
    for seed, name in enumerate("abxy"):
        write_dataset(tmp_path / name, 12, seed)
    same = ("schedule.style=constant", "checkpoint.save_interval_steps=2")
    assert train_here(0, overrides(tmp_path, tmp_path / "whole", *same, "train.num_steps=6")) == 0
    for steps, *setting in ((2, "none"), (4, "selective"), (6, "full", "train.recompute_layers=1")):
        arguments = [f"train.num_steps={steps}", f"train.recompute={setting[0]}", *setting[1:]]
        assert train_here(0, overrides(tmp_path, tmp_path / "parts", *same, *arguments)) == 0
    assert checkpoint_bytes(tmp_path / "parts", 6) == checkpoint_bytes(tmp_path / "whole", 6)
    assert [x["loss"] for x in metrics(tmp_path / "parts")] == [x["loss"] for x in metrics(tmp_path / "whole")]
