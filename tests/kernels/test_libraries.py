"""Backends from other packages: what we call exists in them, and our side of the call means the reference.

By syntax tree against the published wheels of liger-kernel and flash-attn-4; Liger's Triton kernels themselves in
Triton's interpreter; flash-attn, apex and Transformer Engine by doubles written after their documentation. On a GPU
``test_rows.py`` runs whatever is installed there.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels import adamw, norm
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.argument_types import AdamWState
from megatron_hammer.kernels.attention import BACKENDS, each_document, whole_samples
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.libraries import apex, flash, liger, te
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import select
from tests.kernels.spans import spans
from tests.model import te_double
from tests.wheels import sources_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LIGER, FLASH_4 = ("liger-kernel", "0.8.5", "liger"), ("flash-attn-4", "4.0.0b36", "flash-attn-4")


def _definition(file: Path, name: str) -> Any:
    return next(
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if getattr(node, "name", None) == name
    )


def _arguments(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


# ---- liger-kernel -----------------------------------------------------------------------------------------------


def test_liger_has_what_we_use() -> None:
    """Each function stands in liger_kernel.ops, and its forward takes our arguments in our order after ctx."""
    ops = sources_of(*LIGER) / "liger_kernel" / "ops"
    files = {alias.name: node.module for node in ast.walk(ast.parse((ops / "__init__.py").read_text()))
             if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    for name, ours in liger.USED.items():
        definition = _definition(ops / f"{str(files[name]).rpartition('.')[2]}.py", name)
        forward = next(f for f in definition.body if getattr(f, "name", "") == "forward")
        assert _arguments(forward)[1 : len(ours) + 1] == list(ours), name
    used = {node.func.value.id: len(node.args) for node in ast.walk(ast.parse(Path(liger.__file__).read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Function.apply")
            and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)}  # fmt: skip
    assert used.keys() == liger.USED.keys()
    assert all(count == len(liger.USED[name]) or name == "LigerRopeFunction" for name, count in used.items())


INTERPRETED = """
import importlib, torch
from triton import language as tl
from triton.runtime import interpreter
from megatron_hammer.kernels.libraries import liger
from megatron_hammer.kernels import norm, rope, swiglu

class Number(float):  # on a GPU a kernel's number is a tensor; in the interpreter it stays what it was
    def to(self, dtype):
        return self

convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda x: Number(x) if isinstance(x, float) else convert(x)
# libdevice, from which the norms take rsqrt, is NVIDIA's own and empty here.
for module in ("rms_norm", "fused_add_rms_norm"):
    importlib.import_module(f"liger_kernel.ops.{module}").rsqrt = lambda x: 1.0 / tl.sqrt(x)

def gradients(function, leaves, *rest):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(*leaves, *rest)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = [(x.detach() + 0.3).cos() for x in outs]
    return [x.detach() for x in outs] + list(torch.autograd.grad(outs, leaves, [g.clone() for g in grads]))

def close(case, mine, reference):
    for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (case, i, a.shape, b.shape)
        assert (a - b).norm() <= 2e-6 * b.norm(), (case, i, float((a - b).norm() / b.norm()))

print("seed", torch.seed())
for s, b, h in ((5, 3, 40), (1, 1, 64)):
    x, branch, weight = torch.randn(s, b, h), torch.randn(s, b, h), torch.rand(h) + 0.5
    close("norm", *(gradients(f, [x, branch, weight], 1e-5) for f in (liger.add_rms_norm, norm.add_rms_norm)))
    first = [lambda x, w, f=f: f(x, None, w, 1e-5) for f in (liger.add_rms_norm, norm.add_rms_norm)]
    close("norm alone", *(gradients(f, [x, weight]) for f in first))
    close("swiglu", *(gradients(f, [torch.cat((x, branch), -1)]) for f in (liger.swiglu, swiglu.swiglu)))
for s, b, n, g, d in ((7, 3, 5, 2, 12), (4, 1, 4, 1, 16), (1, 1, 2, 2, 8)):
    angles = torch.randn(s, 1, 1, d // 2)
    arguments = ([torch.randn(s, b, n + 2 * g, d)], angles.cos(), angles.sin(), n, g)
    close("rope", *(gradients(f, *arguments) for f in (liger.rope, rope.rope)))
print("as the reference")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_liger_computes_what_the_reference_does() -> None:
    """Its own kernels, in fp32 in Triton's interpreter: outputs and gradients, odd shapes; 2e-6: sums of 64 numbers."""
    path = os.pathsep.join([str(sources_of(*LIGER)), str(Path.cwd())])
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path})  # fmt: skip
    assert done.stdout.endswith("as the reference\n"), done.stdout + done.stderr[-3000:]


# ---- flash-attn -------------------------------------------------------------------------------------------------


def test_flash_attn_4_has_what_we_use() -> None:
    """Arguments of both functions, two results, and the limits that its sources state."""
    cute = sources_of(*FLASH_4) / "flash_attn" / "cute"
    text = (cute / "interface.py").read_text(encoding="utf-8")
    for name, used in (("flash_attn_func", flash.WHOLE), ("flash_attn_varlen_func", flash.PACKED)):
        assert set(used) <= set(_arguments(_definition(cute / "interface.py", name))), name
        assert name in (cute / "__init__.py").read_text(encoding="utf-8")
    for line in (
        "is_standard_range = 8 <= head_dim <= 128 and 8 <= head_dim_v <= 128",
        "is_sm90_range = 8 <= head_dim <= 256 and 8 <= head_dim_v <= 256",
        'assert arch // 10 in [9, 10, 11, 12], "Unsupported compute capability. Supported: 9.x, 10.x, 11.x, 12.x"',
        'assert deterministic is False, "deterministic backward not supported on SM 12.0"',
        "return out, lse",
    ):
        assert line in text, line


class FlashDouble:
    """Either function after the documentation of flash-attn: [b, s, heads, d], or [b s, heads, d] and lengths."""

    def __init__(self, pair: bool, inputs: set[int]) -> None:
        self.pair, self.inputs, self.asked = pair, inputs, list[bool]()

    def flash_attn_func(self, *, q: Tensor, k: Tensor, v: Tensor, causal: bool, deterministic: bool) -> Any:
        assert causal and all(x.stride(-1) == 1 and x.data_ptr() in self.inputs for x in (q, k, v)), "no copy is made"
        self.asked.append(deterministic)
        out = whole_samples(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1).contiguous()
        return (out, None) if self.pair else out

    def flash_attn_varlen_func(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        deterministic: bool,
    ) -> Any:
        assert causal and q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
        self.asked.append(deterministic)
        lengths = spans([*zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)])
        out = each_document(*(x.unsqueeze(1) for x in (q, k, v)), lengths).squeeze(1)
        return (out, None) if self.pair else out  # fmt: skip


@pytest.mark.parametrize("pair", [False, True])
def test_flash_attn_means_the_reference(pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = PackedSequences.from_cu_seqlens(np.array([0, 5, 6, 21], np.int32), CPU)
    for shape, given in (((9, 2), None), ((21, 1), documents), ((21, 1), spans([(5, 2 * 5), (1, 1), (3, 10)]))):
        parts = torch.randn(*shape, 12, 8, dtype=torch.float64).split((8, 2, 2), dim=2)
        q, k, v = (x.requires_grad_() for x in parts)
        q = q if given is None else q[: sum(given.lengths)].detach().requires_grad_()
        double, results = FlashDouble(pair, {x.data_ptr() for x in (q, k, v)}), []
        for function in (partial(flash.attention, double), each_document if given else whole_samples):
            out = function(q, k, v, given)
            results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out).cumsum(-1))))
        for mine, reference in zip(*results, strict=True):
            torch.testing.assert_close(mine, reference)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        flash.attention(double, q, k, v, given)
        assert double.asked == [False, True]
        monkeypatch.undo()


def test_flash_attn_is_looked_for_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    """A folder flash_attn alone may be version 2 or 4; chips and heads are those of each version; none is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["flash-attn", "flash-attn-3", "flash-attn-4"]
    required = Requirements(CUDA, torch.bfloat16, heads=8, groups=2)

    def able() -> list[str]:
        importlib.invalidate_caches()
        return [row.name for row in BACKENDS if row.name in names and not row.unusable(required)]

    assert able() == []
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("raise ImportError")
    assert able() == []
    with pytest.raises(ConfigError, match=r"flash-attn-4 needs the package nvidia-cutlass-dsl"):
        select("attention", "flash-attn-4", BACKENDS, required)
    for module in ("cutlass", "flash_attn_2_cuda", "flash_attn_interface"):
        (tmp_path / f"{module}.py").write_text("raise ImportError")
    assert able() == names and not {"cutlass", "flash_attn"} & set(sys.modules)
    for capability, expected in (((8, 0), names[:1]), ((10, 0), names[::2]), ((12, 0), names[:1]), ((7, 5), [])):
        gpu(capability)
        assert able() == expected
    for capability, size, expected in (((10, 0), 192, names[:1]), ((9, 0), 192, names), ((9, 0), 20, [])):
        gpu(capability)
        required = Requirements(CUDA, torch.bfloat16, head_size=size)
        assert able() == expected


# ---- apex -------------------------------------------------------------------------------------------------------


def _adam(chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: Tensor, beta1: float, beta2: float, epsilon: float,
          step: Tensor, mode: int, bias_correction: int, weight_decay: float, inv_scale: Tensor) -> None:  # fmt: skip
    """csrc/multi_tensor_adam.cu, capturable: g, p, m, v of one type; everything that changes is on the device."""
    assert noop.dtype == step.dtype == torch.int32 and lr.dtype == inv_scale.dtype == torch.float32
    assert all(t.shape == (1,) for t in (noop, step, lr, inv_scale)) and (mode, bias_correction) == (1, 1)
    if int(noop) == 1:
        return
    for g, p, m, v in zip(*lists, strict=True):
        assert g.dtype == p.dtype == m.dtype == v.dtype and g.is_contiguous()
        g.mul_(inv_scale)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2 ** int(step))).sqrt_() + epsilon
        p.sub_(lr * (m / (1 - beta1 ** int(step)) / root + weight_decay * p))


def _l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, Tensor]:
    assert noop.dtype == torch.int32 and not per_tensor
    return torch.stack([t.norm() for t in lists[0]]).norm().view(1), torch.empty(0)


@pytest.fixture
def apex_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's apex as far as we call it."""

    def fused_rms_norm_affine(input: Tensor, weight: Tensor, normalized_shape: tuple[int], eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)

    parts: dict[str, dict[str, Any]] = {
        "apex": {},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": fused_rms_norm_affine},
        "apex.multi_tensor_apply": {
            "multi_tensor_applier": lambda op, noop, lists, *rest: op(65536, noop, lists, *rest)
        },
        "amp_C": {"multi_tensor_adam_capturable": _adam, "multi_tensor_l2norm": _l2norm},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_apex_updates_as_the_reference(skip: float, apex_double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several states with and without decay, pieces, a divisor, the 16-bit copy; a skip changes nothing at all."""
    monkeypatch.setattr(apex, "LARGEST_PIECE", 100)
    config = OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1)
    fast = next(row for row in adamw.BACKENDS if row.name == "apex").load(CPU)
    made = [[torch.randn(n), torch.randn(n), torch.randn(n) / 9, torch.rand(n) / 9] for n in (130, 7, 300)]
    results = []
    for kernels in (OptimizerKernels(), fast):
        states = [AdamWState(*(t.clone() for t in tensors), decay=i != 1, param=torch.zeros(len(tensors[0])).bfloat16())
                  for i, tensors in enumerate(made)]  # fmt: skip
        before = [t.clone() for s in states for t in (s.weight, s.exp_avg, s.exp_avg_sq)]
        updates, squares = torch.tensor(4.0), torch.tensor(2.5)
        divisor = torch.tensor(torch.inf if skip else 3.0)
        kernels.add_square_sum(states[2].grad, squares)
        kernels.update(states, updates, 1e-2, config, divisor, torch.tensor(skip))
        after = [t for s in states for t in (s.weight, s.exp_avg, s.exp_avg_sq)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == bool(skip)
        assert all(torch.equal(s.param, s.weight.bfloat16()) for s in states if s.param is not None)
        results.append([*after, updates, squares])
    for reference, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-6, atol=1e-7)  # a few roundings of fp32, in another order
    assert float(results[1][-2]) == 4 + (1 - skip)


def test_apex_and_te_norms_are_the_reference(apex_double: None) -> None:
    """Values and gradients with and without a branch, also for a weight that is no parameter."""
    x, branch = torch.randn(5, 3, 16, requires_grad=True), torch.randn(5, 3, 16, requires_grad=True)
    parameter = torch.nn.Parameter(torch.rand(16) + 0.5)
    with te_double.installed():
        for other, weight in ((branch, parameter), (None, parameter), (None, parameter.view_as(parameter))):
            leaves = [t for t in (x, other, weight) if t is not None]
            results = []
            for function in (norm.add_rms_norm, apex.add_rms_norm, te.add_rms_norm, te.add_rms_norm):
                out = function(x, other, weight, 1e-5)
                assert other is not None or out[1] is x
                grads = torch.autograd.grad(out, leaves, [t.detach().cos() for t in out])
                results.append([*(t.detach() for t in out), *grads])
            for found in results[1:]:
                for mine, reference in zip(found, results[0], strict=True):
                    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_another_apex_is_told_from_nvidia_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyPI the name belongs to another project; and NVIDIA's may be built without its extensions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    tables = {"norm": norm.BACKENDS, "adamw": adamw.BACKENDS}

    def refused(operation: str) -> str:
        importlib.invalidate_caches()
        with pytest.raises(ConfigError) as caught:
            select(operation, "apex", tables[operation], Requirements(CUDA, torch.bfloat16))
        return str(caught.value)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for operation, extension in (("norm", "fused_layer_norm_cuda"), ("adamw", "amp_C")):
        assert "NVIDIA's apex is not installed" in refused(operation)
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('pyramid')")
        assert "the installed package apex is not NVIDIA's: it has no apex.optimizers" in refused(operation)
        (tmp_path / "apex" / "optimizers").mkdir()
        assert f"NVIDIA's apex was built without its extension {extension}" in refused(operation)
        (tmp_path / f"{extension}.py").write_text("raise ImportError")
        importlib.invalidate_caches()
        required = Requirements(CUDA, torch.bfloat16)
        assert select(operation, "apex", tables[operation], required).name == "apex" and "apex" not in sys.modules
        (tmp_path / "apex" / "optimizers").rmdir()
        (tmp_path / "apex" / "__init__.py").unlink()
        (tmp_path / "apex").rmdir()


def test_transformer_engine_is_asked_for_by_its_norm_too() -> None:
    config: Any = SimpleNamespace(kernels=SimpleNamespace(layers="torch", attention="auto", norm="te", fp8="off"))
    with pytest.raises(ConfigError, match=r"E212.*kernels\.norm=te needs Transformer Engine.*use kernels\.norm=auto"):
        te.check_here(config)
