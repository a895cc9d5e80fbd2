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
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.patterns import BORDER, ROUNDED, listed

OF_A_LAYER = ("attention_norm", "attention", "mlp_norm", "mlp")


class ForwardWatch:
    """What comes out of each part of a model in its forward of some micro-batches, and the losses of their tokens.

    Whatever order the micro-batches are computed in, they are kept in the order given. A layer that backward runs again
    is not looked at then.

    Args:
        batches: with tensors that the stages will be given.
    """

    def __init__(self, batches: Sequence[Batch[Tensor]]) -> None:
        self._tokens = [batch.tokens for batch in batches]
        self._points: dict[str, list[tuple[int, np.ndarray]]] = {}
        self._losses: list[tuple[int, np.ndarray]] = []
        self._running: int | None = None

    @property
    def points(self) -> dict[str, np.ndarray]:
        """What came out of each part, by its name: [rows of all micro-batches, 2]."""
        return {name: _in_order(found) for name, found in self._points.items()}

    @property
    def losses(self) -> np.ndarray:
        """Losses of all tokens; none on a stage without a head."""
        return _in_order(self._losses)

    @contextmanager
    def on(self, stages: Sequence[Stage]) -> Iterator[ForwardWatch]:
        """While these compute, each micro-batch once at most."""
        hooks = []
        for stage in stages:
            hooks += [stage.register_forward_pre_hook(self._enter), stage.register_forward_hook(self._leave)]
            for name, part in _parts(stage):
                self._points[name] = []
                hooks.append(part.register_forward_hook(partial(self._note, name)))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, stage: nn.Module, inputs: Any) -> None:
        self._running = next((i for i, tokens in enumerate(self._tokens) if tokens is inputs[0]), None)

    def _leave(self, stage: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._running is not None and isinstance(stage, Stage) and stage.placement.has_head:
            self._losses.append((self._running, output.detach().flatten().double().cpu().numpy()))
        self._running = None

    def _note(self, name: str, part: nn.Module, inputs: Any, output: Any) -> None:
        if self._running is not None:
            x: Tensor = output[0] if isinstance(output, tuple) else output  # of a norm the second is the sum it made
            self._points[name].append((self._running, _two_numbers(x.detach())))


def _in_order(found: list[tuple[int, np.ndarray]]) -> np.ndarray:
    return np.concatenate([values for _, values in sorted(found, key=lambda of: of[0])]) if found else np.empty(0)


def _parts(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    ends = ("embedding", "final_norm")
    yield from ((name, getattr(stage, name)) for name in ends if hasattr(stage, name))
    for number, layer in stage.layers.items():
        yield from ((f"layers.{number}.{name}", getattr(layer, name)) for name in OF_A_LAYER)


def _two_numbers(x: Tensor) -> np.ndarray:
    places = torch.arange(x.shape[-1], dtype=torch.float64, device=x.device)
    two = torch.stack((torch.cos(places), torch.cos(1.7 * places)), 1)
    numbers: np.ndarray = (x.double().flatten(0, -2) @ two).cpu().numpy()
    return numbers


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
            on = f", on rank{'s' if len(wrong) > 1 else ''} {listed(wrong)} alone" if len(wrong) < len(have) else ""
            if i and not any(order[i - 1] in ranks[rank].points for rank in have):
                border = BORDER
            pattern = _pattern([(ranks[rank].point_tokens, have[rank]) for rank in wrong], right, limit)
            return f"hidden states are {before}wrong from {name} on{on}{border}{pattern}"
    return ""


def _when(name: str) -> tuple[int, int]:
    """The place of a part in the order of forward."""
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
    size = float(np.abs(got - theirs).max()) / float(np.abs(right).max())
    if size < ROUNDED:
        return f": the differences are small, {size:.0e} of the largest: rounded to fewer bits?"
    order = np.argsort(right[:, 0])
    at = order[np.clip(np.searchsorted(right[order, 0], got[off, 0] - 10 * limit), 0, len(order) - 1)]
    if np.abs(right[at] - got[off]).max() <= 100 * limit:
        return f": they are those of other tokens, of token {at[0]} for token {tokens[off][0]} and so on"
    return ""
