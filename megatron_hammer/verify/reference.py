"""The same two steps by code that shares nothing with ours: Hugging Face's model in fp64, AdamW and Muon written out.

One process, whole tensors, no padding, no buckets, one document at a time. What our own process and all ranks have in
common, and have wrong, shows here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import Config
from megatron_hammer.huggingface.config import hf_config_from_model
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.verify.outcome import FIRST, Outcome, TensorPiece
from megatron_hammer.verify.shrink import STEPS
from megatron_hammer.verify.steps import SOURCES, global_batch


@dataclass(frozen=True)
class StepRule:
    """How steps are taken; anything but the defaults is a fault that a diagnosis assumes (``what_if.py``)."""

    vectors_decay: bool = False
    """Norms and biases decay, too."""
    corrected: bool = True
    """Moments are divided by what they lack in the first steps."""
    ahead: int = 0
    """Updates that AdamW believes to have made already."""
    stale: bool = False
    """All steps are computed with the weights of before the first."""
    gradients: str = "own"
    """Of a step: its own; "first": those of the first step again; "summed": with those of the steps before."""
    nesterov: bool = True
    """Muon's direction looks ahead along the momentum."""
    scale: Callable[[tuple[int, ...]], int] = max
    """Of the sides of a matrix, that which Muon scales by."""


RIGHT = StepRule()


def build_model(config: Config, initial: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """transformers' model with these weights (logical tensors by name), and its parameters by name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: Any = AutoConfig.for_model(**hf_config_from_model(config.model, {}, "float32"))
    build: Any = AutoModelForCausalLM.from_config
    model: Any = build(settings, attn_implementation="eager").double()  # plain products: the others are no faster
    rope: Any = model.model.rotary_emb
    rope.inv_freq = rope.inv_freq.double()
    weights = {name: weight for name, weight in model.named_parameters() if name in initial}
    assert weights.keys() == initial.keys(), "transformers names other tensors"
    _fill(weights, initial)
    return model, weights


@torch.no_grad()
def _fill(weights: dict[str, Any], values: dict[str, np.ndarray]) -> None:
    for name, weight in weights.items():
        weight.copy_(torch.from_numpy(values[name]))


def reference_steps(config: Config, initial: dict[str, np.ndarray], rule: StepRule = RIGHT) -> Outcome:
    """Two steps from these weights (logical tensors by name)."""
    model, weights = build_model(config, initial)
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    losses, norms, by_source, pieces = [], [], [], []
    before: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        updated = {name: weight.detach().numpy().copy() for name, weight in weights.items()} if rule.stale else {}
        if rule.stale:
            _fill(weights, initial)
        loss, objective, of_sources = _loss(model, config, step)
        by_source.append(of_sources)
        model.zero_grad()
        objective.backward()
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        if before and rule.gradients != "own":
            gradients = {n: before[n] + (g if rule.gradients == "summed" else 0) for n, g in gradients.items()}
        before = before or {name: gradient.clone() for name, gradient in gradients.items()}
        if updated:
            _fill(weights, updated)
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
        if step == 1:
            pieces += [_whole("gradient", name, g) for name, g in gradients.items()]
        _update(config, step, weights, gradients, moments, float(norm), rule)
        if step == 1:
            pieces += _states(config, weights, moments, FIRST)
    pieces += _states(config, weights, moments)
    pieces += [_whole("model", name, weight) for name, weight in weights.items()]
    return Outcome(losses, norms, pieces, source_losses=by_source)


def _states(
    config: Config, weights: dict[str, Any], moments: dict[str, Any], prefix: str = ""
) -> Iterator[TensorPiece]:
    """Weights and moments as they are now."""
    for name, weight in weights.items():
        first, second = moments[name]
        kinds = {"weight": weight, "exp_avg": first} | ({} if _is_muon(config, name) else {"exp_avg_sq": second})
        yield from (_whole(prefix + kind, name, tensor) for kind, tensor in kinds.items())


def _loss(model: Any, config: Config, step: int) -> tuple[Tensor, Tensor, list[float]]:
    """Mean loss over the global batch, what is minimised, z-loss included, and the mean loss of each source."""
    tokens, documents = global_batch(config, step)
    total, extra, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    of_samples: list[float] = []
    for sample, lengths in zip(tokens, documents, strict=True):
        start, before = 0, float(total.detach())
        for length in lengths if config.data.attention_mask == "document" else [config.data.seq_length]:
            inputs, labels = sample[start : start + length], sample[start + 1 : start + length + 1]
            logits = model(inputs[None]).logits[0]
            total = total + F.cross_entropy(logits, labels, reduction="sum")
            extra = extra + logits.logsumexp(-1).square().sum()
            start, count = start + length, count + length
        of_samples.append((float(total.detach()) - before) / config.data.seq_length)
    of_sources = [of_samples[source::SOURCES] for source in range(SOURCES)]
    means = [sum(losses) / len(losses) for losses in of_sources]
    return total / count, (total + config.train.z_loss * extra) / count, means


@torch.no_grad()
def _update(
    config: Config, step: int, weights: dict[str, Any], gradients: dict[str, Any], moments: dict[str, Any],
    norm: float, rule: StepRule,
) -> None:  # fmt: skip
    """Clipping by the global norm and decoupled decay on matrices (arXiv 1711.05101), by AdamW or Muon."""
    o, lr = config.optimizer, learning_rate(config, step)
    factor = min(1.0, o.clip_grad / (norm + 1e-6)) if o.clip_grad > 0 else 1.0
    for name, weight in weights.items():
        gradient, (first, second) = gradients[name] * factor, moments[name]
        if _is_muon(config, name):
            first.mul_(o.muon_momentum).add_(gradient, alpha=1 - o.muon_momentum)
            direction = o.muon_momentum * first + (1 - o.muon_momentum) * gradient if rule.nesterov else first
            update = _muon(direction, _rows_of_a_matrix(config, name), rule)
            weight.sub_(lr * (update + o.weight_decay * weight))
            continue
        first.mul_(o.beta1).add_(gradient, alpha=1 - o.beta1)
        second.mul_(o.beta2).add_(gradient.square(), alpha=1 - o.beta2)
        made = step + rule.ahead
        of_first, of_second = (1 - o.beta1**made, 1 - o.beta2**made) if rule.corrected else (1.0, 1.0)
        update = (first / of_first) / ((second / of_second).sqrt() + o.eps)
        decay = o.weight_decay if weight.ndim > 1 or rule.vectors_decay else 0.0
        weight.sub_(lr * (update + decay * weight))


def _is_muon(config: Config, name: str) -> bool:
    """Whether Muon updates it: every matrix of a layer."""
    return config.optimizer.style == "muon" and ".layers." in name and name.endswith("_proj.weight")


def _rows_of_a_matrix(config: Config, name: str) -> int | None:
    """Rows that Muon takes as one matrix: of a head, where q, k and v are taken head by head; None: all."""
    of_heads = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    return config.model.head_size if config.optimizer.muon_per_head and of_heads else None


def _muon(direction: Tensor, rows: int | None, rule: StepRule) -> Tensor:
    """0.2 sqrt(max(rows, cols)) U p(S) V^T of each matrix, by its singular values: p is the quintic polynomial of
    Newton-Schulz, five times. The coefficients and the factor are given again here, not taken from the kernel."""
    parts = []
    for matrix in direction.split(rows or len(direction)):
        u, s, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        parts.append(0.2 * rule.scale(matrix.shape) ** 0.5 * (u * s) @ vt)
    return torch.cat(parts)


def _whole(kind: str, name: str, tensor: Tensor) -> TensorPiece:
    rows, *cols = tensor.shape
    return TensorPiece(kind, name, (0, rows), (0, cols[0]) if cols else None, tensor.detach().numpy().copy())
