"""The pipeline as data: how layers are divided over stages, and in which order each rank runs its stages.

The model is a chain of *stages*; rank r of p holds stage r, and with v stages a rank (interleaved) also r + p, r + 2p,
... A micro-batch goes forward through all stages and backward through all. One rank's order is a list of actions, which
``train/pipeline.py`` runs. 1F1B (arXiv 2104.04473 section 2.2) for 4 ranks and 6 micro-batches, forward 0 and backward
0' of micro-batch 0, where a backward takes as long as a forward::

    rank 0   0  1  2  3           0' 4  1' 5  2'    3'    4'    5'
    rank 1      0  1  2        0' 3  1' 4  2' 5  3'    4'    5'
    rank 2         0  1     0' 2  1' 3  2' 4  3' 5  4'    5'
    rank 3            0  0' 1  1' 2  2' 3  3' 4  4' 5  5'

Rank r keeps the activations of p - r micro-batches at most. Each rank waits (p - 1) / v times the forward and backward
of its share: with m micro-batches the step takes m + (p - 1) / v of them. The interleaved order is Megatron-LM's (the
same paper, section 2.3): groups of p micro-batches go through all stages of a rank one after the other.

What travels from one rank to another travels on a *link* of its own for each direction of each kind (``Links`` in
``context.py``), first in, first out. Both ends of a link use it in the same order, a rank waits for nothing but the
next message that it needs, and every order here ends whatever the speeds: tests/parallel/test_pipeline.py runs them all
with links that hold nothing, and with one queue for all that a rank gives its GPU.

Pure arithmetic. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, Protocol

from megatron_hammer.parallel.placement import ModelSizes

ELEMENT_FLOPS = 300  # that a GPU computes in the time of one byte: 989 TFLOP/s and 3.35 TB/s of an H100
SAME = 1e-9  # relative: costs that differ by less are equal


# ---- the order of a rank's work --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """Forward or backward of one micro-batch through one stage."""

    kind: Literal["forward", "backward"]
    stage: int
    """In the whole model, counted from 0."""
    micro_batch: int

    def receives(self, num_stages: int) -> bool:
        """Whether it needs what another stage computed."""
        return self.stage > 0 if self.kind == "forward" else self.stage < num_stages - 1

    def sends(self, num_stages: int) -> bool:
        """Whether another stage needs what it computes."""
        return self.stage < num_stages - 1 if self.kind == "forward" else self.stage > 0


@dataclass(frozen=True)
class Instant:
    """What a rank keeps when a forward of its order ends, or a backward begins."""

    kind: Literal["forward", "backward"]
    own: int
    """Which of the rank's own stages it is, counted from 0."""
    in_flight: tuple[int, ...]
    """Of each of its stages, for how many micro-batches activations are kept; the one at work included."""
    begun: tuple[bool, ...]
    """Of each of its stages, whether a backward is over in this step."""
    held: tuple[bool, ...]
    """Of each of its stages, whether the last action before was a forward, which may keep gathered weights."""
    messages: int
    """That are received ahead, or sent and not known to have arrived."""

    def is_within(self, other: Instant) -> bool:
        """Whether nothing of it is more than at another instant of the same kind."""
        return (
            (self.kind, self.own) == (other.kind, other.own)
            and self.messages <= other.messages
            and all(ours <= theirs for ours, theirs in zip(self.in_flight, other.in_flight, strict=True))
            and all(ours <= theirs for ours, theirs in zip(self.begun, other.begun, strict=True))
            and all(ours <= theirs for ours, theirs in zip(self.held, other.held, strict=True))
        )


@dataclass(frozen=True)
class Pipeline:
    """The shape of a pipeline as one of its ranks sees it."""

    rank: int = 0
    ranks: int = 1
    """p."""
    stages_per_rank: int = 1
    """v."""

    @property
    def num_stages(self) -> int:
        """Stages of the whole model, on all ranks together."""
        return self.ranks * self.stages_per_rank

    @property
    def stages(self) -> list[int]:
        """Those of this rank, first to last."""
        return [self.rank + self.ranks * i for i in range(self.stages_per_rank)]

    @property
    def sends_kept(self) -> int:
        """How many sends may be under way: one that is older has arrived for certain, and nobody waits for it."""
        return 2 * (self.num_stages + self.ranks)

    def training(self, micro_batches: int) -> list[Action]:
        """1F1B over this rank's stages; with several stages a rank ``micro_batches`` is a multiple of the ranks."""
        p, v, total = self.ranks, self.stages_per_rank, micro_batches * self.stages_per_rank
        assert v == 1 or micro_batches % p == 0, f"{micro_batches} micro-batches in groups of {p}"
        forward = self.evaluation(micro_batches)
        last = p * (v - 1) + 2 * self.rank  # backward goes through a rank's stages the other way round
        backward = [Action("backward", last - a.stage, a.micro_batch) for a in forward]
        warm_up = p - 1 - self.rank if v == 1 else 2 * (p - 1 - self.rank) + (v - 1) * p
        warm_up = min(warm_up, total)
        steady = [action for pair in zip(forward[warm_up:], backward) for action in pair]
        return forward[:warm_up] + steady + backward[total - warm_up :]

    def alone(self) -> list[Action]:
        """Forward and backward of one micro-batch and no other; with several stages a rank too."""
        return [Action("forward", s, 0) for s in self.stages] + [Action("backward", s, 0) for s in self.stages[::-1]]

    def evaluation(self, micro_batches: int) -> list[Action]:
        """Forward alone, of any number of micro-batches: groups of p go through the rank's stages one by one."""
        groups = [range(first, min(first + self.ranks, micro_batches)) for first in range(0, micro_batches, self.ranks)]
        return [Action("forward", stage, m) for group in groups for stage in self.stages for m in group]

    def instants(self, micro_batches: int) -> Iterator[Instant]:
        """What this rank keeps during each action of a step, in order."""
        order, kept = self.training(micro_batches), [0] * self.stages_per_rank
        receives, taken = self.receives(order), 0
        begun, held, sent = [False] * self.stages_per_rank, [False] * self.stages_per_rank, 0
        for action in order:
            own, is_forward = action.stage // self.ranks, action.kind == "forward"
            kept[own] += is_forward
            taken += action.receives(self.num_stages)
            messages = posted_ahead(receives, taken) + min(sent, self.sends_kept)
            yield Instant(action.kind, own, tuple(kept), tuple(begun), tuple(held), messages)
            kept[own] -= not is_forward
            begun[own] |= not is_forward
            held[own] = is_forward
            sent += action.sends(self.num_stages)

    @property
    def bubble(self) -> float:
        """For how many micro-batches' time a rank waits in a step, with stages that all take as long."""
        return (self.ranks - 1) / self.stages_per_rank

    @property
    def steady_after(self) -> int:
        """Micro-batches after which a rank keeps as much as it ever does, however many a step has.

        A rank that sends least, one message for each, keeps the most messages last.
        """
        return 2 * self.ranks * (self.stages_per_rank + 2)

    def receives(self, order: Sequence[Action]) -> list[Action]:
        """Those actions that need what another stage computed, in their order."""
        return [action for action in order if action.receives(self.num_stages)]

    def idle_share(self, micro_batches: int) -> float:
        """The part of a step in which a rank waits."""
        return self.bubble / (micro_batches + self.bubble)


def posted_ahead(receives: Sequence[Action], taken: int) -> int:
    """How many of a rank's receives are posted when the first ``taken`` have been taken: the next two, if on two links.

    In steady state these are one of each direction. A second one behind it on the same link could not begin before it,
    and might stand in the way: where the streams of a rank share a queue of its GPU (CUDA_DEVICE_MAX_CONNECTIONS=1, or
    more streams than queues) it holds all that comes after it, also what the other rank waits for.
    """
    return len({action.kind for action in receives[taken : taken + 2]})


@lru_cache(maxsize=256)  # a search for layouts asks for the same many times
def largest_instants(pipeline: Pipeline, micro_batches: int) -> tuple[Instant, ...]:
    """The instants of a step that no other one of the same kind surpasses: one of them needs the most memory."""
    found: list[Instant] = []
    for instant in dict.fromkeys(pipeline.instants(micro_batches)):
        if not any(map(instant.is_within, found)):
            found = [other for other in found if not other.is_within(instant)] + [instant]
    return tuple(found)


# ---- the layers of each stage ----------------------------------------------------------------------------------------


class LayerSizes(ModelSizes, Protocol):
    """What ``TokenFlops`` needs of ``config.ModelConfig``: global sizes."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def vocab_size(self) -> int | None: ...


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of a token in each part of the model, forward and backward; of the embedding, what takes as long."""

    embedding: float
    layers: tuple[float, ...]
    head: float

    @classmethod
    def of(cls, model: LayerSizes, seq_length: int, recomputed_layers: int = 0) -> TokenFlops:
        """Matrix products, causal attention, and of the embedding its memory traffic (``costs/budget.py``).

        Args:
            recomputed_layers: the first so many layers run their forward twice.
        """
        h, d, n, g = model.hidden_size, model.head_size, model.num_attention_heads, model.query_groups
        weights = h * (n + 2 * g) * d + n * d * h + 3 * h * model.ffn_hidden_size
        layer = 6.0 * weights + 6.0 * n * d * seq_length
        layers = tuple(layer * (4 / 3 if i < recomputed_layers else 1) for i in range(model.num_layers))
        return cls(14.0 * ELEMENT_FLOPS * h, layers, 6.0 * h * (model.vocab_size or 0))

    def stages(self, split: Sequence[int]) -> list[float]:
        """Of each stage, with so many layers in each."""
        ends = [sum(split[: i + 1]) for i in range(len(split))]
        costs = [sum(self.layers[end - size : end]) for size, end in zip(split, ends, strict=True)]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs

    def imbalance(self, split: Sequence[int], ranks: int) -> float:
        """Work of the rank with most over the mean: so many times longer than balanced is every micro-batch."""
        stages = self.stages(split)
        each = [sum(stages[rank::ranks]) for rank in range(ranks)]
        return max(each) * ranks / sum(each)


@lru_cache
def split_layers(flops: TokenFlops, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, so that the stage with most work has as little as possible.

    Each has one at least, but the last, whose head may be work enough.

    Among those splits it is the one with the smallest sum of squares, so that the other stages are alike too, and among
    these the one with fewer layers in the earlier stages, which keep more micro-batches. By dynamic programming over
    (stages, layers): layers that are recomputed cost more than others.
    """
    count = len(flops.layers)
    assert 1 <= num_stages <= count, f"{count} layers in {num_stages} stages"
    before = [sum(flops.layers[:i]) for i in range(count + 1)]

    def cost(stage: int, start: int, stop: int) -> float:
        ends = (flops.embedding if stage == 0 else 0.0) + (flops.head if stage == num_stages - 1 else 0.0)
        return before[stop] - before[start] + ends

    def stops(stage: int, start: int) -> Iterator[int]:
        """Where this stage may end: each one after it but the last gets a layer, and the last takes what is left."""
        if stage == num_stages - 1:
            return iter((count,))
        return iter(range(start + 1, count - (num_stages - 2 - stage) + 1))

    @cache
    def least(stage: int, start: int) -> float:
        """The most work of any stage from here on, at best."""
        if stage == num_stages:
            return 0.0
        return min(max(cost(stage, start, stop), least(stage + 1, stop)) for stop in stops(stage, start))

    limit = least(0, 0) * (1 + SAME)

    @cache
    def best(stage: int, start: int) -> tuple[float, tuple[int, ...]]:
        """Sum of squares, and the layers of the stages from here on; infinite where the limit cannot be kept."""
        if stage == num_stages:
            return 0.0, ()
        found: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for stop in stops(stage, start):
            here = cost(stage, start, stop)
            rest, sizes = best(stage + 1, stop) if here <= limit else (float("inf"), ())
            if here * here + rest < found[0] * (1 - SAME):
                found = here * here + rest, (stop - start, *sizes)
        return found

    return best(0, 0)[1]
