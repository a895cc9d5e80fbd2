"""Output head and cross-entropy, forward and backward, at 16,384 tokens: time, effective rate, memory.

The effective rate counts 6 T h v: three products of the logits' size, whatever a contestant really computes. Ours gets
the padded weight and an fp32 place for its gradient, as in training; the peers get the odd one and return a
bf16 gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from roofline import padded
from torch import Tensor
from torch.nn import functional as F

from gpu.kernels import row_function
from gpu.measure import Bench, Item, Missing, Result, needed, peak_memory, summary, times
from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.linear_cross_entropy import with_chunks
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.selection import TABLES
from megatron_hammer.model.head_loss import HeadAndLoss, Objective
from megatron_hammer.model.layers import LayerOptions

CCE = {"CCE, all gradients": True, "CCE": False}  # on random inputs the second computes next to no gradient
TORCHS_OWN = ("torch's linear_cross_entropy", "torch's linear_cross_entropy, padded")
Pass = Callable[[Tensor, Tensor, Tensor], object]  # (hidden, weight, labels): forward and backward once


class Sum:
    """Where the head's gradient is summed, as in the optimizer's buffer."""

    version, begun = 0, torch.tensor(True)

    def __init__(self, weight: Tensor) -> None:
        self.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def add(self, write: Callable[[Tensor, bool], Any], last: bool = True) -> Any:
        return write(self.main_grad, True)

    def ready(self) -> None:
        """Nobody waits for it."""


def ours(bench: Bench, name: str, weight: Tensor) -> Pass:
    loss = with_chunks(row_function(bench, "loss", name), KernelsConfig(), bench.device)
    options = LayerOptions(torch.bfloat16, bench.device, operations=Operations(loss=loss))
    gradient, tokens = Sum(weight), bench.shape.micro_batch * bench.shape.sequence
    objective = Objective(torch.full((), 1 / tokens, device=bench.device))

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        losses = HeadAndLoss(weight, bench.shape.vocabulary, options, gradient)(hidden, labels, objective)
        (losses * objective.weight).sum().backward()

    return run


def liger(bench: Bench) -> Pass:
    if not bench.cuda:
        raise Missing("Triton kernels need a GPU")
    needed("liger_kernel")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        loss = LigerFusedLinearCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, labels.t().flatten())
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    return run


def cut_cross_entropy(bench: Bench, exact: bool) -> Pass:
    """Apple's CCE, which never has logits in memory; by default it leaves out gradients that bf16 would hardly see."""
    if not bench.cuda:
        raise Missing("Triton kernels need a GPU")
    needed("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        kept = None if exact else "high"
        linear_cross_entropy(hidden.flatten(0, 1), weight, labels.t().flatten(), filter_eps=kept).backward()

    return run


def torchs_own(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's head and loss in one, a chunk of tokens at a time, with its own choice of chunk and sums."""
    return F.linear_cross_entropy(  # type: ignore[attr-defined, no-any-return]
        hidden.flatten(0, 1), weight, labels.t().flatten(), options=torch.nn.LinearCrossEntropyOptions()
    )


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """bf16 logits, fp32 loss."""
    return F.cross_entropy(F.linear(hidden.flatten(0, 1), weight).float(), labels.t().flatten())


def hugging_face(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What LlamaForCausalLM does: logits of the batch, shifted within ``ForCausalLMLoss``."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden.transpose(0, 1), weight), labels, weight.shape[0])


def measure(bench: Bench, name: str) -> Result:
    shape = bench.shape
    is_ours = name.startswith("ours: ")
    rows = padded(shape.vocabulary) if is_ours or name.endswith("padded") else shape.vocabulary
    hidden = bench.random(shape.sequence, shape.micro_batch, shape.hidden).requires_grad_()
    weight = bench.random(rows, shape.hidden, scale=0.02).requires_grad_()
    labels = bench.tokens(shape.micro_batch, shape.sequence, vocabulary=shape.vocabulary)
    if is_ours:
        run = ours(bench, name.removeprefix("ours: "), weight)
    elif name == "Liger":
        run = liger(bench)
    elif name in CCE:
        run = cut_cross_entropy(bench, CCE[name])
    else:
        loss_of = torchs_own if name in TORCHS_OWN else hugging_face if name.startswith("HF") else plain
        if loss_of is hugging_face:
            needed("transformers")
        elif loss_of is torchs_own and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Missing(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
        compiled = torch.compile(loss_of, dynamic=False) if "compiled" in name else loss_of
        run = lambda x, w, y: compiled(x, w, y).backward()  # noqa: E731

    def once() -> None:
        hidden.grad = weight.grad = None
        run(hidden, weight, labels)

    seconds = times(bench, once, bench.repeats(10))
    result = summary(seconds)
    flops = 6.0 * shape.micro_batch * shape.sequence * shape.hidden * shape.vocabulary
    result["tflops"] = flops / statistics.median(seconds) / 1e12
    hidden.grad = weight.grad = None
    with peak_memory(bench, result):
        run(hidden, weight, labels)
    if not is_ours and result["peak_extra_gib"] is not None:  # ours has a place for this outside of what is counted
        result["peak_extra_gib"] -= weight.numel() * 2 / 2**30
    return result


def items(bench: Bench) -> dict[str, Item]:
    ours_first = [f"ours: {row.name}" for row in TABLES["loss"]]
    peers = ["Liger", *CCE, *TORCHS_OWN, "HF compiled", "HF compiled, padded", "HF", "plain", "plain compiled, padded"]
    return {name: partial(measure, bench, name) for name in ours_first + peers}
