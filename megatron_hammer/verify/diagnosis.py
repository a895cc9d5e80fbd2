"""Explains in a sentence or two why a layout differs from one process, from all compared numbers together.

A step goes forward, backward, and updates, and what is wrong early is wrong in all that comes later. So only the first
of these that differs is examined::

    initial weights    before anything is computed: as another tensor's, or as no seed gives them
    losses of tokens   which tokens: whose samples, whose part, from where in a document; the same losses with each
                       known fault in transformers' model (``what_if.py``): the one that gives these numbers is named
    losses in step 1   where they differ from those without gradients: the same questions again
    gradients          each is a sum over ranks and micro-batches; by least squares, how often each of them is in it.
                       Else where backward goes wrong first
    gradient norm      of which ranks' shards it is
    states             after the first step: as before it, as another tensor's, or as with a known fault of the update
    model              what ranks compute with at the end, against what they themselves have updated
    loss of step 2     with which tensors as before the update it would be that
    states             after both steps

A cause that does not explain the numbers is not named: what is left is where they differ.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.model.parameters import EMBEDDING
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.grid import AXES
from megatron_hammer.verify.compare import (
    KEY_SUMS,
    NUMBER_BOUNDS,
    TIED,
    Evidence,
    PieceKey,
    keys_alone,
    missing_sum,
    name_factor,
    ratio_of,
    whole_tensors,
)
from megatron_hammer.verify.forward_diagnosis import diagnose_tokens
from megatron_hammer.verify.outcome import FIRST, INITIAL, TensorPiece
from megatron_hammer.verify.patterns import (
    NAMES,
    NOISE,
    ROUNDED,
    Label,
    explains,
    first_in_backward,
    in_sum,
    listed,
    near,
    shifts,
    short,
    which_tensors,
    whose,
)
from megatron_hammer.verify.what_if import Contributions, second_losses, states_with_faults

ONLY_IN_STEPS = (
    "a forward alone is right, and that of the first step is not: what only steps have, as overlap, what is sent or "
    "gathered for backward, and whatever a micro-batch leaves behind for the next one"
)
EXACTLY = 2e-3  # of the difference of one number, which says less than many do


def diagnose(evidence: Evidence) -> list[str]:
    """Sentences on what differs; empty where nothing does."""
    questions = _Questions(evidence)
    for ask in (
        questions.beginning,
        questions.tokens,
        questions.first_forward,
        questions.gradients,
        questions.norms,
        questions.first_states,
        questions.model,
        questions.second_loss,
        questions.states,
        questions.reported,
    ):
        if found := ask():
            return found
    return []


class _Questions:
    """The questions to a proof's numbers, each answered by sentences, or by none where nothing differs."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence, self.config, self.world_size = evidence, evidence.config, evidence.world_size
        self.ranks, self.expected, self.initial = evidence.ranks, evidence.expected, evidence.initial
        self.grid, self.whole = self.config.grid(self.world_size), whole_tensors(self.expected.pieces)

    def wrong(self, kinds: Iterable[str]) -> list[tuple[int, TensorPiece]]:
        """The pieces of these kinds that differ, with their ranks."""
        found = []
        for rank, outcome in enumerate(self.ranks):
            for piece in outcome.pieces:
                known = piece.kind in kinds and (piece.kind, piece.tensor) in self.whole
                if known and self._differs(piece).any():
                    found.append((rank, piece))
        return found

    def _differs(self, piece: TensorPiece) -> np.ndarray:
        """Which elements of a piece are beyond the bound."""
        right = self.whole[piece.kind, piece.tensor]
        limit = self.evidence.bound * max(float(np.abs(right).max()), 1e-300)
        which: np.ndarray = ~(np.abs(piece.values - right[piece.place]) <= limit)  # what is no number differs
        return which

    def beginning(self) -> list[str]:
        """What differs in the weights before the first step."""
        if wrong := self.wrong([INITIAL + "weight"]):
            which = self._where(wrong, "weights before the first step") or ["weights before the first step are wrong"]
            unknown = ["initialisation: they are not what train.seed gives"]
            return [*which, *(self._moved(wrong) or self._swapped(wrong) or unknown)]
        if wrong := self.wrong([INITIAL + "model"]):
            which = self._where(wrong, "the model's weights before the first step")
            gathered = "shards are right before the first step, and what is gathered of them is not"
            return [*which, *(self._moved(wrong) or [gathered])]
        return []

    def tokens(self) -> list[str]:
        """What differs in the losses before the first step."""
        return diagnose_tokens(self.evidence)

    def first_forward(self) -> list[str]:
        """What differs in the losses of the first step, where a forward alone was right."""
        said = diagnose_tokens(self._in_step(1))
        return [ONLY_IN_STEPS, *said] if said else []

    def _in_step(self, step: int) -> Evidence:
        """The same with the forward of a step; where that is not whole, with the one before steps."""
        everybody = *self.ranks, self.expected
        if not all(len(outcome.in_steps) >= step and outcome.in_steps[step - 1].is_whole for outcome in everybody):
            return self.evidence
        ranks = [outcome.of_step(step) for outcome in self.ranks]
        return dataclasses.replace(self.evidence, ranks=ranks, expected=self.expected.of_step(step))

    # ---- backward ----------------------------------------------------------------------------------------------------

    def gradients(self) -> list[str]:
        """What differs in the gradients of the first step."""
        wrong = self.wrong(["gradient"])
        if not wrong:
            return []
        sentences = self._where(wrong, "gradients")
        if {piece.tensor for _, piece in wrong} == {EMBEDDING} and (sizes := self.evidence.sizes).tied and sizes.pp > 1:
            sentences.append(TIED)
        if missing := self._missing_sums(wrong):
            return [*sentences, missing]
        parts = Contributions.count(self.config, self.world_size, self.initial)
        # The sum of each rank is explained by itself: a rank may lack what another one has.
        reasons: dict[str, set[int]] = defaultdict(set)
        explained: Counter[bool] = Counter()
        for rank, piece in wrong:
            if piece.tensor in parts.of:
                times = parts.times_in(piece)
                explained[times is not None] += 1
                if times is not None:
                    reasons[in_sum(times, parts.labels, self._place(rank))].add(rank)
        if explained[True] > explained[False]:
            most = max(reasons, key=lambda reason: len(reasons[reason]))
            return [*sentences, most]
        tensors = {tensor for kind, tensor in self.whole if kind == "gradient"}
        if self.grid.cp > 1 and keys_alone({piece.tensor for _, piece in wrong}):
            return [*sentences, KEY_SUMS]
        if named := self._multiples(wrong, "gradients") or self._of_all_groups(wrong) or self._moved(wrong):
            return [*sentences, *named]
        if z_loss := self._of_z_loss(wrong, parts):
            return [*sentences, z_loss]
        if few := self._few(wrong):
            return [*sentences, few]
        where = first_in_backward(tensors, {piece.tensor for _, piece in wrong}, self._ranks_of("gradient"))
        hints = []
        if self.config.train.recompute != "none":
            hints.append(f"forward is right: it may be what train.recompute={self.config.train.recompute} makes again")
        if self._largest(wrong) < ROUNDED:
            hints.append(f"the differences are small, {self._largest(wrong):.0e} of the largest: rounding to 16 bits?")
        return [*sentences, where, *hints]

    def _of_z_loss(self, wrong: Sequence[tuple[int, TensorPiece]], parts: Contributions) -> str:
        """Whether all is right but what ``train.z_loss`` adds; parts: with it, as it should be."""
        if not self.config.train.z_loss:
            return ""
        without = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, z_loss=0.0))
        rest = Contributions.count(without, self.world_size, self.initial)
        added = Contributions(parts.labels, {tensor: of - rest.of[tensor] for tensor, of in parts.of.items()})
        said: Counter[str] = Counter()
        for rank, piece in wrong:
            if piece.tensor in parts.of:
                right = rest.of[piece.tensor].sum(0)[piece.place]
                times = added.times_in(dataclasses.replace(piece, values=piece.values - right), noise=0.02)
                said[in_sum(times, parts.labels, self._place(rank)) if times is not None else ""] += 1
        most = said.most_common(1)[0][0] if said else ""
        return f"of what train.z_loss adds to the loss: {most}" if most else ""

    def _few(self, wrong: Sequence[tuple[int, TensorPiece]]) -> str:
        """Whether hardly an element of each differs."""
        ends, few, of = True, 0, 0
        for _, piece in wrong:
            off = self._differs(piece)
            few, of = few + int(off.sum()), of + off.size
            ends &= not off.ravel()[1:-1].any()
        at = ", the first or last ones of what a rank has of a tensor: the borders of shards" if ends else ""
        return f"{few} of {of} elements of these differ{at}" if few <= 0.05 * of else ""

    def _multiples(self, wrong: Sequence[tuple[int, TensorPiece]], what: str) -> list[str]:
        """Whether the pieces of each rank are one multiple of what they should be."""
        factors: dict[int, set[float]] = defaultdict(set)
        for rank, piece in wrong:
            ratio = ratio_of(piece.values, self.whole[piece.kind, piece.tensor][piece.place])
            if ratio is None:
                return []
            factors[rank].add(round(ratio, 2 - int(np.floor(np.log10(abs(ratio))))))
        if any(len(of_rank) > 1 for of_rank in factors.values()):
            return []
        each = {rank: of_rank.pop() for rank, of_rank in factors.items()}
        if len(set(each.values())) > 1:
            of_ranks = listed(f"{factor:g} on rank {rank}" for rank, factor in sorted(each.items())[:4])
            return [f"{what} are multiples of what they should be, {of_ranks}"]
        (factor,) = set(each.values())
        known = name_factor(factor, self.evidence.sizes)
        return [f"{what} are {factor:g} times what they should be", *([known] if known else [])]

    def _of_all_groups(self, wrong: Sequence[tuple[int, TensorPiece]]) -> list[str]:
        """Whether those of keys and values are sums over all query groups."""
        model = self.config.model
        for _, piece in wrong:
            if short(piece.tensor) not in ("k_proj", "v_proj") or model.query_groups == 1:
                return []
            right = self.whole[piece.kind, piece.tensor]
            total = right.reshape(model.query_groups, model.head_size, -1).sum(0)
            rows = total[np.arange(*piece.rows) % model.head_size].reshape(len(piece.values), *right.shape[1:])
            columns = rows[(slice(None), *piece.place[1:])]
            if not near(piece.values, columns):
                return []
        return ["those of each query group are the sum over all of them: summed over ranks that hold other groups"]

    def _largest(self, wrong: Sequence[tuple[int, TensorPiece]]) -> float:
        """The largest difference, relative to the largest value of its tensor."""
        rights = [(piece, self.whole[piece.kind, piece.tensor]) for _, piece in wrong]
        return max(float(np.abs(p.values - right[p.place]).max() / np.abs(right).max()) for p, right in rights)

    def _ranks_of(self, kind: str) -> dict[str, set[int]]:
        """Who has pieces of each tensor."""
        found: dict[str, set[int]] = defaultdict(set)
        for rank, outcome in enumerate(self.ranks):
            for piece in (piece for piece in outcome.pieces if piece.kind == kind):
                found[piece.tensor].add(rank)
        return found

    def _missing_sums(self, wrong: Sequence[tuple[int, TensorPiece]]) -> str:
        """Whether ranks that hold the same gradient have a part of it each."""
        holders: dict[tuple[object, ...], list[tuple[int, TensorPiece]]] = defaultdict(list)
        for rank, piece in wrong:
            holders[piece.tensor, piece.rows, piece.cols].append((rank, piece))
        if not all(len(found) > 1 and missing_sum(found, self.whole["gradient", found[0][1].tensor])
                   for found in holders.values()):  # fmt: skip
            return ""
        together = {rank for rank, _ in next(iter(holders.values()))}
        axes = [NAMES[axis] for axis in AXES if any(together <= set(group) for group in self.grid.groups(axis))]
        over = f" over {axes[-1]} ranks" if axes else ""
        tensors = listed(sorted({short(piece.tensor) for _, piece in wrong}))
        return f"each rank has a part of the gradient of {tensors}: the sum{over} is missing"

    def _place(self, rank: int) -> Label:
        """Data-parallel rank, 0, context-parallel rank."""
        places = {a: {r: i for group in self.grid.groups(a) for i, r in enumerate(group)}[rank] for a in ("dp", "cp")}  # type: ignore[arg-type]
        return places["dp"], 0, places["cp"]

    # ---- the norm ----------------------------------------------------------------------------------------------------

    def norms(self) -> list[str]:
        """What differs in the norm of the first step, whose gradients are right."""
        right, got = self.expected.norms[0], [outcome.norms[0] for outcome in self.ranks]
        wrong = [rank for rank, norm in enumerate(got) if not abs(norm / right - 1) <= NUMBER_BOUNDS["fp32"]]
        if not wrong:
            return []
        # Squares that a rank has; has first; has first, or of keys and values.
        each, once, keys = ([0.0] * len(self.ranks) for _ in range(3))
        counted: set[tuple[object, ...]] = set()
        for rank, piece in ((rank, p) for rank, o in enumerate(self.ranks) for p in o.pieces if p.kind == "gradient"):
            square, key = float(np.square(piece.values).sum()), (piece.tensor, piece.rows, piece.cols)
            each[rank] += square
            once[rank] += 0 if key in counted else square
            keys[rank] += 0 if key in counted and short(piece.tensor) not in ("k_proj", "v_proj") else square
            counted.add(key)
        everybody = list(range(len(self.ranks)))
        ways = [("of its own shards: the sum over ranks is missing", once, {rank: [rank] for rank in everybody}),
                ("of all shards, with those that several ranks hold counted several times", each,
                 dict.fromkeys(everybody, everybody)),
                ("of all shards, with copies of keys and values counted several times", keys,
                 dict.fromkeys(everybody, everybody))]  # fmt: skip
        for axis in AXES:
            group_of = {rank: group for group in self.grid.groups(axis) for rank in group}
            ways.append((f"of its {NAMES[axis]} group alone: the sum over the others is missing", once, group_of))
        for name, squares, members in ways:
            if all(abs(got[r] / max(sum(squares[m] for m in members[r]) ** 0.5, 1e-300) - 1) < 1e-4 for r in wrong):
                return [f"gradients are right, and the norm of a rank is that {name}"]
        place = whose(wrong, everybody, self.grid)
        return [f"gradients are right, and their norm is wrong{' on ' + place if place else ''}"]

    # ---- the update --------------------------------------------------------------------------------------------------

    def first_states(self) -> list[str]:
        """What differs in masters and moments after the first step, whose gradient was right."""
        wrong = self.wrong([FIRST + kind for kind in STATE_KINDS])
        if not wrong:
            return []
        sentences = self._where(wrong, "weights and moments after the first step")
        if all(self._is_initial(piece) for _, piece in wrong):
            return [*sentences, "they are as before it: no update reached them"]
        return [*sentences, *self._of_update(wrong)]

    def model(self) -> list[str]:
        """What differs between the weights that ranks compute with at the end and those that they updated."""
        updated = self._of_ranks("weight")
        wrong = [(rank, piece) for rank, outcome in enumerate(self.ranks) for piece in outcome.pieces
                 if piece.kind == "model" and not near(piece.values, updated[piece.tensor][piece.place])]  # fmt: skip
        if not wrong:
            return []
        sentences = self._where(wrong, "the model's weights")
        before = {"the last update": self._of_ranks(FIRST + "weight"), "all updates": self.initial}
        for name, then in before.items():
            if all(near(piece.values, then[piece.tensor][piece.place]) for _, piece in wrong):
                return [
                    *sentences,
                    f"the model has the weights of before {name}: what was updated is not gathered",
                ]
        if all(any(near(line, old[piece.tensor][piece.place][i]) for old in (updated, *before.values()))
               for _, piece in wrong for i, line in enumerate(piece.values)):  # fmt: skip
            return [*sentences, "some of the model's weights are of before an update: not gathered after it"]
        moved = self._moved(wrong, updated)
        return [*sentences, *(moved or ["updated shards are right, and what is gathered of them is not"])]

    def second_loss(self) -> list[str]:
        """What differs in the second step's loss, before which all that ranks have updated was right."""
        right, got = self.expected.losses[1], [outcome.losses[1] for outcome in self.ranks]
        wrong = [rank for rank, loss in enumerate(got) if not abs(loss / right - 1) <= NUMBER_BOUNDS["fp32"]]
        evidence = self._in_step(2)
        where = diagnose_tokens(evidence, 2)
        if not wrong or (not where and evidence is not self.evidence):
            return []
        updated = {tensor: values for (kind, tensor), values in self.whole.items() if kind == FIRST + "weight"}
        for name, loss in second_losses(self.config, self.initial, updated):
            if all(abs(got[rank] - loss) <= EXACTLY * abs(got[rank] - right) for rank in wrong):
                return [f"the second step computes with {name} of before the update: gathered before it, or not after"]
        other = "the first update is right, and the second step computes with other weights: what is gathered of it"
        return [other, *where]

    def states(self) -> list[str]:
        """What differs in masters and moments after two steps, of which the first was right."""
        wrong = self.wrong(STATE_KINDS)
        if not wrong:
            return []
        sentences, first = self._where(wrong, "weights and moments"), self._of_ranks
        then = {kind: first(FIRST + kind) for kind in STATE_KINDS}
        if all(near(piece.values, then[piece.kind][piece.tensor][piece.place]) for _, piece in wrong):
            return [*sentences, "they are as after the first step: no second update reached them"]
        return [*sentences, *self._of_update(wrong)]

    def reported(self) -> list[str]:
        """Losses of steps that are wrong, though those of tokens are right, and all that follows from them."""
        wrong = [step for step, right in enumerate(self.expected.losses)
                 if any(not abs(o.losses[step] / right - 1) <= NUMBER_BOUNDS["fp32"] for o in self.ranks)]  # fmt: skip
        if not wrong:
            return []
        return ["losses of tokens and gradients are right, and what is reported of losses is not: their sum or count"]

    def _of_update(self, wrong: Sequence[tuple[int, TensorPiece]]) -> list[str]:
        if moved := self._moved(wrong) or self._swapped(wrong):
            return moved
        if self._decayed_alone(wrong):
            return ["they are as before the update but for their decay: its direction did not reach them"]
        for name, pieces in states_with_faults(self.config, self.initial):
            if self._are(wrong, whole_tensors(pieces)):
                few = self._few(wrong)
                return [f"the numbers are those where {name}", *([few] if few else [])]
        kinds = listed(sorted({piece.kind for _, piece in wrong}))
        moments = [(rank, piece) for rank, piece in wrong if piece.kind == FIRST + "exp_avg"]
        if moments and (named := self._multiples(moments, "gradients in the update")):
            return [f"{named[0]}: what they are clipped or divided by"]
        if few := self._few(wrong):
            return [few]
        if all(piece.kind.startswith(FIRST) for _, piece in wrong):
            return [f"gradients are right, and {kinds} of them are not"]
        is_adamw = self.config.optimizer.style == "adamw"
        if is_adamw and (named := self._multiples(self._second_gradients(), "gradients in the second update")):
            return [f"{named[0]}: what they are clipped or divided by"]
        if self._first_gradients_again():
            return ["the gradients of the first step, or parts of them, are still in those of the second"]
        return [f"the first step is right, and {kinds} after the second are not: its gradients, or its update"]

    def _decayed_alone(self, wrong: Sequence[tuple[int, TensorPiece]]) -> bool:
        """Whether weights have become smaller in the first step and nothing else."""
        left = 1 - learning_rate(self.config, 1) * self.config.optimizer.weight_decay
        firsts = [piece for _, piece in wrong if piece.kind == FIRST + "weight"]
        return len(firsts) == len(wrong) and all(
            near(piece.values, self.initial[piece.tensor][piece.place] * left) for piece in firsts
        )

    def _second_gradients(self) -> list[tuple[int, TensorPiece]]:
        """What first moments got in the second update, of AdamW its gradients times a constant; as pieces of
        "second gradient", of which ``whole`` then has the right ones."""
        beta, kind, found = self.config.optimizer.beta1, "second gradient", []
        for tensor in [tensor for of, tensor in self.whole if of == "exp_avg"]:
            self.whole[kind, tensor] = self.whole["exp_avg", tensor] - beta * self.whole[FIRST + "exp_avg", tensor]
        for rank, outcome in enumerate(self.ranks):
            before = {(p.tensor, p.rows, p.cols): p for p in outcome.pieces if p.kind == FIRST + "exp_avg"}
            for p in (p for p in outcome.pieces if p.kind == "exp_avg"):
                values = p.values - beta * before[p.tensor, p.rows, p.cols].values
                found.append((rank, dataclasses.replace(p, kind=kind, values=values)))
        return found

    def _first_gradients_again(self) -> bool:
        """Whether what the first moments got in the second step has parts of the first step's gradients in it."""
        parts, found = Contributions.count(self.config, self.world_size, self.initial), False
        for _, piece in self._second_gradients():
            if piece.tensor not in parts.of:
                continue
            got, right = piece.values.ravel(), self.whole[piece.kind, piece.tensor][piece.place].ravel()
            if near(got, right) or got.size < 4 * len(parts.labels):
                continue
            of = parts.of[piece.tensor][(slice(None), *piece.place)].reshape(len(parts.labels), -1)
            basis = np.stack([right, *of])
            times = np.linalg.lstsq(basis.T, got, rcond=None)[0]
            if not explains(got - times @ basis, times[1:] @ basis[1:], 0.0):
                return False
            found = True
        return found

    def _of_ranks(self, kind: str) -> dict[str, np.ndarray]:
        """The tensors that all ranks together have of a kind; NaN where none has anything."""
        found = {tensor: np.full(right.shape, np.nan) for (of, tensor), right in self.whole.items() if of == kind}
        for outcome in self.ranks:
            for piece in outcome.pieces:
                if piece.kind == kind and piece.tensor in found:
                    found[piece.tensor][piece.place] = piece.values
        return found

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _where(self, wrong: Sequence[tuple[int, TensorPiece]], what: str) -> list[str]:
        """Which of the ranks that have such tensors, where it is not all of them."""
        kinds, tensors = {piece.kind for _, piece in wrong}, {piece.tensor for _, piece in wrong}
        have = [r for r, o in enumerate(self.ranks) if any(p.kind in kinds and p.tensor in tensors for p in o.pieces)]
        place = whose({rank for rank, _ in wrong}, have, self.grid)
        all_of_kind = {tensor for kind, tensor in self.whole if kind in kinds}
        which = which_tensors(tensors, all_of_kind)
        if not place and not which and tensors != all_of_kind:
            place = whose({rank for rank, _ in wrong}, range(len(self.ranks)), self.grid)
        if not place and not which:
            return []
        return [f"{what}{' of ' + which if which else ''} are wrong{' on ' + place if place else ''}"]

    def _is_initial(self, piece: TensorPiece) -> bool:
        if piece.kind.endswith("weight"):
            return near(piece.values, self.initial[piece.tensor][piece.place])
        return not piece.values.any()

    def _are(self, wrong: Sequence[tuple[int, TensorPiece]], others: dict[PieceKey, np.ndarray]) -> bool:
        """Whether all pieces are those of other tensors, far nearer than of the right ones."""
        for _, piece in wrong:
            if (key := (piece.kind, piece.tensor)) not in others:
                return False
            off, size = np.abs(piece.values - self.whole[key][piece.place]), float(np.abs(self.whole[key]).max())
            which = self._differs(piece)  # the others are right
            left = np.abs(piece.values - others[key][piece.place])
            if not explains(left[which], off[which], NOISE * size):
                return False
        return True

    def _moved(
        self, wrong: Sequence[tuple[int, TensorPiece]], tensors: dict[str, np.ndarray] | None = None
    ) -> list[str]:
        """Whether the values are those of another tensor, or of rows elsewhere in it.

        Args:
            tensors: the right ones, of one kind; None: those of one process, of the piece's kind.
        """
        others: Counter[str] = Counter()
        for _, piece in wrong:
            others_of_kind = tensors or {t: values for (kind, t), values in self.whole.items() if kind == piece.kind}
            right = others_of_kind[piece.tensor]
            same_shape = {t: v for t, v in others_of_kind.items() if t != piece.tensor and v.shape == right.shape}
            alike = [t for t, values in same_shape.items() if near(piece.values, values[piece.place])]
            from_where = "" if alike else shifts(piece, right)
            if alike:
                others[f"{piece.tensor} has the values of {alike[0]}"] += 1
            elif from_where:
                others[f"rows are in another place: {from_where}"] += 1
            else:
                return []
        return [most for most, _ in others.most_common(2)]

    def _swapped(self, wrong: Sequence[tuple[int, TensorPiece]]) -> list[str]:
        """Whether all pieces together have the right values, which belong to one another's places."""
        values = np.concatenate([piece.values.ravel() for _, piece in wrong])
        theirs = np.concatenate([self.whole[p.kind, p.tensor][p.place].ravel() for _, p in wrong])
        right, off = np.sort(theirs), ~(np.abs(values - theirs) <= self.evidence.bound * float(np.abs(theirs).max()))
        got = values[off]  # the others are right
        at = np.searchsorted(right, got - 1e-10 * np.abs(right).max()).clip(max=len(right) - 1)
        alike = bool((np.abs(right[at] - got) <= 1e-9 * np.abs(right).max()).mean() > 0.9)
        return ["the values are right and in one another's places: shards are swapped"] if alike else []
