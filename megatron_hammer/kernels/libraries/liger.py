"""Norm, RoPE and SwiGLU by liger-kernel (arXiv 2410.10989), behind our signatures; used only where a config names it.

Two of its operations meet our layouts as they are: the norm takes any [.., h] and adds the residual itself, SwiGLU has
a form for gate and up in one tensor. RoPE wants queries and keys apart, [b, heads, s, d], turns them in place in
[b, s, heads, d], and tables of all d columns; with [s, b] read as one dimension of rows, each with a row of the table,
what it needs of us is one copy of queries and keys. Its backward may write over the gradients that it is given.

``USED`` states every name and argument, as in the sources of liger-kernel 0.8.5, which
``tests/kernels/test_libraries.py`` reads, and runs in Triton's interpreter. **It has not run on a GPU here yet.**
Imported when a run names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_hammer.kernels.backend import Requirements

USED: Mapping[str, tuple[str, ...]] = {  # in liger_kernel.ops: function -> arguments of its forward, in their order
    "LigerRMSNormFunction": ("X", "W", "eps", "offset", "casting_mode", "in_place"),
    "LigerFusedAddRMSNormFunction": ("X", "R", "W", "eps", "offset", "casting_mode", "in_place"),
    "LigerRopeFunction": ("q", "k", "cos", "sin"),
    "LigerFusedGateUpSiLUMulFunction": ("y",),
}


def unavailable(device: torch.device) -> str:
    """Why liger-kernel cannot be imported here, or an empty string; does not import it."""
    return next((f"the package {p} is not installed" for p in ("liger_kernel", "triton") if not find_spec(p)), "")


def unsupported(required: Requirements) -> str:
    """Limit of each of its rows: ``kernels.compile=layers`` would have to look into Triton launches of another hand."""
    return "is not for kernels.compile=layers" if required.compile == "layers" else ""


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``norm.add_rms_norm``; rounds as Hugging Face's Llama does ("llama"), and so do we."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerRMSNormFunction

    if branch is None:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False), x
    return LigerFusedAddRMSNormFunction.apply(x, branch, weight, eps, 0.0, "llama", False)  # type: ignore[no-any-return]


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
    """As ``rope.rope``."""
    from liger_kernel.ops import LigerRopeFunction

    (s, b, _, d), tables = qkv.shape, (cos, sin)
    q, k, v = qkv.split((heads, groups, groups), dim=2)
    rows = (x.reshape(1, s * b, -1, d).transpose(1, 2) for x in (q, k))  # [1, heads, s b, d]
    # Row i of [s b] is position i // b. The second half of a table is never read, but its width tells the library d.
    wide = (t.view(s, 1, -1).expand(s, b, -1).reshape(1, s * b, -1).repeat(1, 1, 2) for t in tables)
    q, k = LigerRopeFunction.apply(*rows, *wide)
    return *(x.transpose(1, 2).view(s, b, -1, d) for x in (q, k)), v


def swiglu(gate_up: Tensor) -> Tensor:
    """As ``swiglu.swiglu``."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    product = LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2))  # its gradient comes back as a matrix
    return product.view(*gate_up.shape[:-1], -1)  # type: ignore[no-any-return]
