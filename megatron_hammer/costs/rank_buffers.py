"""The memory of gathered weights and unreduced gradients, at each moment of a step that may be the worst.

Only ranks that keep shards have any. Where weights are sharded those of a part of the model are there while it
computes, and of the part that comes next; where sums of gradients are, a bucket has room from its first gradient until
the reduction of the one after it begins (``optim/store.py``), the last one of a micro-batch into the next. Moments of
the last layer, whose activations are all there still::

    begin       weights of the embedding and of the first layer; the last bucket of the micro-batch before
    forward     weights of the last layer and of what comes after it; the last bucket of the micro-batch before
    head        the head's weights; its bucket, and the last one of the micro-batch before
    down        in backward: weights of the last layer and of the one before; the bucket of the down projection, and
                the one before it
    between     the same without the one before, where gate and up have another bucket
    gate_up     their bucket and the one before it
    earlier     as down, in the layer before
    end         the embedding's bucket and the one before it; hardly any activations
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_hammer.config import Config
from megatron_hammer.costs.rank_costs import element_bytes, is_tied, layouts_of, placements_of
from megatron_hammer.optim.buckets import BufferLayout
from megatron_hammer.parallel.placement import Placement

MOMENTS = ("begin", "forward", "head", "down", "between", "gate_up", "earlier", "end")
"""Within an action of a rank's order, whose end or beginning ``parallel.pipeline.Instant`` describes."""


class StageBuffers:
    """Bytes that a rank has gathered or not yet reduced, by moment and by what its stages are at.

    Args:
        rank: of ``world_size``.
    """

    def __init__(self, config: Config, world_size: int, rank: int) -> None:
        grid, by_part = config.grid(world_size), config.parallel.divides_weights
        self.config = config
        self.stages = list(zip(layouts_of(config, grid, rank), placements_of(config, grid, rank), strict=True))
        self.whole = not config.parallel.divides_gradients or grid.shard == 1
        if self.whole:
            return
        nothing = Counter[str]()
        self.waiting = [4 * _size(layout, -1) for layout, _ in self.stages]
        self.between = [_weights_between(config, *stage) if by_part else 0 for stage in self.stages]
        self.weights = [
            [_weights(config, *stage, held) if by_part else nothing for held in (False, True)] for stage in self.stages
        ]
        self.gradients = [[_gradients(config, *stage, begun) for begun in (False, True)] for stage in self.stages]

    def at(self, own: int, begun: Sequence[bool], held: Sequence[bool]) -> dict[str, int]:
        """Bytes at each moment of one of the rank's stages; the others have what they have between two micro-batches.

        Args:
            own: which stage it is.
            begun, held: of each stage, as in ``parallel.pipeline.Instant``.
        """
        if self.whole:
            return dict.fromkeys(MOMENTS, 0)
        others = sum(
            begun[n] * self.waiting[n] + held[n] * self.between[n] for n in range(len(self.stages)) if n != own
        )
        weights = self.weights[own][held[own]]
        return {name: others + size + weights[name] for name, size in self.gradients[own][begun[own]].items()}


def arriving_bytes(config: Config, world_size: int, rank: int) -> int:
    """Bytes of memory for the other ranks' sums of the largest shard, on a CPU: each of a rank's stages has its own."""
    grid = config.grid(world_size)
    if grid.shard == 1 or config.train.deterministic_reduction == "tree":
        return 0
    return sum(4 * layout.arriving for layout in layouts_of(config, grid, rank))


def _gradients(config: Config, layout: BufferLayout, at: Placement, several: bool) -> dict[str, int]:
    tied = is_tied(config, at)
    waiting = _size(layout, -1) if several and len(layout.buckets) > 1 else 0

    def two(bucket: int) -> int:
        before = _size(layout, bucket - 1) if bucket > 0 else 0 if tied else waiting
        return _size(layout, bucket) + before

    found = dict.fromkeys(("down", "between", "gate_up", "earlier"), 0)
    if at.layers_local:  # the last of several stages may have none
        last = at.layers[1] - 1
        down, gate_up = (_bucket(layout, f"layers.{last}.mlp.{name}.weight") for name in ("down", "gate_up"))
        between = two(down) if down == gate_up else _size(layout, down)
        earlier = two(_bucket(layout, f"layers.{last - 1}.mlp.down.weight")) if at.layers_local > 1 else 0
        found = {"down": two(down), "between": between, "gate_up": two(gate_up), "earlier": earlier}
    if tied:  # the head's part of its gradient stays until the embedding's comes
        found = {name: size + _size(layout, -1) for name, size in found.items()}
    head = _size(layout, -1) if tied else two(0)
    end = _size(layout, -1) + (_size(layout, -2) if len(layout.buckets) > 1 else 0)
    found |= {"begin": waiting, "forward": waiting, "head": head if at.has_head else 0, "end": end}
    return {name: 4 * size for name, size in found.items()}


def _parts(layout: BufferLayout) -> Counter[str]:
    """Elements of each part's weights, where buckets end with parts."""
    parts: Counter[str] = Counter()
    for bucket in layout.buckets:
        parts[layout.table[bucket.parameters[0]].part] += bucket.stop - bucket.start
    return parts


def _weights_between(config: Config, layout: BufferLayout, at: Placement) -> int:
    """Bytes of weights that a stage keeps while a micro-batch is between its forward and its backward."""
    if config.parallel.reshard_after_forward:
        return 0
    parts = _parts(layout)
    return element_bytes(config) * (sum(parts[f"layers.{i}"] for i in range(*at.layers)) + parts["final_norm"])


def _weights(config: Config, layout: BufferLayout, at: Placement, held: bool) -> Counter[str]:
    """Bytes of the weights that are there; held: those that stay after a forward are there from the beginning."""
    parts = _parts(layout)
    layers = [parts[f"layers.{i}"] for i in range(*at.layers)]
    kept = 0 if config.parallel.reshard_after_forward else sum(layers) + parts["final_norm"]
    head = parts["head"] or parts["embedding"]
    here = held * kept or sum(layers[-2:])
    size = element_bytes(config)
    following = parts["final_norm"] + head if at.has_head else 0
    stay = kept or (sum(layers[-1:]) + parts["final_norm"] if at.has_head else 0)  # from forward to their backward
    found = {"forward": max(kept, sum(layers[-1:])) + following, "head": stay + head, "end": sum(layers[:1])}
    found["begin"] = max(held * kept, sum(layers[:1])) + parts["embedding"]
    return Counter({name: size * found.get(name, here) for name in MOMENTS})


def _bucket(layout: BufferLayout, name: str) -> int:
    """The number of the bucket that a parameter is in."""
    index = next(i for i, row in enumerate(layout.table) if row.name == name)
    return next(i for i, bucket in enumerate(layout.buckets) if index in bucket.parameters)


def _size(layout: BufferLayout, bucket: int) -> int:
    return layout.buckets[bucket].stop - layout.buckets[bucket].start
