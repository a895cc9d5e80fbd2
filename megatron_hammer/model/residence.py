"""Gathers sharded weights (ZeRO 3, FSDP) before a part of the model computes with them, and frees them afterwards.

A store may keep this rank's shards only (ZeRO 3, ``optim/store.py``), or allocate gradients only while a part's
backward writes them (ZeRO 2). The parts of a model are its embedding, each layer, the final norm and the head. Around
each stand two nodes of autograd that do nothing but call the store::

    forward    acquire -> [entry] -> the part computes -> [exit] -> release
    backward   release <- [entry] <- its backward      <- [exit] <- acquire

While a part computes, the weights of the next one in the same direction are on their way. A store that keeps everything
gets the calls of ``acquire`` alone, and has no nodes; one of a rank that shares its weights with nobody gets no calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_hammer.kernels.linear import GradientStore

Result = TypeVar("Result")


@dataclass(frozen=True)
class Use:
    """One use of the weights of a part in a forward."""

    part: str
    following: tuple[str, ...] = ()
    """Parts that forward needs next."""
    preceding: tuple[str, ...] = ()
    """Parts that backward needs next."""
    stays: bool = False
    """Whether its weights stay from forward to backward, between which nothing but the head comes."""


def uses_of(layers: tuple[int, int], has_embedding: bool, has_head: bool, is_tied: bool) -> dict[str, Use]:
    """The uses of a stage's parts, by part; that of the head, whose weight may be the embedding's, under "head"."""
    order = ["embedding"] * has_embedding + [f"layers.{i}" for i in range(*layers)]
    order += ["final_norm", "embedding" if is_tied else "head"] if has_head else []
    uses = {}
    for i, part in enumerate(order):
        is_head = has_head and i == len(order) - 1
        # The final norm is too small to hide what comes after it: head and last layer are asked for one part earlier.
        before, after = order[max(0, i - 1) : i], order[i + 1 : i + 2]
        if after == ["final_norm"]:
            after = order[i + 1 : i + 3]
        if is_head:
            before = order[max(0, i - 2) : i][::-1]
        stays = has_head and i >= len(order) - 3 and not is_head and part != "embedding"
        preceding = tuple(p for p in before if p != "embedding")
        uses["head" if is_head else part] = Use(part, tuple(after), preceding, stays)
    return uses


def run_with_weights(
    store: GradientStore, use: Use, run: Callable[..., Result], again: bool, by_itself: bool, *inputs: Any
) -> Result:
    """``run(*inputs)`` while the weights of a part are there.

    Args:
        run: returns a tensor, or a tuple of tensors.
        again: have the weights there in its backward too, which an embedding does not need.
        by_itself: its backward writes gradients without ``Gradient.add``, as a compiled layer's does.
    """
    store.acquire(use.part, use.following)
    if store.weights_stay and not (by_itself and store.sums_are_new):
        return run(*inputs)  # nothing is given up
    if not torch.is_grad_enabled() or not again:
        result = run(*inputs)
        store.release(use.part)
        return result
    entered = _Entry.apply(store, use, *inputs)  # type: ignore[no-untyped-call]
    outputs: Any = run(*entered)
    is_one = isinstance(outputs, Tensor)
    outputs = _Exit.apply(store, use, by_itself, *((outputs,) if is_one else outputs))  # type: ignore[no-untyped-call]
    if not use.stays:
        store.release(use.part, last=False)
    return outputs[0] if is_one else outputs  # type: ignore[no-any-return]


def _as_they_are(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.view_as(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in values)


class _Entry(torch.autograd.Function):
    """The inputs themselves; their backward comes after that of the part."""

    @staticmethod
    def forward(ctx: Any, store: GradientStore, use: Use, *inputs: Any) -> tuple[Any, ...]:
        ctx.store, ctx.use = store, use
        ctx.set_materialize_grads(False)
        return _as_they_are(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.store.release(ctx.use.part)
        return None, None, *grads


class _Exit(torch.autograd.Function):
    """The outputs themselves; their backward comes before that of the part."""

    @staticmethod
    def forward(ctx: Any, store: GradientStore, use: Use, by_itself: bool, *outputs: Any) -> tuple[Any, ...]:
        ctx.store, ctx.use, ctx.by_itself = store, use, by_itself
        ctx.set_materialize_grads(False)
        return _as_they_are(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.store.acquire(ctx.use.part, ctx.use.preceding)
        if ctx.by_itself:
            ctx.store.open_sums(ctx.use.part)
        return None, None, None, *grads
