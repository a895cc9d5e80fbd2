"""How long a step of a layout takes, by a roofline with stated efficiencies: the busiest rank, part by part.

Counted: operations and bytes of each part of the model that a rank has (``budget.py``) and every collective of a step
(``rank_costs.py``). Assumed: what share of the published rates the kernels reach (``Efficiency``), the links, and what
runs beside what::

    micro-batch    products, attention and what moves memory, one after the other; what recompute adds
    tp, cp         in the micro-batch; of tp what no product hides (``Division`` in kernels/linear.py)
    pp             ranks wait for ``Pipeline.bubble`` micro-batches a step, and for the messages of as many; of the
                   others for what takes longer than their computation
    dp             reduction beside backward, of the last micro-batch or of each (``parallel.shard``), gathers beside
                   forward; what is longer than that is waited for
    optimizer      bytes of the states that the rank updates
    gaps           launches, Python, data: a share of the rest

A collective takes its bytes over the slowest link of its ring, of which a node has one for each of the group's ranks in
it, and a latency. Against published runs of 1B to 70B models the sum is 0 to 30 % optimistic (docs/planning.md).
Needs no GPU.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from megatron_hammer.config import Config
from megatron_hammer.costs.budget import (
    ATTENTION,
    CASTS,
    GRADIENTS,
    HEAD_PRODUCTS,
    LAYER_PRODUCTS,
    OPTIMIZER,
    Cost,
    Rates,
    StepShape,
    layer_products,
    micro_batch_costs,
    recomputed_costs,
    step_costs,
)
from megatron_hammer.costs.flops import flops_per_token
from megatron_hammer.costs.gpus import Gpu
from megatron_hammer.costs.rank_costs import calls, element_bytes, owned_elements, placements_of, ranks_of
from megatron_hammer.costs.rank_peak import ranks_that_differ
from megatron_hammer.kernels.linear_cross_entropy import CHUNK_TOKENS
from megatron_hammer.kernels.newton_schulz import flops as newton_schulz_flops
from megatron_hammer.model.parameters import EMBEDDING, logical_shapes
from megatron_hammer.parallel.grid import Grid

COMPUTE, RECOMPUTE, TENSOR, CONTEXT, PIPELINE, DATA, UPDATE, GAPS = (
    "compute", "recompute", "TP", "CP", "PP", "DP", "optimizer", "gaps",
)  # fmt: skip
PARTS = (COMPUTE, RECOMPUTE, TENSOR, CONTEXT, PIPELINE, DATA, UPDATE, GAPS)
"""In the order in which they are shown."""

# What of the tensor-parallel collectives no product hides. Of a layer's ten with sequence parallelism six are waited
# for (two gathers and two scatters forward, two gathers backward), of the four without it two.
WAITED_FOR = {"off": 1.0, "bulk": 0.6, "chunks": 0.25}
WAITED_FOR_WHOLE = 0.5
HIDDEN_SUMS = 0.3  # of the bytes of gradients' sums, beside the product that adds to them (benchmarks/roofline.py)
CAST_MOVES = 3  # of an operand in 8 bits: read for its largest value, read and written for the cast (in 16-bit units)
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Efficiency:
    """Shares of published rates that are reached; chosen so that published runs are met (docs/planning.md)."""

    products: float = 0.65
    """Of the dense peak, in matrix products: large ones reach 0.8 for a moment (790 of 989 TFLOP/s on an H200), less in
    the shapes and at the power of a training step."""
    attention: float = 0.40
    """Of the dense peak, forward and backward, half of the square counted (334 of 989 at head size 64, more at 128)."""
    memory: float = 0.75
    """Of the memory's bandwidth, in norms, RoPE, SwiGLU, loss and update."""
    links: float = 0.80
    """Of the links' bandwidth, in large messages."""
    fp8: float = 1.65
    """Times the rate of 16-bit products (1,300 against 790 TFLOP/s on an H200)."""
    gaps: float = 0.05
    """Of the rest of a step."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run and what joins them."""

    name: str
    gpu: Gpu
    gpus_per_node: int = 8
    network: float = 50.0
    """GB/s of a GPU in one direction between nodes; 50 is one port of 400 Gbit/s each."""
    latency: float = 20e-6
    """Seconds of a collective, however small."""
    efficiency: Efficiency = field(default_factory=Efficiency)

    def peak_flops(self, precision: str) -> float:
        """Dense peak in ``train.precision``, a second."""
        return (self.gpu.peak(precision) or 0.0) * TERA

    def seconds(self, part: str, cost: Cost, precision: str, fp8: bool = False) -> float:
        """Seconds of one part of the model."""
        share = self.efficiency.attention if part == ATTENTION else self.efficiency.products
        times = self.efficiency.fp8 if fp8 and part == LAYER_PRODUCTS else 1.0
        rate, bandwidth = share * times * self.peak_flops(precision), self.efficiency.memory * self.gpu.bandwidth * TERA
        return Rates(rate, bandwidth).seconds(cost)

    def collective(self, kind: str, size: int, ranks: int, stride: int) -> float:
        """Seconds of one call whose whole tensor has so many bytes, among ranks that are ``stride`` apart."""
        together = min(ranks, max(1, self.gpus_per_node // stride))
        link = self.gpu.link if together == ranks else min(self.gpu.link, self.network * together)
        passes = {"all-reduce": 2 * (ranks - 1) / ranks, "send": 1.0, "receive": 0.0}.get(kind, (ranks - 1) / ranks)
        return self.latency * (kind != "receive") + passes * size / (link * GIGA * self.efficiency.links)


@dataclass(frozen=True)
class StepTime:
    """The prediction for a step."""

    seconds: dict[str, float]
    """By part."""
    tokens: int
    """Of all ranks."""
    mfu: float
    """As ``metrics.jsonl`` has it: all of attention's square counted."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all ranks together."""
        return self.tokens / self.total


def step_time(config: Config, world_size: int, cluster: Cluster) -> StepTime:
    """Predict a step of ``config``, which is valid for ``world_size`` ranks and has its vocabulary."""
    grid, accumulated = config.grid(world_size), config.grad_accum(world_size)
    each = [_RankTimes(config, grid, cluster, pp * (world_size // grid.pp)) for pp in ranks_that_differ(config)]
    busiest = max(each, key=lambda rank: sum(rank.micro_batch.values()))
    seconds = {part: accumulated * time for part, time in busiest.micro_batch.items()}
    one = sum(busiest.micro_batch.values())
    message = max(rank.message for rank in each)
    seconds[PIPELINE] = config.pipeline().bubble * (one + 2 * message) + accumulated * max(0.0, message - one)
    seconds[DATA] = max(rank.data_parallel(one) for rank in each)
    seconds[UPDATE] = max(rank.update for rank in each)
    gaps = cluster.efficiency.gaps
    seconds[GAPS] = gaps / (1 - gaps) * sum(seconds.values())
    total, tokens = sum(seconds.values()), config.tokens_per_step
    full, _ = flops_per_token(config.model, config.data.seq_length)
    mfu = full * tokens / total / (world_size * cluster.peak_flops(config.train.precision))
    return StepTime({part: seconds[part] for part in PARTS}, tokens, mfu)


class _RankTimes:
    """One rank's times."""

    def __init__(self, config: Config, grid: Grid, cluster: Cluster, rank: int) -> None:
        self.config, self.grid, self.cluster = config, grid, cluster
        self.precision, self.fp8 = config.train.precision, config.kernels.fp8 != "off"
        chunk = config.kernels.loss_chunk_tokens or CHUNK_TOKENS["cuda"]
        self.accumulated = accumulated = config.grad_accum(grid.world_size)
        self.times: defaultdict[tuple[str, str], float] = defaultdict(float)
        """(axis, kind) -> seconds of a step."""
        for (axis, kind, size), number in calls(config, grid.world_size, rank, chunk).items():
            if (ranks := ranks_of(grid, axis)) > 1:
                self.times[axis, kind] += number * cluster.collective(kind, size, ranks, _stride(grid, axis))
        self.message = self._of("pp") / accumulated
        shapes = self._shapes(rank)
        self.micro_batch = {
            COMPUTE: sum(self._compute(shape) for shape in shapes),
            RECOMPUTE: sum(self._recompute(shape) for shape in shapes),
            TENSOR: self._waited_for_tp() / accumulated,
            CONTEXT: self._of("cp") / accumulated,
        }
        updated = owned_elements(config, grid.world_size, rank)
        update = step_costs(StepShape(config.model, 1, 1, 1, element_bytes(config), True, None, updated))[OPTIMIZER]
        self.update = cluster.seconds(OPTIMIZER, update, self.precision)
        self.update += self._of("world") + self._of("kv") + self._of("ends")
        if config.optimizer.style == "muon":
            self.update += self._newton_schulz() + self._of("whole")

    def data_parallel(self, micro_batch: float) -> float:
        """What of the gradients' and the weights' way no computation hides."""
        parallel, accumulated = self.config.parallel, self.accumulated
        reduced = sum(self.times[axis, kind] for axis in ("dp", "shard") for kind in ("reduce-scatter", "all-to-all"))
        gathered = sum(self.times[axis, "all-gather"] for axis in ("dp", "shard"))
        backward = 2 / 3 * micro_batch * (accumulated if parallel.divides_gradients else 1)
        forward = 1 / 3 * micro_batch
        if parallel.divides_weights:  # forward and backward, but for backward's share that reduces
            forward = micro_batch * accumulated
            backward = max(0.0, backward - 2 / 3 * gathered)
        if not parallel.overlap_grad_reduce:
            backward = 0.0
        if not parallel.overlap_param_gather:
            forward = 0.0
        last = self.times["dp", "all-reduce"] + self._of("copies")
        return max(0.0, reduced - backward) + max(0.0, gathered - forward) + last

    def _of(self, axis: str) -> float:
        return sum(time for (on, _), time in self.times.items() if on == axis)

    def _waited_for_tp(self) -> float:
        parallel = self.config.parallel
        share = WAITED_FOR[parallel.tp_comm_overlap]
        if parallel.tp_comm_overlap == "bulk" and not parallel.sequence_parallel:
            share = WAITED_FOR_WHOLE
        return share * self._of("tp")

    def _shapes(self, rank: int) -> list[StepShape]:
        config, tokens, length = self.config, self.config.tokens_per_rank, self.config.data.seq_length
        return [
            StepShape(config.model, tokens, self.accumulated, length, element_bytes(config), False, at)
            for at in placements_of(config, self.grid, rank)
        ]

    def _compute(self, shape: StepShape) -> float:
        costs = micro_batch_costs(shape)
        if self.fp8:  # operands of forward, and the gradients; weights once a step
            products = layer_products(shape.model, shape.part)
            moved = sum(inputs + outputs for inputs, outputs in products) * shape.tokens * shape.part.layers_local
            costs[CASTS] = Cost(0, CAST_MOVES * shape.element_bytes * moved)
        costs[GRADIENTS] = step_costs(shape)[GRADIENTS] * ((1 - HIDDEN_SUMS) / self.accumulated)
        return sum(self.cluster.seconds(part, cost, self.precision, self.fp8) for part, cost in costs.items())

    def _recompute(self, shape: StepShape) -> float:
        train, (start, stop) = self.config.train, shape.part.layers
        layers = stop - start
        if train.recompute == "full":
            layers = max(0, min(stop, train.recompute_layers or self.config.model.num_layers) - start)
        costs = recomputed_costs(shape, train.recompute, layers)
        return sum(self.cluster.seconds(part, cost, self.precision, self.fp8) for part, cost in costs.items())

    def _newton_schulz(self) -> float:
        """Seconds of Muon's products for this rank's equal share of the model's matrices."""
        shapes = (s for name, s in logical_shapes(self.config.model).items() if len(s) == 2 and name != EMBEDDING)
        flops = sum(newton_schulz_flops(*shape) for shape in shapes if self.config.model.vocab_size not in shape)
        cost = Cost(flops / (self.grid.whole * self.grid.pp))
        return self.cluster.seconds(HEAD_PRODUCTS, cost, self.config.optimizer.newton_schulz)


def _stride(grid: Grid, axis: str) -> int:
    """How far apart two neighbours on an axis of ``rank_costs.calls`` are."""
    far = {"cp": grid.tp, "dp": grid.tp, "shard": grid.tp, "copies": grid.tp * grid.shard}
    far |= dict.fromkeys(("pp", "ends"), grid.tp * grid.replicas)
    return far.get(axis, 1)
