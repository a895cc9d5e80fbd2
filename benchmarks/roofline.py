"""Predicted time, memory and rate of a training step on one GPU, from a shape and the ceilings measured on the card.

    python benchmarks/roofline.py [--gemm 790] [--copy 4.3] [--fp8 1300] [--micro-batch 8] [--accumulation 16]

Counted: floating-point operations, parameters, and the bytes that ideal fused kernels move. Measured: the ceilings,
which are inputs (GEMM and fp8 TFLOP/s of 8192^3 products, copy TB/s read + written). Modelled: the few constants of a
``Scenario``, each with its reason; against published runs of 1B to 8B models on A100 and H100 the model is 0 to 15 %
optimistic. ``gpu_suite.py`` puts its figures beside the measured ones.

Legend: T tokens of a micro-batch, h hidden, f feed-forward, v vocabulary, s sequence. "Hidden tensor": T h 2 bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shapes import Shape

HAMMERLLM = Shape(2048, 5632, 22, 32, 4, 2048, 105_789, 8, 16, 20)
VOCABULARY_MULTIPLE = 128
GIB = 2**30
SMS = 132  # streaming multiprocessors of an H100 SXM and of an H200

# Tiles of a Hopper GEMM (rows, columns, share of the rate that the tile can reach), and the main-loop length that a
# tile's prologue and epilogue cost: both fitted to published cuBLAS charts.
TILES = (
    (128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (192, 128, 0.97), (128, 128, 0.90), (64, 256, 0.85),
)  # fmt: skip
FILL_LENGTH = 128


@dataclass(frozen=True)
class Ceilings:
    """What the card at hand was seen to do; the defaults are an H200's."""

    gemm: float = 790.0
    """bf16 TFLOP/s of ten 8192^3 products."""
    sustained: float | None = None
    """The same held for 5 s; None: 0.94 of the burst, the drop that 700 W cards show."""
    fp8: float = 1300.0
    copy: float = 4.3
    """TB/s read + written."""


@dataclass(frozen=True)
class Scenario:
    """A way to train the model: what it costs beyond the counted work."""

    about: str
    attention: tuple[float, float] | None = (334, 334)
    """TFLOP/s forward and backward at head size 64 (FA3 paper's charts: FA2 262/225, cuDNN 334/334); None: GEMM's."""
    sustained: bool = True
    tiles: bool = True
    fused: bool = True
    """qkv and gate/up are one product each, the vocabulary is padded."""
    copy_share: float = 0.85
    """Of the copy bandwidth, what elementwise kernels reach (Triton SwiGLU on an H100: 0.88 of the datasheet)."""
    elementwise: float = 1.1
    """Times the ideal bytes; 0: none counted."""
    bytes_per_logit: float = 6
    bytes_per_weight: float = 8
    """Moved by gradient accumulation, a micro-batch; ``hidden_share`` of it under the product."""
    hidden_share: float = 0.3
    optimizer_bytes: float = 38
    """Per parameter and step; ideal 34: gradient 4, norm 4, master and moments 24, bf16 2."""
    gap: float = 0.02
    """Share of the micro-batch in which the GPU waits for launches and Python."""
    head_rate: float = 1.0
    """Of the estimate; an odd vocabulary unpadded runs on an alignment-1 kernel."""
    fp8: bool = False
    fp8_head: bool = False
    cast_units: float = 3
    """Hidden tensors moved per operand in fp8: amax read, cast read, two fp8 layouts written."""


TARGET = Scenario("what we commit to: cuDNN attention, fused kernels, chunked loss")
SCENARIOS = {
    "floor": Scenario("all FLOPs at the GEMM ceiling, nothing else", None, False, False, True, 1, 0, 0, 0, 1, 0, 0),
    "best kernels": Scenario("the best published kernel for every part", (371, 340), False, True, True, 0.92, 1, 4, 8,
                             0.5, 34, 0),
    "ours": TARGET,
    "ours fp8": replace(TARGET, about="layer products in fp8, tensor-wise", fp8=True),
    "ours fp8 + head": replace(TARGET, about="the head too", fp8=True, fp8_head=True),
    # compile a layer, cuDNN, 8 loss chunks; on one GPU fp32 weights are cast once a micro-batch
    "torchtitan": Scenario("torchtitan-like", copy_share=0.80, elementwise=1.2, bytes_per_logit=12, bytes_per_weight=22,
                           hidden_share=0, optimizer_bytes=42, gap=0.03, head_rate=0.97, fused=False),
    # with TE's layers; 45 bytes per logit from Liger's benchmark file: 18.2 ms for 8192 x 131,072 on an H100
    "Megatron core": Scenario("Megatron-core-like, native fused cross-entropy", copy_share=0.80, elementwise=1.4,
                              bytes_per_logit=45, optimizer_bytes=42, gap=0.03),
    "HF tuned": Scenario("LlamaForCausalLM compiled, vocabulary padded", (262, 225), copy_share=0.75, elementwise=1.35,
                         bytes_per_logit=24, hidden_share=0, optimizer_bytes=60, gap=0.05, head_rate=0.9, fused=False),
    "HammerLLM": Scenario("the same, odd vocabulary", (262, 225), copy_share=0.75, elementwise=1.35, bytes_per_logit=24,
                          hidden_share=0, optimizer_bytes=60, gap=0.05, head_rate=0.35, fused=False),
}  # fmt: skip


def padded(vocabulary: int) -> int:
    """The vocabulary that the model computes with."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameters(shape: Shape) -> tuple[int, int]:
    """All, and those of one layer's matrices."""
    h = shape.hidden
    layer = 2 * h * h + 2 * h * (h // shape.heads) * shape.groups + 3 * h * shape.ffn
    return shape.layers * (layer + 2 * h) + 2 * shape.vocabulary * h + h, layer


def flops_per_token(shape: Shape) -> tuple[float, float]:
    """Forward and backward: (full square of attention, causal half)."""
    causal = shape.flops_per_token
    return causal + 6.0 * shape.layers * shape.hidden * shape.sequence, float(causal)


@dataclass(frozen=True)
class Product:
    """One matrix product of the step: [m, k] x [k, n], so many times a micro-batch."""

    name: str
    m: int
    n: int
    k: int
    calls: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


def products(shape: Shape, fused: bool = True, pad: bool = True) -> list[Product]:
    """Every product of a micro-batch: forward, input gradient (dgrad), weight gradient (wgrad)."""
    h, f, rows = shape.hidden, shape.ffn, shape.micro_batch * shape.sequence
    kv = h // shape.heads * shape.groups
    linears = [("qkv", h, h + 2 * kv), ("output", h, h), ("gate_up", h, 2 * f), ("down", f, h)]
    if not fused:
        linears = [("q", h, h), ("k", h, kv), ("v", h, kv), ("output", h, h)]
        linears += [("gate", h, f), ("up", h, f), ("down", f, h)]
    head = ("head", h, padded(shape.vocabulary) if pad else shape.vocabulary)
    found = []
    for name, inside, out in (*linears, head):
        calls = 1 if name == "head" else shape.layers
        found += [
            Product(f"forward {name}", rows, out, inside, calls),
            Product(f"dgrad {name}", rows, inside, out, calls),
            Product(f"wgrad {name}", out, inside, rows, calls),
        ]
    return found


def tile_share(m: int, n: int, k: int, fill: int = FILL_LENGTH) -> float:
    """Share of the tensor cores' rate that whole tiles, whole waves and the loop's ends leave: the best tile's.

    Split-K costs 4 % and is tried where 2048 of k are left.
    """
    best = 0.0
    for rows, columns, rate in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        useful = m * n / (tiles * rows * columns)
        for split in (1, 2, 3, 4, 6, 8):
            if split > 1 and k / split < 2048:
                break
            waves = tiles * split / (math.ceil(tiles * split / SMS) * SMS)
            loop = (k / split) / (k / split + fill)
            best = max(best, useful * waves * rate * loop * (1 if split == 1 else 0.96))
    return best


def product_seconds(product: Product, shape: Shape, scenario: Scenario, ceilings: Ceilings) -> float:
    """Predicted time of one call."""
    sustained = ceilings.sustained or 0.94 * ceilings.gemm
    rate, share, head = (sustained if scenario.sustained else ceilings.gemm), 1.0, product.name.endswith("head")
    m, n, k = product.m, product.n, product.k
    if scenario.tiles:
        share = min(1.0, tile_share(m, n, k) / tile_share(8192, 8192, 8192))
    if head and scenario.head_rate < 1:
        share *= scenario.head_rate if shape.vocabulary % 8 else max(scenario.head_rate, 0.9)
    if scenario.fp8_head if head else scenario.fp8:  # twice the rate in the main loop, the same prologue and epilogue
        whole = tile_share(8192, 8192, 8192, 2 * FILL_LENGTH)
        share = min(1.0, tile_share(m, n, k, 2 * FILL_LENGTH) / whole) * ceilings.fp8 / ceilings.gemm
    return product.flops / (rate * share * 1e12)


@dataclass(frozen=True)
class Prediction:
    """Seconds by part of a micro-batch, and those of the optimizer."""

    parts: Mapping[str, float]
    optimizer: float
    tokens: int
    accumulation: int

    @property
    def step(self) -> float:
        return sum(self.parts.values()) * self.accumulation + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens * self.accumulation / self.step


def predict(
    shape: Shape, ceilings: Ceilings, scenario: Scenario, measured: Mapping[str, float] | None = None
) -> Prediction:
    """Time of a step; ``measured`` has seconds of products by name, which replace their estimate."""
    tokens, h = shape.micro_batch * shape.sequence, shape.hidden
    bandwidth, hidden = ceilings.copy * 1e12 * scenario.copy_share, tokens * h * 2
    parts = {"layer products": 0.0, "head products": 0.0}
    for product in products(shape, scenario.fused, scenario.fused and scenario.tiles):
        seconds = (measured or {}).get(product.name) or product_seconds(product, shape, scenario, ceilings)
        parts["head products" if product.name.endswith("head") else "layer products"] += seconds * product.calls
    forward = 2.0 * tokens * shape.sequence * h * shape.layers  # causal; backward 2.5 times that as papers count it
    if scenario.attention is None:
        parts["attention"] = 3 * forward / (ceilings.gemm * 1e12)
    else:
        parts["attention"] = forward / (scenario.attention[0] * 1e12) + 2.5 * forward / (scenario.attention[1] * 1e12)
    kv, f = shape.groups / shape.heads, shape.ffn / h
    units = (8 + 2 * (1 + kv) + 3 * f) + (8 + 2 * (1 + kv) + 6 * f)  # norms, RoPE, SwiGLU: forward, backward
    parts["norms, RoPE, SwiGLU"] = scenario.elementwise * shape.layers * units * hidden / bandwidth
    if scenario.fp8:
        operands = 3 + f + (1 + 2 * kv) + 2 + 2 * f  # inputs and output gradients of the four linears
        parts["fp8 casts"] = scenario.cast_units * operands * shape.layers * hidden / bandwidth
    if scenario.elementwise:
        parts["embedding, final norm"] = 15 * hidden / bandwidth
    parts["cross-entropy"] = scenario.bytes_per_logit * tokens * padded(shape.vocabulary) / bandwidth
    everything, layer = parameters(shape)
    matrices = shape.layers * layer + shape.vocabulary * h
    parts["gradient sums"] = scenario.bytes_per_weight * matrices * (1 - scenario.hidden_share) / bandwidth
    parts["gaps"] = sum(parts.values()) * scenario.gap / (1 - scenario.gap)
    return Prediction(parts, scenario.optimizer_bytes * everything / bandwidth, tokens, shape.accumulation)


def memory_gib(shape: Shape, recompute: str = "none", chunk_tokens: int = 2048) -> dict[str, float]:
    """Our own step on one GPU in bf16, GiB by part.

    recompute: none; selective: norms, SwiGLU's product and attention's inner part again; full: layer inputs only.
    """
    everything, _ = parameters(replace(shape, vocabulary=padded(shape.vocabulary)))
    hidden, f, kv = (
        shape.micro_batch * shape.sequence * shape.hidden * 2,
        shape.ffn / shape.hidden,
        shape.groups / shape.heads,
    )
    kept = 2 + (1 + 2 * kv) + 1 + 2 + 2 * f + f  # stream and norm, twice; qkv; attention; gate and up; product
    units = {"none": kept, "selective": kept - 2 - f, "full": 1.0}[recompute]
    return {
        "weights": 2 * everything / GIB,
        "gradients": 4 * everything / GIB,
        "masters and moments": 12 * everything / GIB,
        "activations": (shape.layers * units + (kept if recompute == "full" else 0)) * hidden / GIB,
        "loss": (chunk_tokens * padded(shape.vocabulary) * 2 + 2 * hidden) / GIB,
    }


def main() -> None:
    """Print the budget of every scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Ceilings()
    parser.add_argument("--gemm", type=float, default=defaults.gemm, help="TFLOP/s (default: %(default)s)")
    parser.add_argument("--sustained", type=float, help="TFLOP/s held for seconds (default: 0.94 of --gemm)")
    parser.add_argument("--fp8", type=float, default=defaults.fp8, help="TFLOP/s (default: %(default)s)")
    parser.add_argument("--copy", type=float, default=defaults.copy, help="TB/s (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=HAMMERLLM.vocabulary)
    parser.add_argument("--micro-batch", type=int, default=HAMMERLLM.micro_batch)
    parser.add_argument("--accumulation", type=int, default=HAMMERLLM.accumulation)
    a = parser.parse_args()
    ceilings = Ceilings(a.gemm, a.sustained, a.fp8, a.copy)
    shape = replace(HAMMERLLM, vocabulary=a.vocabulary, micro_batch=a.micro_batch, accumulation=a.accumulation)
    full, causal = flops_per_token(shape)
    print(f"{parameters(shape)[0]:,} parameters, {full / 1e9:.4f} GFLOP/token full, {causal / 1e9:.4f} causal")
    found = {name: predict(shape, ceilings, scenario) for name, scenario in SCENARIOS.items()}
    for name, p in found.items():
        print(f"\n{name}: {SCENARIOS[name].about}")
        print("  ms a micro-batch: " + ", ".join(f"{part} {1e3 * t:.1f}" for part, t in p.parts.items() if t))
        share = p.tokens_per_second * causal / (a.gemm * 1e12)
        print(f"  step {p.step:.3f} s, {p.tokens_per_second:,.0f} tokens/s, {share:.1%} of the ceiling (causal FLOPs)")
    for recompute in ("none", "selective", "full"):
        parts = memory_gib(shape, recompute)
        shown = ", ".join(f"{k} {v:.1f}" for k, v in parts.items())
        print(f"\nmemory, recompute {recompute}: {sum(parts.values()):.1f} GiB: {shown}")


if __name__ == "__main__":
    main()
