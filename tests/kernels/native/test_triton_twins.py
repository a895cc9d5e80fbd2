"""The Triton twins of our CUDA kernels where there is no GPU: what they compute, in Triton's interpreter, and that they
compile for one. Skipped, visibly, where triton is not installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.native import adamw_triton, cuda, layers_triton, triton_rows
from megatron_hammer.kernels.selection import TABLES, select, select_backends
from tests.kernels.triton_here import needs_interpreter, needs_triton

GPU = Requirements(torch.device("cuda", 0), torch.bfloat16, heads=32, groups=4)
TWINS = ("norm", "rope", "swiglu", "adamw")


def child(program: str, **environment: str) -> str:
    """Triton decides when a kernel is defined whether it interprets it: so in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


INTERPRETED = """
import itertools
from types import SimpleNamespace
import numpy as np, torch
from triton import language as tl
from triton.runtime import interpreter
from megatron_hammer.kernels.native import adamw_triton, layers_triton
from tests.kernels import cuda_checks as checks

convert = interpreter.InterpreterBuilder.cast_impl

def rounding(self, src, dst_type):  # a GPU rounds to the nearest bf16; the interpreter cuts off
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return convert(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32)
    return interpreter.TensorHandle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)

interpreter.InterpreterBuilder.cast_impl = rounding

def measured(function, result, count):  # the checks ask for the largest value too, which the twins do not offer
    def call(*arguments):
        function(*arguments[:count])
        if len(arguments) > count:
            arguments[count].copy_(checks.largest(arguments[result]))
    return call

k = SimpleNamespace(**vars(layers_triton), adamw=adamw_triton.adamw, add_square_sum=adamw_triton.add_square_sum)
k.add_rms_norm_forward = measured(layers_triton.add_rms_norm_forward, 4, 7)
k.swiglu_forward = measured(layers_triton.swiglu_forward, 1, 2)
layers_triton.COLUMNS, layers_triton.PAIRS, adamw_triton.ELEMENTS = 64, 16, 128  # small arrays, several blocks
cpu, seed, cases = torch.device("cpu"), torch.seed() % 2**31, 0
print("seed", seed)
for dtype in checks.DTYPES:
    for rows, h, updated, offset in ((3, 64, True, 0), (6, 40, False, 0), (5, 7, True, 1), (2, 1, False, 0)):
        checks.norm(k, cpu, dtype, rows, h, updated, offset, seed)
    for s, b, heads, groups, d, offset in ((3, 2, 4, 2, 16, 0), (2, 1, 7, 1, 6, 0), (2, 2, 2, 2, 2, 1)):
        checks.rope_forward(k, cpu, dtype, s, b, heads, groups, d, offset, seed)
        for layout in ("transposed", "expanded", "parts"):
            checks.rope_backward(k, cpu, dtype, s, b, heads, groups, d, offset, layout, seed)
    for rows, f, offset in ((1, 8, 0), (3, 150, 0), (3, 7, 1), (2, 1, 0)):
        checks.swiglu_both(k, cpu, dtype, rows, f, offset, seed)
    checks.through_autograd(k, cpu, dtype, seed)
for dtype, n in itertools.product((None, torch.bfloat16, torch.float16), (0, 3, 1030, 5011)):
    checks.adamw(k, cpu, dtype, n, (0, 1, 2, 3, 1), seed)
for n in (0, 1, 130, 5011):
    checks.square_sum(k, cpu, n, 1, seed)
nothing, w, grad = torch.empty(0, 8), torch.ones(8), torch.ones(8)
k.add_rms_norm_forward(nothing, None, w, 1e-5, nothing.clone(), None, torch.empty(0))
k.add_rms_norm_backward(nothing, None, nothing, w, torch.empty(0), nothing.clone(), grad)
assert not grad.any()
print("as the reference")
"""


@needs_interpreter
def test_the_twins_compute_what_the_cuda_kernels_do() -> None:
    """The checks of ``csrc/kernels`` in Triton's interpreter: odd shapes, addresses, strides, empty arrays, and that
    nothing outside of the results is written."""
    assert child(INTERPRETED, TRITON_INTERPRET="1", PYTHONPATH=str(Path.cwd())).endswith("as the reference\n")


COMPILED = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_hammer.kernels.native import adamw_triton as optimizer, layers_triton as layers

BLOCK = 2048
half = dict.fromkeys(("x", "branch", "weight", "normed", "summed", "grad_normed", "grad_summed", "grad_x", "qkv",
                      "cos", "sin", "grad_q", "grad_k", "grad_v", "grad_qkv", "gate_up", "product", "grad",
                      "grad_gate_up", "param"), "*bf16")
real = dict.fromkeys(("eps", "inverse_h", "lr", "one_minus_beta1", "beta2", "one_minus_beta2", "decay"), "fp32")

def build(kernel, capability, warps, **fixed):
    names, of_fp32 = kernel.arg_names, kernel.__name__ in ("adamw_elements", "sum_squares", "add_partial_sums")
    kinds = {}
    for name in names:
        if name in fixed:
            kinds[name] = "constexpr"
        elif name in real:
            kinds[name] = "fp32"
        elif name in half and not (of_fp32 and name == "grad"):
            kinds[name] = half[name]
        elif name in ("rstd", "partial", "part", "master", "grad", "exp_avg", "exp_avg_sq", "divisor", "skip",
                      "updates", "out"):
            kinds[name] = "*fp32"
        else:
            kinds[name] = "i32"
    even = [n for n, kind in kinds.items() if kind[0] == "*" or n in
            ("h", "f", "half", "n", "q_s", "q_b", "q_h", "k_s", "k_b", "k_h", "v_s", "v_b", "v_h")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(kernel, kinds, constexprs=fixed, attrs=attrs)
    done = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    ptx = done.asm["ptx"]
    assert len(done.asm["cubin"]) > 0 and ".local" not in ptx, "nothing spills"
    return set(re.findall(r"(?:ld|st)\\.global(?:\\.[a-z:_0-9]+)*?\\.(v4\\.b32|v2\\.b32|b16|b32)", ptx))

count = 0
for capability in (80, 90):
    wide, warps = {"v4.b32"}, layers._warps(BLOCK)
    for also in (True, False):
        found = build(layers.norm_forward, capability, warps, HAS_BRANCH=also, BLOCK=BLOCK)
        assert found == wide | {"b32"}, found  # b32: rstd
        found = build(layers.norm_backward, capability, warps, HAS_SUMMED=also, BLOCK=BLOCK)
        assert found == wide | {"b32"}, found
    for kernel in (layers.rope_row, layers.rope_row_backward):
        found = build(kernel, capability, 2, HEADS=16, PLACES=32)
        assert found == wide, (kernel.__name__, found)
    for kernel in (layers.swiglu_row, layers.swiglu_row_backward):
        found = build(kernel, capability, 4, BLOCK=layers.COLUMNS)
        assert found == wide, (kernel.__name__, found)
    for also in (True, False):
        found = build(optimizer.adamw_elements, capability, 4, LOG_BETA1=-0.1, LOG_BETA2=-0.05, HAS_PARAM=also,
                      ELEMENTS=optimizer.ELEMENTS, TIMES=optimizer.TIMES)
        assert found - {"b32", "v2.b32"} == wide, found  # two words are four 16-bit copies
    assert wide <= build(optimizer.sum_squares, capability, 4, BLOCK=optimizer.ELEMENTS)
    build(optimizer.add_partial_sums, capability, 8, BLOCK=optimizer.SUMS)
    count += 12
print(count, "kernels")
"""


@needs_triton
def test_the_twins_compile_for_gpus(tmp_path: Path) -> None:
    """At the sizes of training: 16 bytes an access wherever addresses allow it, and no spills."""
    assert child(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").strip() == "24 kernels"


@needs_triton
def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU: for tensors on another one that one becomes current, for this call."""
    from megatron_hammer.kernels.argument_types import Columns
    from megatron_hammer.kernels.native import linear_cross_entropy_triton as loss

    of: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: (of.append(tensor), nullcontext())[1])
    none, row, two = torch.empty(0), torch.empty(0, 4), torch.empty(0, 8)
    heads = torch.empty(0, 1, 3, 4)
    adamw_triton.adamw(none, none, none, none, None, 0.1, 0.9, 0.95, 1e-8, 0.1, none, none, none)
    adamw_triton.add_square_sum(none, torch.empty(()))
    layers_triton.add_rms_norm_forward(row, None, torch.ones(4), 1e-5, row, None, none)
    layers_triton.add_rms_norm_backward(row, None, row, torch.ones(4), none, row, torch.ones(4))
    layers_triton.rope_forward(heads, none, none, 1)
    layers_triton.rope_backward(heads[:, :, :1], heads[:, :, :1], heads[:, :, :1], none, none, heads)
    layers_triton.swiglu_forward(two, row)
    layers_triton.swiglu_backward(row, two, two)
    loss.row_statistics(row, torch.empty(0, dtype=torch.int64), Columns.of(0, 4, 4))
    assert len(of) == 9 and of[0] is none and of[2] is row


def test_the_twins_are_taken_where_nvcc_did_not_build_ours(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA torch without nvcc: not eager torch. With our kernels: those."""

    def chosen() -> set[str]:
        return {select_backends(KernelsConfig(), GPU)[operation].name for operation in TWINS}

    assert chosen() == {"torch"}
    monkeypatch.setattr(triton_rows, "_missing", lambda: "")
    assert chosen() == {"triton"}
    monkeypatch.setattr(cuda, "unavailable", lambda device: "")
    assert chosen() == {"fused"}
    with pytest.raises(ConfigError, match=r"E209.*kernels.norm=triton is not for kernels.compile=layers"):
        select("norm", "triton", TABLES["norm"], replace(GPU, compile="layers"))
    with pytest.raises(ConfigError, match=r"E209.*kernels.rope=triton does not run on cpu"):
        select("rope", "triton", TABLES["rope"], Requirements())


def test_what_triton_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, a C compiler for its launcher, Python's headers; for the loss's row too."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(triton_rows.importlib.util, "find_spec", lambda name: None)
    assert triton_rows.unavailable(device) == "the package triton is not installed"
    monkeypatch.setattr(triton_rows.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_rows.shutil, "which", lambda name: None)
    assert "C compiler" in triton_rows.unavailable(device)
    for operation in (*TWINS, "loss"):
        with pytest.raises(ConfigError, match=rf"E209.*kernels.{operation}=triton cannot run here .*C compiler"):
            select(operation, "triton", TABLES[operation], GPU)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(triton_rows.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "/nowhere/Python.h" in triton_rows.unavailable(device)


def test_the_files_name_no_function_that_the_tables_lack() -> None:
    """Names and order of arguments are those of the compiled libraries."""
    from megatron_hammer.kernels.native.autograd import LayerKernels

    for name in (n for n in vars(LayerKernels) if re.fullmatch(r"[a-z_]+_(forward|backward)", n)):
        ours = vars(layers_triton)[name].__annotations__
        assert ours == {k: v for k, v in vars(LayerKernels)[name].__annotations__.items() if k != "self"}, name
    assert list(adamw_triton.adamw.__annotations__)[:5] == ["master", "grad", "exp_avg", "exp_avg_sq", "param"]
