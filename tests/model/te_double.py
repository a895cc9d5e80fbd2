"""A contract double of Transformer Engine: what we use of it, in plain torch, on a CPU under gloo.

Written from the Python sources of ``transformer-engine`` 2.20.2, to their documented behaviour and signatures;
``test_te_contract.py`` holds the signatures to those sources. It is strict where the library is (dtypes, groups, sizes
under fp8, the ``main_grad`` protocol) and hostile where the library makes no promise: weights begin random, the
gradient that it returns beside ``main_grad`` is NaN, and a module that our tree could see would add extra state to its
``state_dict``. Under fp8 it computes in full precision, but through a copy of the weight that it keeps as the library
keeps its fp8 copy, so a stale one shows; and it reduces largest values over the group it was given. ``EVENTS`` records
the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F


@dataclass
class State:
    """What the library keeps globally: the region that is open, and the largest values it has seen."""

    enabled: bool = False
    recipe: Any = None
    group: Any = None
    depth: int = 0
    again: bool = False
    amaxes: list[Tensor] = field(default_factory=list)


STATE = State()
EVENTS: list[dict[str, Any]] = []


# ---- transformer_engine.common.recipe ---------------------------------------------------------------------------


class DelayedScaling:
    """Scales from a history of largest values."""

    reduce_amax = True

    def __init__(self) -> None:
        """Our run takes the library's defaults."""


class Float8CurrentScaling:
    """Each tensor scaled by its own largest value."""

    reduce_amax = False

    def __init__(self) -> None:
        """Our run takes the library's defaults."""


# ---- transformer_engine.pytorch ---------------------------------------------------------------------------------


def is_fp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """No GPU, no fp8."""
    reason = "Device compute capability 8.9 or higher required for FP8 execution."
    return (False, reason) if return_reason else False


class autocast:
    """The region in which fp8 is on; largest values are reduced where the outermost one ends."""

    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
    ) -> None:
        self.asked = (enabled, recipe, amax_reduction_group)
        self.before: tuple[bool, Any, Any] | None = None

    def __enter__(self) -> autocast:
        if self.before is not None:
            raise RuntimeError("autocast context manager cannot be entered more than once concurrently")
        self.before = (STATE.enabled, STATE.recipe, STATE.group)
        STATE.enabled, STATE.recipe, STATE.group = self.asked
        STATE.depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        assert self.before is not None
        STATE.enabled, STATE.recipe, STATE.group = self.before
        self.before = None
        STATE.depth -= 1
        enabled, recipe, group = self.asked
        if enabled and STATE.depth == 0 and torch.is_grad_enabled():
            event = {"event": "region", "recipe": type(recipe).__name__, "group": group, "modules": len(STATE.amaxes)}
            if recipe.reduce_amax:
                largest = torch.stack(STATE.amaxes)
                if dist.is_initialized():  # with group None, over the world
                    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
                event["largest"] = largest.tolist()
            EVENTS.append(event)
            STATE.amaxes.clear()


@contextmanager
def _again(enabled: bool, recipe: Any, group: Any) -> Iterator[None]:
    """A layer runs again: in fp8 as before, but largest values are not noted twice."""
    before = (STATE.enabled, STATE.recipe, STATE.group, STATE.again)
    STATE.enabled, STATE.recipe, STATE.group, STATE.again = enabled, recipe, group, True
    try:
        yield
    finally:
        STATE.enabled, STATE.recipe, STATE.group, STATE.again = before


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's, with the fp8 of the first time."""
    assert kwargs == {"use_reentrant": False}, "the library's default is reentrant"
    then = (STATE.enabled, STATE.recipe, STATE.group)
    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(*then))
    )


class _Module(torch.nn.Module):
    """Saves its scales by pickle, as the library does: nobody must register it."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("extra state must never be in a checkpoint")


class RMSNorm(_Module):
    """RMSNorm with the weight in ``weight``, ones at first."""

    def __init__(self, normalized_shape: Any = None, eps: float = 1e-5, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != self.weight.shape:
            raise ValueError(f"Input tensor (shape={input.shape}) and weight tensor are not compatible")
        wide, weight = input.to(torch.promote_types(input.dtype, torch.float32)), self.weight
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * weight.to(wide.dtype)).to(weight.dtype)  # rounds once, where the torch layers round twice


class Linear(_Module):
    """x W^T, whole or divided, with the library's communication and its ``main_grad`` protocol."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: Any = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: Any = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not bias, "this double has no bias"
        assert parallel_mode in (None, "column", "row"), f"parallel_mode {parallel_mode} not supported"
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.tp_group, self.tp_group_initialized = tp_group, tp_group is not None or tp_size == 1
        self.parallel_mode, self.sequence_parallel = parallel_mode, self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        if parallel_mode == "column":
            out_features = _divided(out_features, self.tp_size)
        elif parallel_mode == "row":
            in_features = _divided(in_features, self.tp_size)
        weight = torch.empty(out_features, in_features, device=device, dtype=params_dtype)
        self.weight = torch.nn.Parameter(weight)
        (init_method or torch.nn.init.normal_)(self.weight)
        self.kept_copy: Tensor | None = None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        assert self.tp_group_initialized, "Tensor parallel group not initialized."
        if inp.dtype != self.weight.dtype:
            raise TypeError(f"Found input dtype: {inp.dtype} and 'weight' dtype: {self.weight.dtype}")
        assert inp.shape[-1] == self.weight.shape[1], "GEMM not possible"
        compute = self.weight.detach()
        if STATE.enabled:
            for tensor in (inp, self.weight):
                if math.prod(tensor.shape[:-1]) % 8 or tensor.shape[-1] % 16:
                    raise ValueError(f"FP8 execution requires ... but got tensor with dims={list(tensor.size())}")
            if not STATE.again:
                STATE.amaxes.append(inp.detach().abs().max().float())
            if is_first_microbatch is None or is_first_microbatch:
                compute = compute.clone()
                self.kept_copy = compute if is_first_microbatch else None
            else:
                assert self.kept_copy is not None, "no fp8 copy was kept of the first micro-batch"
                compute = self.kept_copy
        EVENTS.append(
            {
                "event": "linear",
                "fp8": STATE.enabled,
                "recipe": type(STATE.recipe).__name__,
                "group": STATE.group,
                "tp_group": self.tp_group,
                "first": is_first_microbatch,
                "mode": self.parallel_mode,
            }
        )
        return _LinearFunction.apply(self.weight, inp, compute, self, is_first_microbatch)  # type: ignore[no-any-return]


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, inp: Tensor, compute: Tensor, layer: Linear, first: bool | None) -> Tensor:
        mode, group = layer.parallel_mode, layer.tp_group
        ctx.layer, ctx.first, ctx.weight = layer, first, weight
        ctx.overwrites = getattr(weight, "overwrite_main_grad", False)
        total = _gathered(inp, group) if mode == "column" and layer.sequence_parallel else inp
        ctx.save_for_backward(inp, compute)
        out = F.linear(total, compute)
        if mode == "row" and layer.tp_size > 1:
            out = _scattered(out, group) if layer.sequence_parallel else _summed(out, group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        layer, weight = ctx.layer, ctx.weight
        mode, group, (inp, compute) = layer.parallel_mode, layer.tp_group, ctx.saved_tensors
        grad = _gathered(grads[0], group) if mode == "row" and layer.sequence_parallel else grads[0]
        dgrad = grad.matmul(compute)
        if mode == "column" and layer.tp_size > 1:
            dgrad = _scattered(dgrad, group) if layer.sequence_parallel else _summed(dgrad, group)
        total = _gathered(inp, group) if mode == "column" and layer.sequence_parallel else inp
        wide = torch.promote_types(grad.dtype, torch.float32)
        wgrad = grad.flatten(0, -2).to(wide).t().matmul(total.flatten(0, -2).to(wide))
        EVENTS.append({"event": "gradient", "in_main_grad": layer.fuse_wgrad_accumulation})
        if not layer.fuse_wgrad_accumulation:
            return wgrad.to(weight.dtype), dgrad, None, None, None
        main_grad = weight.main_grad
        assert main_grad.shape == weight.shape and main_grad.is_contiguous()
        if ctx.overwrites or ctx.first:
            main_grad.copy_(wgrad)
        else:
            main_grad.add_(wgrad)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None, dgrad, None, None, None
        weight.grad_added_to_main_grad = True
        return torch.full_like(weight, torch.nan), dgrad, None, None, None


class DotProductAttention(_Module):
    """Softmax attention of whole samples (sbhd, causal) or packed sequences (thd, padding_causal)."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.qkv_format = num_attention_heads, kv_channels, qkv_format
        self.groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert num_attention_heads % self.groups == 0
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Any = None,
        cu_seqlens_kv_padded: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> Tensor:
        assert not STATE.enabled, "attention belongs outside of the fp8 region: it is shared by all layers"
        layout, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        q, k, v = query_layer, key_layer, value_layer
        assert k.shape[-2] == self.groups and q.shape[-2:] == (self.heads, self.head_dim), (q.shape, k.shape)
        if layout == "sbhd":
            assert q.dim() == 4 and mask == "causal"
            return _causal(q, k, v).flatten(2)
        assert layout == "thd" and q.dim() == 3 and mask == "padding_causal"
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == max_seqlen_kv == int(cu_seqlens_q.diff().max())
        pieces = [x.unsqueeze(1).split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)]
        return torch.cat([_causal(*piece) for piece in zip(*pieces, strict=True)]).squeeze(1).flatten(1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[s, b, heads, d], by the formula rather than by torch's kernel."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v)


def _divided(size: int, parts: int) -> int:
    assert size % parts == 0, f"{size} is not divisible by {parts}"
    return size // parts


def _gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _scattered(x: Tensor, group: Any) -> Tensor:
    return _summed(x, group).chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


# ---- instead of the library -------------------------------------------------------------------------------------


@contextmanager
def installed() -> Iterator[list[dict[str, Any]]]:
    """``import transformer_engine.pytorch`` finds the double; gives the record of what happened."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common",
             "transformer_engine.common.recipe")  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for member in (Linear, RMSNorm, DotProductAttention, autocast, is_fp8_available, checkpoint):
        setattr(modules["transformer_engine.pytorch"], member.__name__, member)
    for member in (DelayedScaling, Float8CurrentScaling):
        setattr(modules["transformer_engine.common.recipe"], member.__name__, member)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    EVENTS.clear()
    try:
        yield EVENTS
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
