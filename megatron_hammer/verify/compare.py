"""Compares the pieces of all ranks with whole tensors: what differs, how much, where, and what that says of the cause.

A difference is relative to the largest value of the whole tensor. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_hammer.config import Config
from megatron_hammer.model.parameters import EMBEDDING, FINAL_NORM
from megatron_hammer.verify.outcome import Outcome, TensorPiece
from megatron_hammer.verify.patterns import listed

PieceKey = tuple[str, str]
"""Kind and logical tensor."""

# Relative to the largest value. Sums in another order differ by the rounding of some hundred terms: seen are 3e-15 in
# fp64 and 1e-6 in fp32. In 16 bits activations are rounded too, and other kernels round elsewhere: some 25 roundings.
BOUNDS = {"fp64": 1e-10, "fp32": 2e-5, "bf16": 0.1, "fp16": 0.02}
NUMBER_BOUNDS = {"fp64": 1e-6, "fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}  # losses and norms are fp32 scalars in all
TIED = "first and last stage both have this weight, and their gradients are summed once"
KEY_SUMS = (
    "queries are right: the sum over context-parallel ranks of the gradients of keys and values is missing or wrong"
)
AFTER_ALL_LAYERS = 2**31


@dataclass(frozen=True)
class LayoutSizes:
    """The sizes of a layout, whose factors a difference may show."""

    tp: int
    dp: int
    accumulated: int
    cp: int = 1
    pp: int = 1
    stages_per_rank: int = 1
    tied: bool = False
    """Head and embedding are one weight, which first and last stage both have."""

    @classmethod
    def of(cls, config: Config, world_size: int) -> LayoutSizes:
        """The sizes of a run's layout."""
        grid, accumulated = config.grid(world_size), config.grad_accum(world_size)
        stages, tied = config.parallel.virtual_pipeline_stages, config.model.tie_word_embeddings
        return cls(grid.tp, grid.dp, accumulated, grid.cp, grid.pp, stages, tied)


@dataclass(frozen=True)
class Deviation:
    """A quantity that differs from what it must be."""

    what: str
    """Kind, and the logical tensor."""
    ranks: tuple[int, ...]
    difference: float
    cause: str
    """What the pattern says, or an empty string."""


@dataclass(frozen=True)
class Evidence:
    """What the ranks of a layout computed in a proof, beside what one process did: what a diagnosis is made from."""

    config: Config
    """The small one, whose ranks took the steps in fp64."""
    world_size: int
    ranks: Sequence[Outcome]
    expected: Outcome
    """Of one process in fp64."""
    initial: dict[str, np.ndarray]
    """The weights that all began with, by logical tensor."""
    bound: float
    """Relative difference that rounding explains."""

    @property
    def sizes(self) -> LayoutSizes:
        """The sizes of the layout."""
        return LayoutSizes.of(self.config, self.world_size)


def whole_tensors(pieces: Iterable[TensorPiece]) -> dict[PieceKey, np.ndarray]:
    """Logical tensors from pieces that make them up.

    Raises:
        ValueError: an element is in no piece, or is no number.
    """
    parts: dict[PieceKey, list[TensorPiece]] = defaultdict(list)
    for piece in pieces:
        parts[piece.kind, piece.tensor].append(piece)
    whole = {}
    for key, found in parts.items():
        shape = tuple(max(p.place[i].stop for p in found) for i in range(len(found[0].place)))
        tensor = np.full(shape, np.nan)
        for piece in found:
            tensor[piece.place] = piece.values
        if np.isnan(tensor).any():
            raise ValueError(f"{key[0]} of {key[1]} is not whole")
        whole[key] = tensor
    return whole


def compare_pieces(
    ranks: Sequence[Outcome], whole: Mapping[PieceKey, np.ndarray], bound: float, sizes: LayoutSizes
) -> tuple[dict[str, float], list[Deviation]]:
    """The largest difference of each kind, and what is beyond the bound, in the order of the model.

    Every element of every tensor must be on some rank, else that is a finding.
    """
    worst: dict[str, float] = dict.fromkeys(dict.fromkeys(kind for kind, _ in whole), 0.0)
    by_key: dict[PieceKey, list[tuple[int, TensorPiece]]] = defaultdict(list)
    for rank, outcome in enumerate(ranks):
        for piece in outcome.pieces:
            by_key[piece.kind, piece.tensor].append((rank, piece))
    findings = []
    for key, expected in whole.items():
        kind, tensor = key
        scale = max(float(np.abs(expected).max()), 1e-300)
        seen, wrong, largest = np.zeros(expected.shape, dtype=bool), [], 0.0
        for rank, piece in by_key[key]:
            seen[piece.place] = True
            difference = float(np.abs(piece.values - expected[piece.place]).max()) / scale
            difference = difference if np.isfinite(difference) else np.inf
            largest = max(largest, difference)
            if difference > bound:
                wrong.append((rank, piece))
        worst[kind] = max(worst[kind], largest)
        if wrong:
            at = tuple(sorted({rank for rank, _ in wrong}))
            cause = likely_cause(wrong, expected, sizes)
            if tensor == EMBEDDING and sizes.tied and sizes.pp > 1:
                cause = f"{cause}; {TIED}" if cause else TIED
            findings.append(Deviation(f"{kind} of {tensor}", at, largest, cause))
        if not seen.all():
            missing = f"{int((~seen).sum())} of {seen.size} elements are on no rank"
            findings.append(Deviation(f"{kind} of {tensor}", (), np.inf, missing))
    return worst, name_missing_key_sums(findings) if sizes.cp > 1 else findings


def name_missing_key_sums(findings: list[Deviation]) -> list[Deviation]:
    """Under context parallelism: where backward first goes wrong at keys and values, and queries are right.

    Backward comes to the last layer first. A rank that has only its own queries' gradients for its keys and values is
    wrong there in ``k_proj`` and ``v_proj``, and in all that comes before the layer.
    """
    wrong = {f.what.removeprefix("gradient of ") for f in findings if f.what.startswith("gradient of ")}
    of_last = keys_alone(wrong)
    named = {f"gradient of {tensor}" for tensor in of_last}
    return [dataclasses.replace(f, cause=KEY_SUMS) if f.what in named else f for f in findings]


def keys_alone(wrong: set[str]) -> set[str]:
    """The key and value weights of the last layer with a wrong gradient, if of its attention these alone are wrong."""
    layers = [layer for tensor in wrong if (layer := _layer(tensor)) is not None]
    if not layers or max(layers) == AFTER_ALL_LAYERS:
        return set()
    attention = f"model.layers.{max(layers)}.self_attn."
    of_last = {tensor for tensor in wrong if tensor.startswith(attention)}
    return of_last if of_last <= {f"{attention}{name}_proj.weight" for name in "kv"} else set()


def compare_stages(ranks: Sequence[Outcome], sizes: LayoutSizes) -> list[Deviation]:
    """Whether the layers lie on the ranks of a pipeline in the order in which these work, one round after the other.

    The losses of stages in another order look normal.
    """
    if sizes.pp == 1:
        return []
    owners: dict[int, int] = {}  # layer -> place in the pipeline; the final norm comes after all layers
    for rank, outcome in enumerate(ranks):  # whose pieces are in the order of its stages
        found = [_layer(piece.tensor) for piece in outcome.pieces if piece.kind == "model"]
        layers = [layer for layer in found if layer is not None]
        if layers != sorted(layers):
            once = listed(dict.fromkeys(layer for layer in layers if layer != AFTER_ALL_LAYERS))
            cause = f"the stages of this rank have the layers {once}, in this order: they are swapped"
            return [Deviation("order of the stages", (rank,), np.inf, cause)]
        owners |= dict.fromkeys(layers, rank * sizes.pp // len(ranks))
    order = [owner for _, owner in sorted(owners.items())]
    visits = [owner for i, owner in enumerate(order) if i == 0 or order[i - 1] != owner]
    if visits == [*range(sizes.pp)] * sizes.stages_per_rank:
        return []
    cause = f"the layers, first to last, are on pipeline ranks {' '.join(map(str, visits))}: stages are swapped"
    return [Deviation("order of the stages", tuple(range(len(ranks))), np.inf, cause)]


def _layer(tensor: str) -> int | None:
    if tensor == FINAL_NORM:
        return AFTER_ALL_LAYERS
    parts = tensor.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def compare_numbers(
    ranks: Sequence[Outcome], expected: Outcome, bound: float, sizes: LayoutSizes
) -> tuple[float, list[Deviation]]:
    """Losses by source, losses and norms: the largest relative difference, and what is beyond the bound."""
    worst, findings = 0.0, []
    for what, right, values, likely in _numbers(ranks, expected, sizes):
        differences = [_difference(value, right) for value in values]
        worst = max(worst, *differences)
        if at := tuple(rank for rank, difference in enumerate(differences) if not difference <= bound):
            findings.append(Deviation(what, at, differences[at[0]], likely(values[at[0]], right)))
    return worst, findings


def _difference(value: float, right: float) -> float:
    return abs(value / right - 1) if np.isfinite(value) else np.inf


def _numbers(
    ranks: Sequence[Outcome], expected: Outcome, sizes: LayoutSizes
) -> Iterator[tuple[str, float, list[float], Callable[[float, float], str]]]:
    """Each number: what it is, the right one, those of the ranks, and what makes of the right one a wrong one."""

    def of_source(of_step: float, value: float, right: float) -> str:
        # Tokens that are counted to another source leave the loss of the step what it is.
        moved = of_step < 0.01 * _difference(value, right)
        return "the loss of the step is right: tokens are counted to another source" if moved else of_loss(value, right)

    def of_loss(value: float, right: float) -> str:
        return name_factor(value / right, sizes) or off_by_log(value - right, sizes)

    def of_norm(value: float, right: float) -> str:
        return name_factor(value / right, sizes)

    for i, sources in enumerate(expected.source_losses):
        likely = partial(of_source, max(_difference(o.losses[i], expected.losses[i]) for o in ranks))
        for k, right in enumerate(sources):
            yield f"loss of source {k} in step {i + 1}", right, [o.source_losses[i][k] for o in ranks], likely
    for i, right in enumerate(expected.losses):
        yield f"loss of step {i + 1}", right, [o.losses[i] for o in ranks], of_loss
    for i, right in enumerate(expected.norms):
        yield f"gradient norm of step {i + 1}", right, [o.norms[i] for o in ranks], of_norm


# ---- causes ----------------------------------------------------------------------------------------------------------


def likely_cause(wrong: Sequence[tuple[int, TensorPiece]], expected: np.ndarray, sizes: LayoutSizes) -> str:
    """What the pattern of the differing pieces says: a factor, a part of a sum, rows of another place."""
    ratios = [ratio_of(piece.values, expected[piece.place]) for _, piece in wrong]
    factors = [ratio for ratio in ratios if ratio is not None]
    if len(factors) == len(ratios) and all(abs(factor - 1) <= 1e-3 for factor in factors):
        return "it is nearly right: rounded to fewer bits?"
    if len(factors) == len(ratios) and max(factors) - min(factors) <= 1e-3 * abs(factors[0]):
        return name_factor(factors[0], sizes) or f"all of it times {factors[0]:.4g}"
    if cause := missing_sum(wrong, expected):
        return cause
    if all(not piece.values.any() for _, piece in wrong):
        return "it is zero: nothing was computed, sent or copied"
    if all(_is_elsewhere(piece, expected) for _, piece in wrong):
        return "right values in another place: rows or shards are swapped"
    rows = sorted({int(i) + piece.rows[0] for _, piece in wrong for i in _rows_that_differ(piece, expected)})
    if expected.ndim == 2 and rows and len(rows) <= expected.shape[0] // 4:
        shown = ", ".join(map(str, rows[:6])) + (", ..." if len(rows) > 6 else "")
        return f"{len(rows)} of {expected.shape[0]} rows differ ({shown})"
    return ""


def ratio_of(values: np.ndarray, expected: np.ndarray) -> float | None:
    """The factor between them if there is one, else None."""
    square = float((expected * expected).sum())
    if square == 0 or not np.isfinite(values).all():
        return None
    factor = float((values * expected).sum()) / square
    rest = float(np.abs(values - factor * expected).max())
    return factor if factor != 0 and rest <= 1e-3 * abs(factor) * float(np.abs(expected).max()) else None


def name_factor(factor: float, sizes: LayoutSizes) -> str:
    """The size of the layout that a factor is, or its inverse."""
    names = {"data_parallel_size": sizes.dp, "tensor_model_parallel_size": sizes.tp,
             "context_parallel_size": sizes.cp, "the number of micro-batches": sizes.accumulated,
             "pipeline_model_parallel_size": sizes.pp}  # fmt: skip
    for word, power in (("times", 1), ("divided by", -1)):
        of = [f"{name}={size}" for name, size in names.items() if size > 1 and abs(factor / size**power - 1) < 1e-2]
        if of:
            return f"{word} {' or '.join(of)}: a sum where a mean belongs, or a sum that is missing or done twice"
    return ""


def off_by_log(shift: float, sizes: LayoutSizes) -> str:
    """The logarithm of a size that a loss is off by."""
    names = {"tensor_model_parallel_size": sizes.tp, "data_parallel_size": sizes.dp, "context_parallel_size": sizes.cp}
    of = [f"log({name}={n})" for name, n in names.items() if n > 1 and abs(abs(shift) / np.log(n) - 1) < 1e-2]
    return f"off by {' or '.join(of)}: the sum of exponentials counts ranks, or misses them" if of else ""


def missing_sum(wrong: Sequence[tuple[int, TensorPiece]], expected: np.ndarray) -> str:
    """Whether the values of several ranks for one place add up to what they should be."""
    by_place: dict[tuple[tuple[int, int], ...], list[np.ndarray]] = defaultdict(list)
    for _, piece in wrong:
        by_place[tuple((s.start, s.stop) for s in piece.place)].append(piece.values)
    sums = [(place, np.sum(values, axis=0)) for place, values in by_place.items() if len(values) > 1]
    if all(np.array_equal(value, values[0]) for values in by_place.values() for value in values):
        return ""  # a factor, and not a part each
    for place, total in sums:
        target = expected[tuple(slice(*r) for r in place)]
        if not float(np.abs(total - target).max()) <= 1e-3 * float(np.abs(expected).max()):
            return ""
    return "each rank has a part of it: their sum is missing" if sums else ""


def _is_elsewhere(piece: TensorPiece, expected: np.ndarray) -> bool:
    """Whether the rows of a piece (or its values, of a vector) are rows of the whole tensor, at another place."""
    columns = piece.place[1] if piece.cols is not None else None
    there = expected[:, columns] if columns is not None else expected[:, None]
    have = piece.values if columns is not None else piece.values[:, None]
    scale = max(float(np.abs(expected).max()), 1e-300)
    sums = np.sort(there.sum(1))
    wanted = have.sum(1)
    nearest = np.clip(np.searchsorted(sums, wanted), 1, max(1, len(sums) - 1))
    distance = np.minimum(np.abs(sums[np.minimum(nearest, len(sums) - 1)] - wanted), np.abs(sums[nearest - 1] - wanted))
    return bool((distance <= 1e-6 * scale * have.shape[1]).all())


def _rows_that_differ(piece: TensorPiece, expected: np.ndarray) -> np.ndarray:
    difference = np.abs(piece.values - expected[piece.place])
    scale = max(float(np.abs(expected).max()), 1e-300)
    per_row = difference.reshape(len(difference), -1).max(1)
    return np.flatnonzero(per_row > 1e-6 * scale)
