"""Computes what the numbers would be with one known fault: transformers' model in fp64 with that fault, on one process.

Only the diagnosis of a failed proof needs it (``diagnosis.py``). The faults are those that layouts can have: in what a
token sees, in the place of a rank's part of a matrix or of the vocabulary, in which samples' gradients are summed, in
how the update is made. Nothing is shared with the code that is judged but the samples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import Config
from megatron_hammer.verify.outcome import TensorPiece
from megatron_hammer.verify.patterns import Label
from megatron_hammer.verify.reference import StepRule, build_model, reference_steps
from megatron_hammer.verify.token_inputs import Loss, TokenInputs, TokenOwners, cross_entropy, positions_of

# ---- losses under a fault --------------------------------------------------------------------------------------------


def losses_with_faults(
    config: Config, world_size: int, initial: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each fault of the forward pass that is known, in words, and the loss of each token with it."""
    inputs, (model, weights) = TokenInputs.of(config), build_model(config, initial)
    for name, changed in _changed_inputs(config, world_size, inputs):
        yield name, changed.losses(model)
    for name, loss in _head_losses(config):
        yield name, inputs.losses(model, loss)
    for name, changes in itertools.chain(_changed_weights(config), _other_layers(config, weights)):
        with _change(weights, changes) as any_changed:
            if any_changed:
                yield name, inputs.losses(model)
    scaling = config.model.rope_scaling
    if scaling is not None:
        plain = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_scaling=None))
        yield "RoPE is not scaled as model.rope_scaling says", inputs.losses(build_model(plain, initial)[0])


def _changed_inputs(config: Config, world_size: int, right: TokenInputs) -> Iterator[tuple[str, TokenInputs]]:
    change, s = dataclasses.replace, config.data.seq_length
    if config.data.attention_mask == "document":
        whole = [[s] * config.train.micro_batch_size for _ in right.documents]
        yield "documents are not kept apart", change(right, documents=whole, positions=positions_of(whole))
        for by, word in ((1, "later"), (-1, "earlier")):
            for among, room in itertools.product(("", " inside of samples"), (False, True)):
                documents = [_moved(lengths, by, s if among else None, room) for lengths in right.documents]
                moved = change(right, documents=documents, positions=positions_of(documents))
                yield f"boundaries of documents{among} are one token {word}", moved
    halves = [[n for whole in lengths for n in (whole // 2, whole - whole // 2) if n] for lengths in right.documents]
    cut = change(right, documents=halves, positions=positions_of(halves))
    yield "attention does not reach from the second half of a document to the first", cut
    if config.parallel.context_parallel_size > 1:
        places = TokenOwners.of(config, world_size, right).place
        yield "positions (RoPE) count the tokens of a context-parallel rank", change(right, positions=places)
    for factor in (2, 3):
        yield f"positions (RoPE) go in steps of {factor}", change(right, positions=right.positions * factor)
    yield "positions (RoPE) are all the same", change(right, positions=right.positions * 0)
    yield "positions (RoPE) run backwards", change(right, positions=s - right.positions)
    samples = right.labels.reshape(-1, s)
    after = torch.cat((samples[:, 1:], samples[:, :1]), 1).reshape(right.labels.shape)
    yield "labels are one token too late: those of the token after the next", change(right, labels=after)
    yield "labels are one token too early: each is its own token", change(right, labels=right.tokens)
    rolled = torch.roll(samples, 1, 0).reshape(right.labels.shape)
    yield "labels are those of other samples", change(right, labels=rolled)
    for by in {1, config.data_parallel_size(world_size)}:
        yield "labels are those of other micro-batches", change(right, labels=torch.roll(right.labels, by, 0))


def _moved(lengths: list[int], by: int, sample: int | None, room: bool) -> list[int]:
    """Lengths of documents whose boundaries are so many tokens later.

    Args:
        sample: tokens of a sample, whose ends stay; None: they move, too.
        room: boundaries stay where the next one was; else documents may vanish.
    """
    ends = np.cumsum([0, *lengths])
    stay = np.isin(ends, (0, ends[-1])) if sample is None else ends % sample == 0
    before, behind = np.r_[0, ends[:-1]], np.r_[ends[1:], ends[-1]]
    there = np.clip(ends + by, before + 1, behind - 1) if room else np.clip(ends + by, 1, ends[-1] - 1)
    return [int(n) for n in np.diff(np.unique(np.where(stay, ends, there))) if n]


def _head_losses(config: Config) -> Iterator[tuple[str, Loss]]:
    tp, v = config.parallel.tensor_model_parallel_size, config.model.vocab_size
    assert v is not None
    local = config.placement().vocab_rows_local(v)
    padding = local * tp - v

    def with_zeros(count: int) -> Loss:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(F.pad(logits, (0, count)), labels)

        return loss

    if padding:
        yield f"the {padding} padding rows of the vocabulary count in the loss", with_zeros(padding)

    def without(first: int, stop: int) -> Loss:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            rest = torch.cat((logits[:, :first], logits[:, stop:]), 1)
            return rest.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]

        return loss

    if tp > 1:
        for rank in range(tp):
            rows = without(rank * local, min(v, (rank + 1) * local))
            yield f"the logits of tensor-parallel rank {rank} are not in the sum of exponentials", rows

    def with_squares(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) + config.train.z_loss * logits.logsumexp(1).square()

    if config.train.z_loss:
        yield "the loss that is reported has train.z_loss in it", with_squares


WeightChange = tuple[str, Callable[[Tensor], Tensor]]
"""End of the names of weights, and what becomes of them."""


def _changed_weights(config: Config) -> Iterator[tuple[str, list[WeightChange]]]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    at, d = config.placement(), config.model.head_size
    assert model.vocab_size is not None

    def zero(first: int, stop: int, axis: int) -> Callable[[Tensor], Tensor]:
        def change(weight: Tensor) -> Tensor:
            weight.narrow(axis, first, max(0, min(stop, weight.shape[axis]) - first)).zero_()
            return weight

        return change

    rows = at.vocab_rows_local(model.vocab_size)
    for rank in range(tp if tp > 1 else 0):
        of = f"of tensor-parallel rank {rank}"
        heads, ffn = at.heads_local * d, at.ffn_local
        attention: WeightChange = ("o_proj.weight", zero(rank * heads, (rank + 1) * heads, 1))
        mlp: WeightChange = ("down_proj.weight", zero(rank * ffn, (rank + 1) * ffn, 1))
        yield f"the part {of} is missing in the sums after attention and feed-forward", [attention, mlp]
        yield f"the part {of} is missing in the sum after attention", [attention]
        yield f"the part {of} is missing in the sum after the feed-forward", [mlp]
        if not model.tie_word_embeddings:
            yield (
                f"the rows {of} are missing in the embedding",
                [("embed_tokens.weight", zero(rank * rows, (rank + 1) * rows, 0))],
            )

    def blocks(count: int, order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: order(weight.reshape(count, -1, *weight.shape[1:])).reshape(weight.shape)

    def columns(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: change(weight.T.contiguous()).T

    heads_in: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("in the reverse order", lambda w: w.flip(0)),
        ("one place on", lambda w: w.roll(1, 0)),
    ]
    for word, change in heads_in:
        of_groups, of_heads = blocks(model.query_groups, change), blocks(model.num_attention_heads, change)
        if model.query_groups > 1:
            yield (
                f"key and value heads are {word}",
                [(f"{x}_proj.{kind}", of_groups) for x in "kv" for kind in ("weight", "bias")],
            )
        yield f"query heads are {word}", [(f"q_proj.{kind}", of_heads) for kind in ("weight", "bias")]
    if tp > model.query_groups > 1:
        # Heads with the groups that they would meet; that heads change their order changes nothing.
        ways: list[tuple[str, Callable[[int], int]]] = [
            ("copies of key and value heads are on ranks in turn, not on neighbours", lambda r: r % model.query_groups),
            ("ranks have the key and value heads of the next rank", lambda r: (r + 1) % tp // at.kv_copies),
            ("ranks have the key and value heads of the rank before", lambda r: (r - 1) % tp // at.kv_copies),
        ]
        for name, group_of in ways:
            met = [group_of(head // at.heads_local) for head in range(model.num_attention_heads)]
            order = sorted(range(len(met)), key=met.__getitem__)
            by_rows = blocks(len(met), itemgetter(order))
            reordered: list[WeightChange] = [(f"q_proj.{kind}", by_rows) for kind in ("weight", "bias")]
            yield name, [*reordered, ("o_proj.weight", columns(by_rows))]
    nothing: Callable[[Tensor], Tensor] = lambda w: w * 0  # noqa: E731
    for layer in range(model.num_layers):
        name = f"layers.{layer}."
        yield (
            f"layer {layer} adds nothing",
            [(f"{name}self_attn.o_proj.weight", nothing), (f"{name}mlp.down_proj.weight", nothing)],
        )
    if tp > 1:
        several: Callable[[Tensor], Tensor] = lambda w: w * tp  # noqa: E731
        summed: list[WeightChange] = [(f"{kind}.bias", several) for kind in ("o_proj", "down_proj")]
        yield "the biases of o_proj and down_proj are added on each tensor-parallel rank", summed
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        yield f"the bias of {kind} is not added", [(f"{kind}.bias", nothing)]
    yield "norms do not multiply by their weights", [("norm.weight", torch.ones_like)]


def _other_layers(config: Config, weights: dict[str, Any]) -> Iterator[tuple[str, list[WeightChange]]]:
    """Layers that compute with the weights of their neighbours."""
    now = {name: weight.detach().clone() for name, weight in weights.items()}

    def taking(layer: int, other: int) -> list[WeightChange]:
        names = [name for name in weights if f".layers.{layer}." in name]
        sources = {name: now[name.replace(f".layers.{layer}.", f".layers.{other}.")] for name in names}
        return [(name, lambda _, source=source: source) for name, source in sources.items()]  # type: ignore[misc]

    for layer in range(1, config.model.num_layers):
        yield f"layers {layer - 1} and {layer} are swapped", taking(layer - 1, layer) + taking(layer, layer - 1)
        for a, b in ((layer - 1, layer), (layer, layer - 1)):
            yield f"layer {a} computes with the weights of layer {b}", taking(a, b)


@contextmanager
def _change(weights: dict[str, Any], changes: list[WeightChange]) -> Iterator[bool]:
    """Whether any weight is another one."""
    kept = {name: w for name, w in weights.items() for end, _ in changes if name.endswith(end)}
    before = {name: w.detach().clone() for name, w in kept.items()}
    with torch.no_grad():
        for end, change in changes:
            for name, w in kept.items():
                if name.endswith(end):
                    w.copy_(change(w.clone()))
    yield any(not torch.equal(w, before[name]) for name, w in kept.items())
    with torch.no_grad():
        for name, w in kept.items():
            w.copy_(before[name])


def second_losses(
    config: Config, initial: dict[str, np.ndarray], updated: dict[str, np.ndarray]
) -> Iterator[tuple[str, float]]:
    """What is as before the first update, in words, and the loss of the second step with it."""
    inputs, layers = TokenInputs.of(config, 2), range(config.model.num_layers)
    groups = {"all weights": set(updated)}
    groups |= {f"layer {i}": {t for t in updated if t.split(".")[2:3] == [str(i)]} for i in layers}
    groups |= {tensor: {tensor} for tensor in updated}
    for name, stale in groups.items():
        mixed = {tensor: (initial if tensor in stale else updated)[tensor] for tensor in updated}
        yield name, float(inputs.losses(build_model(config, mixed)[0]).mean())


# ---- parts of a gradient ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contributions:
    """What each rank's micro-batch adds to the first step's gradient of each matrix."""

    labels: list[Label]
    of: dict[str, np.ndarray]
    """By logical tensor: [labels, rows, cols]."""

    @classmethod
    def count(cls, config: Config, world_size: int, initial: dict[str, np.ndarray]) -> Contributions:
        """A weight's gradient is a sum over tokens, of what comes back to its output and its input; here by owner."""
        inputs, (model, weights) = TokenInputs.of(config), build_model(config, initial)
        owners = TokenOwners.of(config, world_size, inputs)
        keys = np.stack((owners.dp, owners.micro_batch, owners.cp), -1)
        labels: list[Label] = [(int(a), int(b), int(c)) for a, b, c in np.unique(keys.reshape(-1, 3), axis=0)]
        group = np.zeros(owners.dp.shape, dtype=int)
        for i, label in enumerate(labels):
            group[(keys == label).all(-1)] = i
        now: dict[str, np.ndarray] = {}
        found: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            weight = f"{name}.weight"
            if isinstance(module, torch.nn.Linear) and weight in weights:
                found[weight] = np.zeros((len(labels), *module.weight.shape))
                module.register_forward_hook(_hook(found[weight], now))
        for sample, part in inputs.parts():
            now["group"] = group[sample, part]
            logits = model(inputs.tokens[sample, part][None]).logits[0]
            losses = cross_entropy(logits, inputs.labels[sample, part])
            losses = losses + config.train.z_loss * logits.logsumexp(-1).square()
            (losses.sum() / inputs.tokens.numel()).backward()  # type: ignore[no-untyped-call]
        return cls(labels, found)

    def times_in(self, piece: TensorPiece, noise: float = 1e-3) -> np.ndarray | None:
        """How often each part is in a gradient, by least squares; None where it is no sum of them.

        Args:
            noise: of the parts' largest value, that a sum may leave.
        """
        basis = self.of[piece.tensor][(slice(None), *piece.place)].reshape(len(self.labels), -1)
        scale = max(float(np.abs(basis).max()), 1e-300)
        if basis.shape[1] < 2 * len(basis) or not np.isfinite(piece.values).all():
            return None
        found = np.linalg.lstsq(basis.T / scale, piece.values.ravel() / scale, rcond=1e-6)
        times: np.ndarray = found[0]
        left = float(np.abs(piece.values.ravel() - times @ basis).max())
        return times if found[2] == len(basis) and left <= noise * scale else None


def _hook(sums: np.ndarray, now: dict[str, np.ndarray]) -> Callable[..., None]:
    def forward(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        x, group = inputs[0].detach()[0].numpy(), now["group"]

        def backward(gradient: Tensor) -> None:
            dy = gradient[0].numpy()
            for i in np.unique(group):
                sums[i] += dy[group == i].T @ x[group == i]

        output.register_hook(backward)

    return forward


# ---- states under a fault --------------------------------------------------------------------------------------------


def states_with_faults(config: Config, initial: dict[str, np.ndarray]) -> Iterator[tuple[str, list[TensorPiece]]]:
    """Each fault of the update that is known, in words, and gradients, weights and moments with it."""

    def with_optimizer(**changes: Any) -> list[TensorPiece]:
        changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))
        return reference_steps(changed, initial).pieces

    def with_rule(**changes: Any) -> list[TensorPiece]:
        return reference_steps(config, initial, rule=StepRule(**changes)).pieces

    o = config.optimizer
    yield "the second step was computed with the weights of before the first", with_rule(stale=True)
    yield "the second step was taken with the gradients of the first", with_rule(gradients="first")
    yield "the gradients of the first step were still in those of the second", with_rule(gradients="summed")
    if o.clip_grad > 0:
        yield "gradients are not clipped", with_optimizer(clip_grad=0.0)
    if o.weight_decay:
        yield "weights do not decay", with_optimizer(weight_decay=0.0)
        yield "weights decay twice", with_optimizer(weight_decay=2 * o.weight_decay)
        yield "norms and biases decay, too", with_rule(vectors_decay=True)
    yield "moments are not corrected for the first steps", with_rule(corrected=False)
    yield "the count of updates is one ahead", with_rule(ahead=1)
    yield "beta1 and beta2 are swapped", with_optimizer(beta1=o.beta2, beta2=o.beta1)
    if o.style == "muon":
        whole, heads = "matrices of queries, keys and values as one each", "queries, keys and values head by head"
        yield f"Muon takes {whole if o.muon_per_head else heads}", with_optimizer(muon_per_head=not o.muon_per_head)
        yield "Muon's momentum is not Nesterov's", with_rule(nesterov=False)
        yield "Muon scales by the shorter side of a matrix", with_rule(scale=min)
    for factor in (2, 0.5):
        yield (
            f"the learning rate is {factor} times what it should be",
            with_optimizer(lr=o.lr * factor, min_lr=o.min_lr * factor),
        )
