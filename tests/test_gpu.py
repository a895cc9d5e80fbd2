"""What only a GPU can show; every test is skipped, visibly, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.attention import BACKENDS, each_document, varlen, whole_samples
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.libraries import te
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import select, select_operations
from megatron_hammer.model.head_loss import HeadAndLoss, Objective
from megatron_hammer.model.layers import LayerOptions
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import run_rank
from megatron_hammer.train.step import train_step
from tests.kernels.one_gradient import OneGradient
from tests.model.tiny import rank_batches, tiny_config
from tests.train.runs import config_for, metrics, overrides, run, write_dataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, (name, documents) in enumerate({"a": 60, "b": 40, "x": 8, "y": 5}.items()):
        write_dataset(tmp_path / name, documents, seed)
    return tmp_path


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_a_gpu_computes_what_a_cpu_computes(precision: str, tolerance: float) -> None:
    """Ten steps; fp32 matrix products without TF32 differ in the order of sums only, the others in rounding too."""
    losses = {}
    for device in ("cpu", "cuda"):
        config = tiny_config(train__precision="fp32" if device == "cpu" else precision)
        ctx = ParallelContext.single(device)
        model, optimizer = build(config, ctx)
        losses[device] = []
        for step in range(1, 11):
            batches = [Batch(b.tokens.to(device), b.labels.to(device)) for b in rank_batches(config, step, ctx)]
            losses[device].append(float(train_step(model, optimizer, batches, config, step, ctx).loss))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)


def test_a_step_does_not_synchronise() -> None:
    """torch itself raises where the host waits for the device."""
    config = tiny_config(train__precision="bf16")
    ctx = ParallelContext.single("cuda")
    model, optimizer = build(config, ctx)
    batches = [Batch(b.tokens.cuda(), b.labels.cuda()) for b in rank_batches(config, 1, ctx)]
    train_step(model, optimizer, batches, config, 1, ctx)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(model, optimizer, batches, config, 2, ctx)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_operations(name: Literal["torch", "triton"], dtype: torch.dtype, chunk: int | None = None) -> Operations:
    kernels = KernelsConfig(loss=name, loss_chunk_tokens=chunk)
    return select_operations(kernels, Requirements(torch.device("cuda"), dtype))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_head_and_loss(backend: Literal["torch", "triton"]) -> None:
    """bf16 in 5 chunks: within 1 % of the norm of fp32, a few roundings to bf16; nobody waits for the device."""
    if backend == "triton":
        pytest.importorskip("triton")
    cuda = torch.device("cuda")
    x, labels = torch.randn(300, 2, 256, device="cuda"), torch.randint(0, 2997, (2, 300), device="cuda")
    weight, weights = torch.randn(3072, 256, device="cuda") / 8, torch.rand(2, 300, device="cuda")
    results = []
    for name, dtype in (("torch", torch.float32), (backend, torch.bfloat16)):
        options = LayerOptions(dtype, cuda, operations=loss_operations(name, dtype, 128))
        mine, head = (t.to(dtype, copy=True).requires_grad_() for t in (x, weight))
        gradient = OneGradient(head)
        for sync in ("default", "error"):  # the first round compiles
            torch.cuda.set_sync_debug_mode(sync)
            try:
                objective = Objective(weights, z_loss=1e-3)
                losses = HeadAndLoss(head, 2997, options, gradient)(mine, labels, objective)
                (losses * weights).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert mine.grad is not None and not gradient.main_grad[2997:].any()
        results.append((losses.detach(), mine.grad.float() / 2, gradient.main_grad / 2))
    for reference, found in zip(*results, strict=True):
        assert (found - reference).norm() < 1e-2 * reference.norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memory_of_head_and_loss(backend: Literal["torch", "triton"]) -> None:
    """16,384 tokens x 105,789 pieces: at most 0.5 GiB beyond weights, hidden states and gradient buffers."""
    if backend == "triton":
        pytest.importorskip("triton")
    cuda = torch.device("cuda")
    options = LayerOptions(torch.bfloat16, cuda, operations=loss_operations(backend, torch.bfloat16))
    x = torch.randn(2048, 8, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(105_856, 2048, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    labels = torch.randint(0, 105_789, (8, 2048), device="cuda")
    gradient = OneGradient(weight)
    objective = Objective(torch.ones((), device="cuda") / labels.numel())
    run = HeadAndLoss(weight, 105_789, options, gradient)
    run(x[:1], labels[:, :1], objective)  # the matrix library takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(x, labels, objective)
    assert torch.cuda.max_memory_allocated() - before <= 2**29


@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2)])
def test_varlen_equals_each_document(heads: int, groups: int) -> None:
    """Output and gradients in bf16; both round where they like, so 1 % of the norm."""
    required = Requirements(torch.device("cuda"), torch.bfloat16, "document", heads, groups, 64)
    assert select("attention", "auto", BACKENDS, required).name == "varlen"
    documents = PackedSequences.from_cu_seqlens(np.cumsum([0, 1, 300, 17, 1000, 64]).astype(np.int32), required.device)
    fused = torch.randn(1382, 1, heads + 2 * groups, 64, dtype=torch.bfloat16, device="cuda")
    inputs = [x.requires_grad_() for x in fused.split((heads, groups, groups), dim=2)]
    results = []
    for function in (varlen, each_document):
        out = function(*inputs, documents)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(-1))])
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).float().norm() < 1e-2 * reference.float().norm()


def test_no_document_leaks_on_a_gpu() -> None:
    """Other tokens in the first document: the loss of all others is the same bits, and nobody waits for the device."""
    config = tiny_config(train__precision="bf16", data__attention_mask="document")
    model, _ = build(config, ParallelContext.single("cuda"))
    tokens = torch.randint(0, 301, (2, 33), device="cuda")
    documents = PackedSequences.from_cu_seqlens(np.array([0, 10, 32, 50, 64], np.int32), torch.device("cuda"))
    other = tokens.clone()
    other[0, :10] = (other[0, :10] + 1) % 301
    model(tokens[:, :-1], tokens[:, 1:], documents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [model(t[:, :-1], tokens[:, 1:], documents).flatten() for t in (tokens, other)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(losses[0][10:], losses[1][10:]) and not torch.equal(losses[0][:10], losses[1][:10])


needs_te = pytest.mark.skipif(bool(te.unavailable()), reason=f"needs Transformer Engine: {te.unavailable()}")


@needs_te
@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2)])
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_te_attention_equals_the_reference(mask: str, heads: int, groups: int) -> None:
    """Output and gradients in bf16, 1 % of the norm, as for varlen."""
    documents = PackedSequences.from_cu_seqlens(
        np.cumsum([0, 1, 300, 17, 1000, 64]).astype(np.int32), torch.device("cuda")
    )
    given, shape = (documents, (1382, 1)) if mask == "document" else (None, (512, 2))
    fused = torch.randn(*shape, heads + 2 * groups, 64, dtype=torch.bfloat16, device="cuda")
    inputs = [x.requires_grad_() for x in fused.split((heads, groups, groups), dim=2)]
    results = []
    for function in (te.attention, each_document if given else whole_samples):
        out = function(*inputs, given)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(-1))])
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).float().norm() < 1e-2 * reference.float().norm()


@needs_te
@pytest.mark.parametrize("precision, tolerance", [("fp32", 2e-3), ("bf16", 2e-2)])
def test_te_layers_equal_the_torch_layers(precision: str, tolerance: float) -> None:
    """Names, a step's gradient as the optimizer's buffer holds it, and the losses of ten steps; TF32 is allowed for."""
    losses, gradients = {}, {}
    for layers in ("torch", "te"):
        config = tiny_config(train__precision=precision, kernels__layers=layers, model__ffn_hidden_size=192)
        ctx = ParallelContext.single("cuda")
        model, optimizer = build(config, ctx)
        losses[layers] = []
        for step in range(1, 11):
            batches = [Batch(b.tokens.cuda(), b.labels.cuda()) for b in rank_batches(config, step, ctx)]
            losses[layers].append(float(train_step(model, optimizer, batches, config, step, ctx).loss))
            if step == 1:
                gradients[layers] = {
                    row.name: gradient.main_grad.clone()
                    for row, gradient in zip(optimizer.store.table, optimizer.store.gradients, strict=True)
                }
    assert list(gradients["te"]) == list(gradients["torch"])
    for name, mine in gradients["te"].items():
        assert (mine - gradients["torch"][name]).norm() < 2 * tolerance * gradients["torch"][name].norm(), name
    assert losses["te"] == pytest.approx(losses["torch"], rel=tolerance)


@needs_te
@pytest.mark.skipif(bool(te.unavailable(fp8=True)), reason=f"needs fp8: {te.unavailable(fp8=True)}")
@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_te_fp8_learns_what_bf16_learns(fp8: str) -> None:
    """Loss parity over 100 steps of a task that is learnt in them; delayed scaling loses its first steps to scale 1."""
    losses = {}
    for how in ("off", fp8):
        config = tiny_config(
            train__precision="bf16", kernels__layers="te", kernels__fp8=how, model__ffn_hidden_size=192,
            train__num_steps=100,
        )  # fmt: skip
        ctx = ParallelContext.single("cuda")
        model, optimizer = build(config, ctx)
        losses[how] = []
        for step in range(1, 101):
            batches = [Batch(b.tokens.cuda(), b.labels.cuda()) for b in rank_batches(config, step, ctx)]
            losses[how].append(float(train_step(model, optimizer, batches, config, step, ctx).loss))
    assert losses["off"][-1] < 0.5 * losses["off"][0]
    assert np.mean(losses[fp8][-10:]) == pytest.approx(np.mean(losses["off"][-10:]), rel=0.05, abs=0.05)


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """``kernels.deterministic`` turns torch's switch for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


def test_a_run_resumes(data: Path, tmp_path: Path, torch_as_before: None) -> None:
    """Stopped after 6 steps and resumed equals straight through, on one GPU; with attention that gives equal bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bf16 = ["train.precision=bf16", "schedule.style=constant", "kernels.deterministic=true"]
    assert run_rank(config_for(overrides(data, whole, *bf16)), 0, 0, 1, None) == 0
    for steps in (6, 12):
        assert run_rank(config_for(overrides(data, parts, *bf16, f"train.num_steps={steps}")), 0, 0, 1, None) == 0
    assert [x["loss"] for x in metrics(parts)] == [x["loss"] for x in metrics(whole)]
    assert prepare(config_for(overrides(data, whole, *bf16)), 1).is_finished


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [[], ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]])
def test_two_gpus_equal_one(layout: list[str], data: Path, tmp_path: Path) -> None:
    """NCCL: DP 2 and TP 2 with sequence parallelism against one GPU, fp32."""
    for ranks, name, extra in ((1, "one", []), (2, "two", layout)):
        done = run(ranks, overrides(data, tmp_path / name, "train.precision=fp32", *extra))
        assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [x["samples_digest"] for x in two] == [x["samples_digest"] for x in one]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
