"""What one rank of a layout needs, by formulas: bytes of its state and of its activations, and what it communicates.

``verify/one_rank.py`` counts the same in a step of the program itself (``tools/verify_parallel.py --world``), and the
forecast before a run takes its numbers from here. Legend: L layers, n micro-batches of a step, t tensor-parallel ranks,
s sequence, b micro-batch, h hidden, g query groups of d of a rank, e bytes of an element of the model's dtype. Under
context parallelism s is a rank's share of the sequence, but for cp itself.

Collectives of a step, with the bytes of the whole tensor [s, b, h] unless stated otherwise::

    tp   sequence parallel   a layer: all-gather 2 forward, 4 backward (two of them the kept inputs of wgrad again),
                                      reduce-scatter 2 forward, 2 backward
                             once:    embedding and head, all-gather 1 and reduce-scatter 1 each
         in chunks           a layer: of these in forward, and of 1 all-gather in backward, none, but for each other
                                      rank a send and a receive of a chunk [s/t, b, h]
    tp   without             a layer: all-reduce 2 forward, 2 backward; once: embedding and head, 1 each
    tp   both                a chunk of the head: all-gather of three fp32 numbers a row from each rank
         full recompute      the forward of a recomputed layer once more
         sequence parallel   once a step: all-reduce of the norms' gradients that this rank updates
    cp   a layer: all-gather of keys and values [s, b, 2g, d] forward, reduce-scatter of their fp32 gradients backward;
         recompute, selective or full: the all-gather of a recomputed layer once more
    kv   copies of key and value heads, once a step: all-reduce of their gradients that this rank updates
    dp   and cp together, once a step: a bucket, reduce-scatter of fp32 gradients and all-gather of weights; all-reduce
         of the losses by source, [sources, 4] in fp64
         sharded gradients    a bucket: reduce-scatter in each micro-batch
         sharded weights      a bucket: all-gather in each micro-batch, for forward and for backward; of embedding, head
                              and what comes before the head, norm and last layer, once for both
    shard, copies  with shard_size: those of a bucket are over shard, and once a step its shard is summed over copies
    pp   a stage and micro-batch: forward a receive, but on the first stage, and a send, but on the last; backward the
         other way round, [s/t, b, h] each; once a step: all-reduce of the losses by source
    ends tied embedding, first and last stage, once a step: all-reduce of its gradient that this rank updates
    world  once a step: all-reduce of the gradient's squared norm
    whole  Muon, in each round of a step: two all-to-alls among the ranks that have all states of their layers between
           them, of what this rank's shards have of the round's matrices and of those that it owns
           (``optim/matrices.py``); the larger of what it sends and what it receives
    deterministic_reduction=tree, in place of these: dp all-to-all of a bucket for its reduce-scatter, all-reduce of the
           squares of each block; tp and kv all-gather of what they sum
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from megatron_hammer.config import Config, ModelConfig
from megatron_hammer.kernels.backend import Backend
from megatron_hammer.kernels.newton_schulz import flops
from megatron_hammer.model.parameters import parameter_table, tables_of_stages
from megatron_hammer.model.recompute import activation_bytes
from megatron_hammer.model.residence import Use, uses_of
from megatron_hammer.optim.buckets import BufferLayout
from megatron_hammer.optim.matrices import ELEMENTS_OF_A_ROUND, plan_exchange
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.optim.tree_store import TreeStore
from megatron_hammer.parallel.fake_world import LABELS, Collective
from megatron_hammer.parallel.grid import Grid
from megatron_hammer.parallel.placement import Placement
from megatron_hammer.parallel.sum_tree import most_waiting

GIB = 2**30
BYTES_OF_SUM = 8
ROW_STATISTICS = 12  # bytes a row of a chunk of logits: three fp32 numbers


def element_bytes(config: Config) -> int:
    """Bytes of an element of the model's dtype: e."""
    return 4 if config.train.precision == "fp32" else 2


def state_bytes(config: Config, world_size: int, rank: int = 0) -> dict[str, int]:
    """Bytes of one rank (of all, the first has most): weights, gradients, and its share of masters and moments.

    With W bytes of the layout's N elements in the model's dtype and n ranks that share them (``parallel.shard``)::

        optimizer   W + 4 N + 12 N / n        gradients   W + (4 N + 12 N) / n        weights   (W + 4 N + 12 N) / n

    where 12 is 8 in fp32, whose weights are the masters; of matrices that Muon updates, 4 less. Buckets are rounded up,
    which the numbers contain.
    """
    grid, parallel = config.grid(world_size), config.parallel
    layouts, width = layouts_of(config, grid, rank), element_bytes(config)
    own = owned_elements(config, world_size, rank)
    elements = sum(layout.total for layout in layouts)
    sums = 1 + (most_waiting(config.grad_accum(world_size)) if config.train.deterministic_reduction == "tree" else 0)
    weights, gradients = width * elements, 4 * elements * sums
    return {
        "weights": weights // grid.shard if parallel.divides_weights else weights,
        "gradients": gradients // grid.shard if parallel.divides_gradients else gradients,
        "optimizer": (8 if width == 4 else 12) * own - 4 * without_second_moment(config, world_size, rank),
    }


def owned_elements(config: Config, world_size: int, rank: int = 0) -> int:
    """Elements whose masters and moments one rank has."""
    return sum(_owned(layout) for layout in layouts_of(config, config.grid(world_size), rank))


@lru_cache(maxsize=64)  # as often as ``_layout``
def _owned(layout: BufferLayout) -> int:
    return sum(part.stop - part.start for part in layout.parts())


def without_second_moment(config: Config, world_size: int, rank: int = 0) -> int:
    """How many of ``owned_elements`` have no second moment: those of matrices that Muon updates."""
    if config.optimizer.style != "muon":
        return 0
    layouts = layouts_of(config, config.grid(world_size), rank)
    parts = (part for layout in layouts for part in layout.parts() if part.parameter.is_hidden_matrix)
    return sum(part.stop - part.start for part in parts)


def kept_bytes(config: Config, backends: Mapping[str, Backend], rank: int = 0) -> int:
    """Activations of a micro-batch when its head begins: what layers keep, and what is kept around them."""
    cp_rank = rank // config.parallel.tensor_model_parallel_size % config.parallel.context_parallel_size
    return activation_bytes(config, backends, cp_rank) + angle_bytes(config) + around_layers(config)


def angle_bytes(config: Config) -> int:
    """Bytes of RoPE's cos and sin of each token, with document masks and under context parallelism."""
    if config.data.attention_mask != "document" and config.parallel.context_parallel_size == 1:
        return 0
    return config.tokens_per_rank * element_bytes(config) * config.model.head_size


def around_layers(config: Config) -> int:
    """Bytes kept of a micro-batch beside its layers and RoPE's angles: the final norm, the embedding's indices, and a
    scalar, a token's weight."""
    at, rows = config.placement(), config.tokens_per_rank
    final_norm = 2 * element_bytes(config) * config.model.hidden_size + 4  # the sum and its normalised form, rstd
    packed = config.data.attention_mask == "document" and config.parallel.context_parallel_size == 1
    indices = 8 if packed and config.train.micro_batch_size > 1 else 0  # the tokens of all samples in one row
    if at.tp_size > 1:
        indices = 9  # rows of this rank's shard, and which tokens have one
    return rows * final_norm // at.sequence_shards + rows * indices + 4


def collectives(config: Config, world_size: int, rank: int, chunk_tokens: int) -> Counter[Collective]:
    """Every collective of a step of ``rank``, and how often.

    Args:
        chunk_tokens: rows of the head's logits that exist at once (``kernels.loss_chunk_tokens``).
    """
    grid, labelled = config.grid(world_size), Counter[Collective]()
    for (axis, kind, size), number in calls(config, world_size, rank, chunk_tokens).items():
        if ranks_of(grid, axis) > 1 and number:
            first = next(label for label in LABELS if _same_ranks(grid, label, axis))
            labelled[Collective(first, kind, size)] += number
    return labelled


def calls(config: Config, world_size: int, rank: int, chunk_tokens: int) -> Counter[tuple[str, str, int]]:
    """The same collectives as (axis, kind, bytes), by what they are for; those on axes of one rank, too."""
    grid = config.grid(world_size)
    counted: Counter[tuple[str, str, int]] = Counter()
    accumulated, placements = config.grad_accum(world_size), placements_of(config, grid, rank)
    if grid.tp > 1:
        for (kind, size), number in _tensor_parallel(config, placements).items():
            counted["tp", kind, size] = number * accumulated
        for rows in _chunks(config, chunk_tokens) if placements[-1].has_head else []:
            counted["tp", "all-gather", grid.tp * ROW_STATISTICS * rows] += accumulated
    for (kind, size), number in _context_parallel(config, placements).items():
        counted["cp", kind, size] += number * accumulated
    if grid.pp > 1:
        counted["pp", "all-reduce", _table_bytes(config)] += 1
        arrive = len(placements) - placements[0].has_embedding
        leave = len(placements) - placements[-1].has_head
        for kind in ("receive", "send"):  # forward from one side, backward from the other
            size = _hidden_bytes(config) // placements[0].sequence_shards
            counted["pp", kind, size] += (arrive + leave) * accumulated
    counted += _data_parallel(config, grid, rank)
    if config.optimizer.style == "muon":
        counted += _whole_matrices(config, grid, rank)
    if config.train.deterministic_reduction == "off":
        counted["world", "all-reduce", 4] += 1  # the gradient's squared norm
    return counted


def _tensor_parallel(config: Config, placements: Sequence[Placement]) -> Counter[tuple[str, int]]:
    """Calls of a micro-batch that take a whole [s, b, h], or a chunk of it."""
    layers, again = sum(at.layers_local for at in placements), _recomputed(config, placements)
    once, whole = placements[0].has_embedding + placements[-1].has_head, _hidden_bytes(config)
    if not config.parallel.sequence_parallel:
        return Counter({("all-reduce", whole): 4 * layers + 2 * again + once})
    if config.parallel.tp_comm_overlap != "chunks":
        gathers, scatters = 6 * layers + 2 * again + once, 4 * layers + 2 * again + once
        return Counter({("all-gather", whole): gathers, ("reduce-scatter", whole): scatters})
    tp = placements[0].tp_size
    swaps = (tp - 1) * (6 * layers + 4 * again)
    return Counter({("all-gather", whole): 2 * layers + once, ("reduce-scatter", whole): 2 * layers + once,
                    ("send", whole // tp): swaps, ("receive", whole // tp): swaps})  # fmt: skip


def _context_parallel(config: Config, placements: Sequence[Placement]) -> Counter[tuple[str, int]]:
    """Calls of a micro-batch that take the keys and values of all its tokens, or their gradients."""
    train, layers = config.train, sum(at.layers_local for at in placements)
    again = {"none": 0, "selective": layers, "full": _recomputed(config, placements)}
    elements = train.micro_batch_size * config.data.seq_length * 2 * placements[0].groups_local * config.model.head_size
    return Counter({("all-gather", element_bytes(config) * elements): layers + again[train.recompute],
                    ("reduce-scatter", 4 * elements): layers})  # fmt: skip


def _recomputed(config: Config, placements: Sequence[Placement]) -> int:
    """Layers of a rank that run their forward twice."""
    first = (config.train.recompute_layers or config.model.num_layers) if config.train.recompute == "full" else 0
    return sum(max(0, min(at.layers[1], first) - at.layers[0]) for at in placements)


def _data_parallel(config: Config, grid: Grid, rank: int) -> Counter[tuple[str, str, int]]:
    """Gradients and weights, bucket by bucket; what other ranks sum of their shards; the loss."""
    over, parallel = "dp" if grid.copies == 1 else "shard", config.parallel
    micro_batches, placements = config.grad_accum(grid.world_size), placements_of(config, grid, rank)
    counted: Counter[tuple[str, str, int]] = Counter({("dp", "all-reduce", _table_bytes(config)): 1})
    tree = config.train.deterministic_reduction == "tree"
    if tree:
        blocks = sum(
            -(-row.numel // TreeStore.block) for layout in layouts_of(config, grid, rank) for row in layout.table
        )
        counted["dp", "all-reduce", 4 * blocks] += 1
        counted["tp", "all-gather", 4 * grid.tp] += 1
    for layout, at in zip(layouts_of(config, grid, rank), placements, strict=True):
        uses = uses_of(at.layers, at.has_embedding, at.has_head, is_tied(config, at))
        for bucket in layout.buckets:
            elements = bucket.stop - bucket.start
            part = layout.table[bucket.parameters[0]].part
            gathers = micro_batches * _gathers(config, part, uses) if parallel.divides_weights else 1
            reductions = micro_batches if parallel.divides_gradients else 1
            counted[over, "all-to-all" if tree else "reduce-scatter", 4 * elements] += reductions
            counted[over, "all-gather", element_bytes(config) * elements] += gathers
            counted["copies", "all-reduce", 4 * elements // grid.shard] += 1
        for axis, elements in _shared(layout).items():
            kind, ranks = ("all-gather", ranks_of(grid, axis)) if tree else ("all-reduce", 1)
            counted[axis, kind, 4 * elements * ranks] += 1
    return counted


@lru_cache(maxsize=64)  # as often as ``_layout``
def _shared(layout: BufferLayout) -> Mapping[str, int]:
    """Axis -> elements of this rank's shards that are summed over it."""
    shared: Counter[str] = Counter()
    for s, _, start, stop in layout.slices():
        if s.sum_over != "none":
            shared[{"stages": "ends"}.get(s.sum_over, s.sum_over)] += stop - start
    return shared


def _whole_matrices(config: Config, grid: Grid, rank: int) -> Counter[tuple[str, str, int]]:
    """Pieces of matrices to their owners and back, as on a GPU where ``newton_schulz=auto``."""
    tables = tables_of_stages(config, rank // (grid.world_size // grid.pp))
    layouts, per_head = layouts_of(config, grid, rank), config.optimizer.muon_per_head
    plan = plan_exchange(layouts, tables, rank % grid.whole, flops, per_head)
    width = 4 if config.optimizer.newton_schulz == "fp32" else 2
    axis = {"replicas": "dp"}.get(grid.whole_axis, grid.whole_axis)
    return Counter(
        (axis, "all-to-all", width * max(sum(part.sizes(side, copies)) for side in (part.sent, part.received)))
        for part in plan.rounds(ELEMENTS_OF_A_ROUND)
        for copies in (False, True)
    )


def _gathers(config: Config, part: str, uses: Mapping[str, Use]) -> int:
    """How often a micro-batch gathers the weights of a part that are not kept."""
    if part == "embedding":
        return sum(use.part == part for use in uses.values())  # twice where it is the head, too; for forward alone
    once = part == "head" or uses[part].stays  # the head's gradients are made in forward
    return 1 if once or not config.parallel.reshard_after_forward else 2


def is_tied(config: Config, at: Placement) -> bool:
    """Whether head and embedding are one weight of this stage; a last stage without embedding has a copy."""
    return config.model.tie_word_embeddings and at.has_embedding and at.has_head


def placements_of(config: Config, grid: Grid, rank: int) -> list[Placement]:
    """What the stages of a rank hold."""
    stages = config.pipeline(rank // (grid.world_size // grid.pp)).stages
    return [config.placement(rank % grid.tp, stage) for stage in stages]


def layouts_of(config: Config, grid: Grid, rank: int) -> list[BufferLayout]:
    """Where the store of each of a rank's stages puts its weights."""
    place, parallel = rank // grid.tp % grid.shard, config.parallel
    by_part, size = parallel.divides_weights, parallel.gradient_bucket_bytes
    block = FlatStore.block if config.train.deterministic_reduction == "off" else TreeStore.block
    placements = placements_of(config, grid, rank)
    return [_layout(config.model, at, size, grid.shard, place, by_part, block) for at in placements]


@lru_cache(maxsize=64)  # a search asks for the same many times
def _layout(
    model: ModelConfig, at: Placement, bucket_bytes: int, ranks: int, rank: int, by_part: bool, block: int
) -> BufferLayout:
    return BufferLayout(parameter_table(model, at), bucket_bytes, ranks, rank, by_part, block)


def _table_bytes(config: Config) -> int:
    """Bytes of the table of losses by source (``train/source_sums.py``)."""
    return 4 * BYTES_OF_SUM * max(1, len(config.data.train_prefixes))


def _hidden_bytes(config: Config) -> int:
    return config.tokens_per_rank * config.model.hidden_size * element_bytes(config)


def _chunks(config: Config, chunk_tokens: int) -> list[int]:
    """Rows of each chunk of a micro-batch."""
    rows = config.tokens_per_rank
    return [min(chunk_tokens, rows - start) for start in range(0, rows, chunk_tokens)]


def ranks_of(grid: Grid, label: Any) -> int:
    """How many ranks a group has, by its label in ``collectives``."""
    return grid.world_size if label == "world" else grid.size("replicas" if label == "dp" else label)


def _same_ranks(grid: Grid, label: str, axis: str) -> bool:
    """Two labels mean the same group where they are equal, or where both have all ranks (kv: all of its axis)."""
    if label == axis:
        return True
    whole = {name: ranks_of(grid, name) for name in (label, axis)}
    return whole[label] == whole[axis] == grid.world_size or ({label, axis} == {"tp", "kv"} and grid.kv == grid.tp)
