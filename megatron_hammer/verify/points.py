"""What a model computes between its parts, two numbers a token: where a forward pass goes wrong, and for whose tokens.

::

    embedding -> layers.0: attention_norm -> attention -> mlp_norm -> mlp -> layers.1: ... -> final_norm

After each of these a token has a vector; two fixed combinations of its elements are kept, on every rank for the tokens
that it has there. They are linear, so that parts of a sum add up in them, too, and two numbers tell tokens apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_hammer.model.llama import Stage
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.patterns import BORDER

OF_A_LAYER = ("attention_norm", "attention", "mlp_norm", "mlp")


@contextmanager
def watched(stages: Sequence[Stage]) -> Iterator[dict[str, list[np.ndarray]]]:
    """What comes out of each part while the stages compute: by its name, of each micro-batch [rows, 2]."""
    found: dict[str, list[np.ndarray]] = {}
    hooks = []
    for stage in stages:
        for name, part in _parts(stage):
            found[name] = []
            hooks.append(part.register_forward_hook(partial(_note, found[name])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _parts(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    ends = ("embedding", "final_norm")
    yield from ((name, getattr(stage, name)) for name in ends if hasattr(stage, name))
    for number, layer in stage.layers.items():
        yield from ((f"layers.{number}.{name}", getattr(layer, name)) for name in OF_A_LAYER)


def _note(found: list[np.ndarray], part: nn.Module, inputs: Any, output: Any) -> None:
    x: Tensor = output[0] if isinstance(output, tuple) else output  # of a norm the second is the sum that it made
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    two = torch.stack((torch.cos(places), torch.cos(1.7 * places)), 1)
    found.append((x.detach().double().flatten(0, -2) @ two).cpu().numpy())


def in_row_order(tokens: np.ndarray, packed: bool, part: int, parts: int) -> np.ndarray:
    """The tokens [b, s] of a micro-batch in the order of a model's rows, of which a rank may have one of ``parts``."""
    rows: np.ndarray = (tokens.reshape(-1, 1) if packed else tokens.T).reshape(parts, -1)[part]
    return rows


def first_wrong(ranks: Sequence[Outcome], expected: Outcome, bound: float) -> str:
    """Up to where hidden states are right, and from where on they are not, in words; empty where all are right."""
    order = sorted(expected.points, key=_when)
    for i, name in enumerate(order):
        right = np.empty_like(expected.points[name])
        right[expected.point_tokens] = expected.points[name]
        limit = bound * float(np.abs(right).max())
        have = {rank: outcome.points[name] for rank, outcome in enumerate(ranks) if name in outcome.points}
        wrong = [rank for rank, got in have.items() if not np.abs(got - right[ranks[rank].point_tokens]).max() <= limit]
        if wrong:
            before, border = f"right up to {order[i - 1]} and " if i else "", ""
            if i and not any(order[i - 1] in ranks[rank].points for rank in have):
                border = BORDER
            pattern = _pattern([(ranks[rank].point_tokens, have[rank]) for rank in wrong], right, limit)
            return f"hidden states are {before}wrong from {name} on{border}{pattern}"
    return ""


def _when(name: str) -> tuple[int, int]:
    """In the order of forward."""
    parts = name.split(".")
    if parts[0] != "layers":
        return (-1 if name == "embedding" else 2**31), 0
    return int(parts[1]), OF_A_LAYER.index(parts[2])


def _pattern(wrong: Sequence[tuple[np.ndarray, np.ndarray]], right: np.ndarray, limit: float) -> str:
    """Whether the numbers are parts of a sum, multiples, or those of other tokens."""
    total, times = np.zeros_like(right), np.zeros(len(right), dtype=int)
    for tokens, got in wrong:
        np.add.at(total, tokens, got)
        np.add.at(times, tokens, 1)
    several = times > 1
    if several.any() and np.abs(total - right)[several].max() <= 100 * limit:
        return ": each rank has a part of them, whose sum is missing"
    tokens, got = (np.concatenate(x) for x in zip(*wrong, strict=True))
    if not np.isfinite(got).all():
        which = np.unique(tokens[~np.isfinite(got).all(1)])
        return f": they are not finite for {len(which)} of {len(np.unique(tokens))} tokens"
    theirs, off = right[tokens], np.abs(got - right[tokens]).max(1) > limit
    factor = float((got * theirs).sum() / np.square(theirs).sum())
    if np.abs(got - factor * theirs).max() <= 100 * limit:
        return f": they are {factor:.4g} times what they should be"
    order = np.argsort(right[:, 0])
    at = order[np.clip(np.searchsorted(right[order, 0], got[off, 0] - 10 * limit), 0, len(order) - 1)]
    if np.abs(right[at] - got[off]).max() <= 100 * limit:
        return f": they are those of other tokens, of token {at[0]} for token {tokens[off][0]} and so on"
    return ""
