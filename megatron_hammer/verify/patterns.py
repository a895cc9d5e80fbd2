"""Describes patterns in differences: on which ranks, how often each part of a sum is in it, where backward goes wrong.

Pure functions over numbers; ``diagnosis.py`` asks them. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from megatron_hammer.model.parameters import EMBEDDING, FINAL_NORM
from megatron_hammer.parallel.grid import AXES, Axis, Grid
from megatron_hammer.verify.outcome import TensorPiece

NAMES: dict[Axis, str] = {"pp": "pipeline", "dp": "data-parallel", "cp": "context-parallel", "tp": "tensor-parallel"}
EXPLAINED = 0.05  # of a difference may be left by a cause that is named: rounding leaves far less, another cause more
ROUNDED = 8e-3  # of the largest value: two roundings to 8 bits; what is really wrong is mostly more
NOISE = 1e-5  # of the largest value: transformers' RoPE is rounded to fp32 elsewhere
BACKWARD = ("down_proj", "up_proj", "gate_proj", "post_attention_layernorm", "o_proj", "v_proj", "k_norm", "q_norm",
            "k_proj", "q_proj", "input_layernorm")  # fmt: skip
"""Parts of a layer as backward comes to them."""
NORMS = {"input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"}
BORDER = ", behind the border of two pipeline stages"
Label = tuple[int, int, int]
"""Data-parallel rank, micro-batch of it, context-parallel rank."""


def whose(wrong: Iterable[int], among: Iterable[int], grid: Grid) -> str:
    """Words for some ranks among others, by their place on an axis; empty where they are all, or no place says it."""
    wrong, among = set(wrong), set(among)
    if wrong == among or not wrong:
        return ""
    for axis in reversed(AXES):
        places = {rank: place for group in grid.groups(axis) for place, rank in enumerate(group)}
        of = {places[rank] for rank in wrong}
        if wrong == {rank for rank in among if places[rank] in of}:
            return f"{NAMES[axis]} rank{'s' if len(of) > 1 else ''} {', '.join(map(str, sorted(of)))}"
    return f"rank{'s' if len(wrong) > 1 else ''} {', '.join(map(str, sorted(wrong)))} alone"


def in_sum(times: np.ndarray, labels: Sequence[Label], own: Label) -> str:
    """How often the gradients of each micro-batch of each rank are in a sum that differs, in words.

    Args:
        own: the rank that has the sum.
    """
    of, counted = np.array(labels), np.round(times, 2)
    if not counted.any():
        return "none of the gradients is there: what is there was overwritten, or never added"
    if np.ptp(counted) == 0:
        return f"all gradients are there, {counted[0]:g} times"
    axes = {"data-parallel": 0, "context-parallel": 2}
    alone = []
    for name, axis in axes.items():
        mine = of[:, axis] == own[axis]
        if not mine.all() and counted[mine].any() and not counted[~mine].any():
            alone.append(name)
    if alone:
        return f"a rank has the gradients of its own tokens alone: the sum over {' and '.join(alone)} ranks is missing"
    if each := _by(of[:, 1], counted):
        last = max(each)
        if each[last] and not any(n for m, n in each.items() if m != last):
            return "the last micro-batch alone is in the gradients: those before it were overwritten"
        return "in the gradients of each rank " + _odd({f"micro-batch {m + 1}": n for m, n in each.items()})
    for name, axis in axes.items():
        if each := _by(of[:, axis], counted):
            return "in the sum of gradients " + _odd({f"{name} rank {r}": n for r, n in each.items()})
    several = len(set(of[:, 2].tolist())) > 1
    names = [f"micro-batch {m + 1} of data-parallel rank {d}" + (f" and context-parallel rank {c}" if several else "")
             for d, m, c in labels]  # fmt: skip
    return "in the sum of gradients " + _odd(dict(zip(names, counted.tolist(), strict=True)))


def _by(place: np.ndarray, counted: np.ndarray) -> dict[int, float]:
    """What all with one place are counted, where that is one number for each place; else nothing."""
    each = {int(i): set(counted[place == i].tolist()) for i in np.unique(place)}
    return {i: n.pop() for i, n in each.items()} if len(each) > 1 and all(len(n) == 1 for n in each.values()) else {}


def _odd(times: dict[str, float]) -> str:
    odd = [f"{name} counts {n:g} times" if n else f"{name} is missing" for name, n in times.items() if n != 1]
    return ", ".join(odd[:4]) + (", ..." if len(odd) > 4 else "")


def first_in_backward(
    tensors: Iterable[str], wrong: set[str], ranks_of: Mapping[str, set[int]] = MappingProxyType({})
) -> str:
    """Where backward goes wrong, in words.

    Args:
        ranks_of: who has each tensor.
    """
    order = sorted(tensors, key=_when)
    first = next(tensor for tensor in order if tensor in wrong)
    at = order.index(first)
    if at == 0:
        return f"backward is wrong from {first} on, where it begins"
    if {short(tensor) for tensor in wrong} <= NORMS:
        return "norms alone are wrong: what ranks add to their gradients"
    if len(wrong) == 1 and at < len(order) - 1:
        return f"{first} alone is wrong: its own gradient, not what backward passes on"
    if first == EMBEDDING:
        return "all gradients before the embedding's are right: what is added to its rows"
    layers = {tensor.split(".")[2] for tensor in wrong if tensor.split(".")[1] == "layers"}
    if len(layers) == 1 and any(_when(tensor) > _when(first) and tensor not in wrong for tensor in order):
        return f"layer {layers.pop()} alone is wrong: its own gradients, not what backward passes on"
    # What comes back from columns of a matrix that ranks share is summed before the norm that their input comes from.
    summed = short(first) in NORMS and short(order[at - 1]) not in NORMS
    more = ", where tensor-parallel ranks sum the gradients of a product's input" if summed else ""
    both = [ranks_of.get(tensor, set()) for tensor in (order[at - 1], first)]
    more += BORDER if all(both) and not both[0] & both[1] else ""
    return f"backward is right up to {order[at - 1]} and wrong from {first} on{more}"


def _when(tensor: str) -> tuple[int, int]:
    """Backward comes to the head first, to the last layer before the first."""
    parts = tensor.split(".")
    if tensor == EMBEDDING:
        return 2**31, 0
    if parts[1] != "layers":
        return -1, int(tensor == FINAL_NORM)
    return 2**30 - int(parts[2]), next(i for i, name in enumerate(BACKWARD) if name in parts)


def which_tensors(wrong: set[str], among: set[str]) -> str:
    """Words for some tensors among all, by what they have in common; empty where it is nothing."""
    if wrong == among:
        return ""
    layer_of = {tensor: tensor.split(".")[2] if tensor.split(".")[1] == "layers" else "" for tensor in among}
    layers = {layer_of[tensor] for tensor in wrong}
    if "" not in layers and wrong == {tensor for tensor in among if layer_of[tensor] in layers}:
        return f"layer{'s' if len(layers) > 1 else ''} {listed(sorted(layers))} alone"
    kinds = {short(tensor) for tensor in wrong}
    if wrong == {tensor for tensor in among if short(tensor) in kinds} and len(kinds) <= len(NORMS):
        return f"{'all norms' if kinds <= NORMS and len(kinds) > 2 else listed(sorted(kinds))} alone"
    return f"{listed(sorted(wrong))} alone" if len(wrong) <= 2 else ""


def near(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether these are the same numbers but for rounding in fp64."""
    return bool(np.abs(values - others).max() <= 1e-9 * max(float(np.abs(others).max()), 1e-300))


def explains(left: np.ndarray, off: np.ndarray, noise: float) -> bool:
    """Whether what a cause leaves of a difference is little; a difference within the noise says nothing."""
    size = float(np.sqrt(np.square(off).mean()))
    return bool(np.sqrt(np.square(left).mean()) <= EXPLAINED * size and size > noise)


def shifts(piece: TensorPiece, whole: np.ndarray) -> str:
    """Words for where in the tensor the rows of a piece come from, if all that differ come from elsewhere."""
    columns = piece.place[1] if piece.cols is not None else None
    there = whole[:, columns] if columns is not None else whole[:, None]
    have = piece.values if columns is not None else piece.values[:, None]
    if have.shape[1] < 2:
        return ""
    key = there @ np.linspace(1, 2, there.shape[1])
    wanted, order = have @ np.linspace(1, 2, have.shape[1]), np.argsort(key)
    nearest = order[np.clip(np.searchsorted(key[order], wanted - 1e-9 * np.abs(key).max()), 0, len(key) - 1)]
    if not np.abs(there[nearest] - have).max() <= 1e-8 * max(float(np.abs(there).max()), 1e-300):
        return ""
    rows = len(there)
    shift = (nearest - np.arange(piece.rows[0], piece.rows[1])) % rows
    if len(set(shift.tolist())) == 1 and shift[0]:
        on = int(shift[0]) if shift[0] <= rows // 2 else int(shift[0]) - rows
        return f"each is that of {abs(on)} rows {'further on' if on > 0 else 'before'}"
    return f"row {piece.rows[0]} has the values of row {nearest[0]}, and others likewise"


def short(tensor: str) -> str:
    """The kind of tensor, of whatever layer."""
    return tensor.split(".")[-2]


def listed(items: Iterable[object]) -> str:
    """Items as text, with commas between."""
    return ", ".join(map(str, items))
