"""The memory that one rank of a layout needs at the worst moment of a step, by part: formulas, as in ``rank_costs.py``.

State is there always; activations come and go, and the worst moment is one of these. With R rows of a rank between the
matrices and T inside of them (R = T / t under sequence parallelism), h hidden, f feed-forward columns, n heads and g
groups of d, v rows of the vocabulary of this rank, c tokens of a chunk of logits, e bytes an element::

    head       what layers and final norm keep, gradient of the head's input T h, logits c v; under sequence parallelism
               the gathered input T h and the scattered gradient R h
    backward   what layers keep, and in the feed-forward part of the last layer the gradient of the residual stream R h,
               and the larger of: that of the product and of gate and up, 2 T f beyond what is given up by then; or the
               gathered gradient T h and that of the product T f; or those of the gathered input and what is scattered
               of it. selective: the product made again, 4 T f. full: a whole layer made again
    attention  under context parallelism, the gradients of the keys and values of all ranks in fp32
    begin, end where rows are few beside what is gathered: the embedding's part of a micro-batch, and 2 R h

Of a rank of a pipeline these are asked at each action of a step (``Pipeline.instants``), with the micro-batches of each
of its stages that are in flight then, the messages received ahead, and those sent whose arrival nobody has waited for.

On a CPU pages that a rank once had stay with it: those of buckets go from one to the next (``base/pages.py``), those of
activations stay in the arena of large results (``csrc/cpu/arena.hpp``). So there the most that was ever gathered counts
beside the most that was ever kept, whichever moments they are of, and memory for what other ranks send of a bucket's
sum. Without instructions for bf16 an operand of a product is there in fp32, too, and a block of the other one
(``kernels/wide_products.py``).

What libraries take for themselves, and holes between allocations, are not in it. ``verify/one_rank.py`` counts the same
in the program, without what is a CPU's alone; ``tests/costs/test_rank_peak.py`` holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from megatron_hammer.config import Config, KernelsConfig, Recompute
from megatron_hammer.costs.rank_buffers import StageBuffers, arriving_bytes
from megatron_hammer.costs.rank_costs import angle_bytes, around_layers, element_bytes, placements_of, state_bytes
from megatron_hammer.kernels import wide_products
from megatron_hammer.kernels.backend import Backend
from megatron_hammer.kernels.linear_cross_entropy import CHUNK_TOKENS
from megatron_hammer.kernels.selection import COMPUTE_DTYPES, TABLES
from megatron_hammer.model.recompute import activation_bytes, keys_seen
from megatron_hammer.parallel.pipeline import largest_instants
from megatron_hammer.parallel.placement import Placement

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
GATHERED, ACTIVATIONS, BUFFERS, MESSAGES = "gathered", "activations", "head, backward", "messages"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, ACTIVATIONS, BUFFERS, MESSAGES)
"""In the order in which they are shown."""


def fused_backends(kernels: KernelsConfig) -> dict[str, Backend]:
    """The backends that a GPU will mostly have: as the config names them, else the first that is no reference."""
    named = {name: getattr(kernels, name, "auto") for name in TABLES}
    return {
        name: next(row for row in table if row.name == named[name] or (named[name] == "auto" and row.name != "torch"))
        for name, table in TABLES.items()
    }


def rank_peak(
    config: Config, world_size: int, rank: int, backends: Mapping[str, Backend], device: str = "cuda"
) -> dict[str, int]:
    """Bytes of one rank at its worst moment, by part of ``PARTS``; the sum is what it needs."""
    grid = config.grid(world_size)
    pp_rank, cp_rank = rank // (world_size // grid.pp), rank // grid.tp % grid.cp
    pipeline, placements = config.pipeline(pp_rank), placements_of(config, grid, rank)
    buffers = StageBuffers(config, world_size, rank)
    kept = [activation_bytes(config, backends, cp_rank, stage) + angle_bytes(config) for stage in pipeline.stages]
    backward = [list(_backward(config, at, backends, cp_rank)) for at in placements]
    head = _head(config, placements[-1], device) if placements[-1].has_head else 0
    rows, found = _rows(config, placements[-1]), list[tuple[int, int, int, int]]()
    for instant in largest_instants(pipeline, min(config.grad_accum(world_size), pipeline.steady_after)):
        own, gathered = instant.own, buffers.at(instant.own, instant.begun, instant.held)
        whole = sum(count * size for count, size in zip(instant.in_flight, kept, strict=True))
        others, messages = whole - kept[own], instant.messages * rows  # others: without what begins or ends
        if instant.kind == "forward":
            needs = [(gathered["begin"], others, 2 * rows), (gathered["forward"], whole, 2 * rows)]
            if placements[own].has_head:
                needs.append((gathered["head"], whole + around_layers(config), head))
        else:
            needs = [(gathered[name], whole - over, beside) for name, over, beside in backward[own]]
            needs.append((gathered["end"], others, 2 * rows))
        found += [(*need, messages) for need in needs]
    most = max(found, key=sum)
    if device == "cpu":
        _, activations, beside, messages = max(found, key=lambda need: sum(need[1:]))
        messages += arriving_bytes(config, world_size, rank)
        most = max(need[0] for need in found), activations, beside + _widened(config, placements), messages
    return {
        **state_bytes(config, world_size, rank),
        **dict(zip((GATHERED, ACTIVATIONS, BUFFERS, MESSAGES), most, strict=True)),
    }


def worst_rank(config: Config, world_size: int, backends: Mapping[str, Backend]) -> tuple[int, dict[str, int]]:
    """The rank of a pipeline that needs most (its number along pp), and what it needs."""
    config, grid = config.largest, config.grid(world_size)
    first = {pp: pp * (world_size // grid.pp) for pp in ranks_that_differ(config)}
    each = {pp: rank_peak(config, world_size, rank, backends) for pp, rank in first.items()}
    worst = max(each, key=lambda pp: sum(each[pp].values()))
    return worst, each[worst]


def ranks_that_differ(config: Config) -> list[int]:
    """The pipeline ranks that may need most: of those with as many layers and the same ends the first.

    Of other axes the first rank has most.
    """
    split, size = config.layer_split(), config.parallel.pipeline_model_parallel_size
    seen: dict[tuple[object, ...], int] = {}
    for rank in range(size):
        stages = config.pipeline(rank).stages
        seen.setdefault((0 in stages, len(split) - 1 in stages, *(split[stage] for stage in stages)), rank)
    return list(seen.values())


def _widened(config: Config, placements: Sequence[Placement]) -> int:
    """Bytes of scratch memory for bf16 products on a CPU that has none: an operand, a block of the other, the result.

    Layers, head and evaluations use one set in turn.
    """
    if not wide_products.pay_here(torch.device("cpu"), COMPUTE_DTYPES[config.train.precision]):
        return 0
    h, f, tokens = config.model.hidden_size, max(at.ffn_local for at in placements), config.tokens_per_rank
    wanted = [(tokens, h, f), (tokens, 2 * f, h)]
    if placements[-1].has_head:
        assert config.model.vocab_size is not None
        wanted.append((_chunk(config, "cpu"), placements[-1].vocab_rows_local(config.model.vocab_size), h))
    each = [wide_products.scratch_elements(*products) for products in wanted]
    return 4 * sum(max(sizes[i] for sizes in each) for i in range(3))


def _rows(config: Config, at: Placement) -> int:
    """R h e: bytes of a rank's rows of the residual stream."""
    return element_bytes(config) * config.tokens_per_rank * config.model.hidden_size // at.sequence_shards


def _chunk(config: Config, device: str) -> int:
    """c: tokens whose logits are there at a time."""
    return min(config.tokens_per_rank, config.kernels.loss_chunk_tokens or CHUNK_TOKENS[device])


def _head(config: Config, at: Placement, device: str) -> int:
    """Bytes beside what is kept, while the head computes."""
    assert config.model.vocab_size is not None
    tokens, size = config.tokens_per_rank, element_bytes(config)
    logits = size * _chunk(config, device) * at.vocab_rows_local(config.model.vocab_size)
    whole = size * tokens * config.model.hidden_size
    gathered = whole + _rows(config, at) if at.sequence_shards > 1 else 0
    return logits + whole + gathered + 4 * tokens


def _backward(
    config: Config, at: Placement, backends: Mapping[str, Backend], cp_rank: int
) -> Iterator[tuple[str, int, int]]:
    """Moments in the backward of layers: (name in ``rank_buffers.py``, bytes that are kept no more, bytes beside)."""
    train, size, rows = config.train, element_bytes(config), _rows(config, at)
    t, by_rows = config.tokens_per_rank, at.sequence_shards > 1
    product, whole = size * t * at.ffn_local, size * t * config.model.hidden_size
    beside = {
        "down": product + (whole if by_rows else 0),
        "between": 2 * product,
        "gate_up": whole - product + (whole + rows if by_rows else 0),
    }
    if train.recompute == "selective":
        beside = {"down": product + beside["down"], "between": 4 * product, "gate_up": beside["gate_up"] + product}
    if config.parallel.context_parallel_size > 1:
        beside["gate_up"] = max(beside["gate_up"], _keys(config, at, cp_rank) - 3 * product)
    recomputed = 0 if train.recompute != "full" else train.recompute_layers or config.model.num_layers
    if at.layers_local > 1:  # a layer earlier, when what the last one kept is over
        over = 2 * rows if recomputed else activation_bytes(_one_layer(config, train.recompute), backends, cp_rank)
        beside["earlier"] = beside["down"] - over
    for name, more in beside.items() if at.layers_local else ():
        if recomputed < at.layers[1]:
            yield name, 0, rows + more
        if recomputed > at.layers[0]:
            again = activation_bytes(_one_layer(config), backends, cp_rank)
            later = max(0, at.layers[1] - recomputed) * (again - rows)  # of those after it, which are over by then
            yield name, round(later), rows + again + more


def _keys(config: Config, at: Placement, cp_rank: int) -> int:
    """Bytes in the backward of attention under context parallelism: of queries, and of keys and values of all ranks."""
    size, t, d = element_bytes(config), config.tokens_per_rank, config.model.head_size
    pairs, whole = 2 * at.groups_local * d, t * config.parallel.context_parallel_size
    keys = keys_seen(config, cp_rank)
    return 2 * size * t * at.heads_local * d + (size + 2) * keys * pairs + 4 * (whole + t) * pairs


def _one_layer(config: Config, recompute: Recompute = "none") -> Config:
    """The same with one layer on one stage."""
    parallel = replace(config.parallel, pipeline_model_parallel_size=1, virtual_pipeline_stages=1, pipeline_split=None)
    train = replace(config.train, recompute=recompute, recompute_layers=None)
    return replace(config, model=replace(config.model, num_layers=1), parallel=parallel, train=train)
