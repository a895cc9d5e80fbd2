"""What each part of a training step would take at the limit of the device: counted operations, counted bytes, no torch.

For profiles, which show each part beside its limit, and for forecasts (``rank_speed.py``), which need those of one rank
of a layout. A part's limit is that of a roofline: the longer of its floating-point operations at the rate of a large
matrix product and its bytes at the bandwidth of a large copy. Bytes are those of ideal fused kernels, each tensor read
and written once (T tokens a micro-batch, h hidden, f feed-forward, n and g heads of width d, v padded vocabulary, e
bytes an element, L layers; of one rank of a layout all of these are its own, and the norms have its share of the
rows)::

    layer products   6 T (h (n + 2g) d + n d h + 3 h f) L FLOPs; the three tensors of each of the three products
    head products    6 T h v FLOPs, v without its padding
    attention        6 T n d s L FLOPs, half of the square (s: documents' mean length where they are masked)
    norm, residual   forward 4 T h e (x and branch read, sum and normed written), backward 4 T h e; 2 L + 1 of them
    RoPE             queries and keys read and written, forward and backward: 4 T (n + g) d e L
    SwiGLU           forward 3 T f e, backward 5 T f e, L of them
    embedding        rows read and written, their gradients read and added in fp32
    loss             each logit read once and written once, 2 T v e
    gradients        fp32 sums of all matrices read and written, 8 B a weight; the first micro-batch only writes
    optimizer        a parameter: gradient twice (norm, update) 8 B, master and moments 24 B, 16-bit copy 2 B

Nothing is recomputed in this count: what ``train.recompute`` adds shows as distance from the limit. So does everything
that an ideal step lacks: data, communication, gaps. ``flops.py`` has the sum of the FLOPs here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hammer.config import Config, ModelConfig

# Parts that are ranges of the model and the optimizer, under the same names.
from megatron_hammer.kernels.ranges import ATTENTION as ATTENTION
from megatron_hammer.kernels.ranges import EMBEDDING as EMBEDDING
from megatron_hammer.kernels.ranges import NORM as NORM
from megatron_hammer.kernels.ranges import OPTIMIZER as OPTIMIZER
from megatron_hammer.kernels.ranges import ROPE as ROPE
from megatron_hammer.kernels.ranges import SWIGLU as SWIGLU
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.parallel.placement import Placement, place

LAYER_PRODUCTS = "layer products"
HEAD_PRODUCTS = "head products"
ELEMENTWISE = "norm, RoPE, SwiGLU"
"""The three above in one, where a compiler has fused whole layers."""
LOSS = "loss"
CASTS = "fp8 casts"
GRADIENTS = "gradient accumulation"
COMMUNICATION = "communication"
DATA = "data"
OTHER = "other operations"
GAPS = "gaps"

PARTS = (
    LAYER_PRODUCTS, HEAD_PRODUCTS, ATTENTION, NORM, ROPE, SWIGLU, ELEMENTWISE, EMBEDDING, LOSS, CASTS, GRADIENTS,
    OPTIMIZER, COMMUNICATION, DATA, OTHER, GAPS,
)  # fmt: skip
"""In the order in which they are shown."""

GRADIENT_BYTES = 4  # fp32 sums, whatever the model's dtype


@dataclass(frozen=True)
class Cost:
    """The least that a part of a step needs: operations, and bytes that are moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Rates:
    """How fast a device is."""

    flops_per_second: float
    """Floating-point operations in a large matrix product."""
    bandwidth: float
    """Bytes a second, read and written, in a large copy."""

    def seconds(self, cost: Cost) -> float:
        """The limit of a part: the longer of computing and moving."""
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bandwidth)


@dataclass(frozen=True)
class StepShape:
    """The sizes of one step of one process, or of one rank's stage."""

    model: ModelConfig
    tokens: int
    """T, of one micro-batch."""
    micro_batches: int
    attention_length: float
    """Over how many positions a token's attention extends, twice the mean: the sample's length without document masks,
    with them the mean length of the documents that the tokens are in, sum of squares / sum."""
    element_bytes: int
    """Of weights and activations."""
    fused_accumulation: bool
    """Gradients are added inside the matrix products, as a GPU's do, not by a pass of their own."""
    at: Placement | None = None
    """What of the model it has; None: all."""
    updated: int | None = None
    """Parameters that it updates; None: all."""

    @property
    def part(self) -> Placement:
        """What of the model it has."""
        return self.at or place(self.model)

    @classmethod
    def of(cls, config: Config, attention_length: float | None = None, fused_accumulation: bool = False) -> StepShape:
        """The shape of a config on one process; ``attention_length`` where documents are masked."""
        return cls(
            config.model,
            config.train.micro_batch_size * config.data.seq_length,
            config.grad_accum(1),
            config.data.seq_length if attention_length is None else attention_length,
            4 if config.train.precision == "fp32" else 2,
            fused_accumulation,
        )


def layer_products(model: ModelConfig, at: Placement | None = None) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's four matrices: fused queries, keys and values; output; gate and up; down."""
    at = at or place(model)
    h, d, f, n, g = model.hidden_size, model.head_size, at.ffn_local, at.heads_local, at.groups_local
    return [(h, (n + 2 * g) * d), (n * d, h), (h, 2 * f), (f, h)]


def step_costs(shape: StepShape) -> dict[str, Cost]:
    """What each part of one step needs at least; parts that an ideal step lacks are absent."""
    costs = {part: cost * shape.micro_batches for part, cost in micro_batch_costs(shape).items()}
    model, at, weights = shape.model, shape.part, _matrix_weights(shape)
    accumulation = Cost(0, GRADIENT_BYTES * weights * (2 * shape.micro_batches - 1))
    if shape.fused_accumulation:
        head = model.hidden_size * _vocab_rows(shape) * at.has_head / max(1, weights)
        if at.has_head:
            costs[HEAD_PRODUCTS] += Cost(0, accumulation.bytes * head)
        costs[LAYER_PRODUCTS] += Cost(0, accumulation.bytes * (1 - head))
    else:
        costs[GRADIENTS] = accumulation
    copy = 2 if shape.element_bytes == 2 else 0  # in fp32 the master is the parameter
    updated = count_parameters(model) if shape.updated is None else shape.updated
    costs[OPTIMIZER] = Cost(0, (2 * GRADIENT_BYTES + 24 + copy) * updated)
    return {part: costs[part] for part in PARTS if part in costs}


def micro_batch_costs(shape: StepShape) -> dict[str, Cost]:
    """What each part of one micro-batch needs, forward and backward, without the sums of gradients."""
    model, t, e, at = shape.model, shape.tokens, shape.element_bytes, shape.part
    h, f, d, layers = model.hidden_size, at.ffn_local, model.head_size, at.layers_local
    n, g, v = at.heads_local, at.groups_local, model.vocab_size
    assert v is not None, "model.vocab_size must be resolved before a step is described"
    products = Cost()
    for inputs, outputs in layer_products(model, at):
        products += _products(t, inputs, outputs, e)
    norms = 2 * layers + at.has_head
    costs = {
        LAYER_PRODUCTS: products * layers,
        ATTENTION: Cost(6 * t * n * d * shape.attention_length * layers, 6 * t * (n + g) * d * e * layers),
        # A stage's first norm has no branch to add; the last one's sum has no reader and so no gradient.
        NORM: Cost(0, (8 * norms - 2 - at.has_head) * t * h * e / at.sequence_shards),
        ROPE: Cost(0, 4 * t * (n + g) * d * e * layers),
        SWIGLU: Cost(0, 8 * t * f * e * layers),
    }
    if at.has_embedding:
        costs[EMBEDDING] = Cost(0, t * h * (3 * e + 2 * GRADIENT_BYTES))
    if at.has_head:
        rows = _vocab_rows(shape)
        costs[HEAD_PRODUCTS] = Cost(6 * t * h * v / at.tp_size, _products(t, h, rows, e).bytes)
        costs[LOSS] = Cost(0, 2 * t * rows * e)
    return costs


def recomputed_costs(shape: StepShape, mode: str, layers: int) -> dict[str, Cost]:
    """What ``train.recompute`` adds to a micro-batch.

    A third of the products of ``layers`` layers with full, and with either of what is between them the forward's part:
    a third of attention's operations, half of the norms' and RoPE's bytes, three of SwiGLU's eight.
    """
    if mode == "none":
        return {}
    own, costs = max(1, shape.part.layers_local), micro_batch_costs(shape)
    forward = {ATTENTION: 1 / 3, NORM: 1 / 2, SWIGLU: 3 / 8}
    if mode == "full":
        forward |= {LAYER_PRODUCTS: 1 / 3, ROPE: 1 / 2}
    return {part: costs[part] * (share * layers / own) for part, share in forward.items()}


def _products(rows: int, inputs: int, outputs: int, element_bytes: int) -> Cost:
    """Forward, input gradient and weight gradient; what the last one writes counts as gradient accumulation."""
    elements = 3 * rows * (inputs + outputs) + 2 * inputs * outputs
    return Cost(6 * rows * inputs * outputs, elements * element_bytes)


def _vocab_rows(shape: StepShape) -> int:
    """Rows of the embedding, or of the head, on this rank, padding included."""
    assert shape.model.vocab_size is not None
    return shape.part.vocab_rows_local(shape.model.vocab_size)


def _matrix_weights(shape: StepShape) -> int:
    """Weights that take part in matrix products, the head's padding included."""
    layer = sum(i * o for i, o in layer_products(shape.model, shape.part))
    head = shape.model.hidden_size * _vocab_rows(shape) * shape.part.has_head
    return shape.part.layers_local * layer + head
