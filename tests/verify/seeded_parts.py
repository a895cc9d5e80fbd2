"""More seeded faults, by the part of a layout that has them: matrices, stages, samples, updates, the tree, files.

Each replaces one function, as those of ``seeded.py``; ``proof_with`` takes a whole proof of a layout with one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hammer.config import Config
from megatron_hammer.config import tree as config_tree
from megatron_hammer.kernels import linear as linear_layers
from megatron_hammer.model import head_loss, layers, llama, parameters
from megatron_hammer.optim import muon, store, tree_store
from megatron_hammer.optim.adamw import AdamW
from megatron_hammer.optim.muon import Muon
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.collectives import Done
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.parallel.pipeline import Pipeline
from megatron_hammer.sampling import batch
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train import build
from megatron_hammer.train import step as training_step
from megatron_hammer.verify import parallel, steps
from megatron_hammer.verify.outcome import write_outcome
from megatron_hammer.verify.steps import precisions, take_steps
from tests.distributed import run_distributed
from tests.verify.seeded import FAULTS as OTHER_FAULTS
from tests.verify.seeded import _in_product, _update

patch = mock.patch.object

# ---- matrices and heads ---------------------------------------------------------------------------------------------


def _rows_of_ranks_swapped() -> Any:
    return _in_product("forward", lambda full, group: torch.cat(full.chunk(group.size)[::-1]))


def _own_rows_for_all() -> Any:
    """The gradient of a matrix is computed with a rank's own rows in the place of all ranks'."""
    real = linear_layers.all_gather_rows

    def gather(x: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        return (torch.cat([x] * group.size), Done()) if async_op else real(x, group)

    return patch(linear_layers, "all_gather_rows", gather)


def _row(name: str, change: Callable[..., Any]) -> Any:
    """One kind of row of the parameter table is another one; change(row, model, placement)."""
    real = getattr(parameters, name)

    def changed(*a: Any) -> Any:
        row, at = real(*a), next((x for x in a if hasattr(x, "tp_rank")), None)
        return change(row, at)

    return patch(parameters, name, changed)


def _slices(row: Any, **changes: Any) -> Any:
    return dataclasses.replace(row, slices=tuple(dataclasses.replace(s, **changes) for s in row.slices))


def _up_of_another_rank(row: Any, at: Any) -> Any:
    gate, up = row.slices
    local = at.ffn[1] - at.ffn[0]
    first = local * ((at.tp_rank + 1) % at.tp_size)
    return dataclasses.replace(row, slices=(gate, dataclasses.replace(up, rows=(first, first + local))))


def _keys_summed_over(over: str) -> Any:
    def change(row: Any, at: Any) -> Any:
        changed = [dataclasses.replace(s, sum_over=over if s.sum_over == "kv" else s.sum_over) for s in row.slices]
        return dataclasses.replace(row, slices=tuple(changed))

    return _row("_qkv", change)


def _groups_in_turn() -> Any:
    real = config_tree.place

    def place(model: Any, tp_rank: int = 0, tp_size: int = 1, **more: Any) -> Any:
        at, groups = real(model, tp_rank, tp_size, **more), model.query_groups
        if tp_size <= groups:
            return at
        first = tp_rank % groups
        return dataclasses.replace(at, groups=(first, first + 1), owns_groups=tp_rank < groups)

    return patch(config_tree, "place", place)


def _groups_of_the_next_rank() -> Any:
    real = config_tree.place

    def place(model: Any, tp_rank: int = 0, tp_size: int = 1, **more: Any) -> Any:
        at = real(model, tp_rank, tp_size, **more)
        first = (tp_rank + 1) % tp_size // at.kv_copies
        return at if tp_size <= model.query_groups else dataclasses.replace(at, groups=(first, first + 1))

    return patch(config_tree, "place", place)


def _bias_on_each_rank() -> Any:
    def with_bias(self: Any, y: torch.Tensor) -> torch.Tensor:
        division = self.division
        times = division.group.size if division.sums_output or division.scatters else 1
        return y + layers.stored(self.bias, self.bias_gradient) * times

    return patch(layers.Bias, "with_bias", with_bias)


def _other_ranks_tokens_looked_up() -> Any:
    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        local = (tokens - self.rows_local * self.options.tp.rank) % self.rows_local
        return layers._sum_parts(layers.look_up(self.weight, self.gradient, local), self.options)

    return patch(layers.VocabParallelEmbedding, "forward", forward)


def _exponentials_of_ranks_not_rescaled() -> Any:
    def combine(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest, logs = parts[:, 0].amax(0), parts[:, 1].sum(0).log()
        return logs + largest, logs + (largest - parts[:, 2].sum(0))

    return patch(head_loss, "combine_statistics", combine)


# ---- stages and shares ----------------------------------------------------------------------------------------------


def _gradients_exchanged() -> Any:
    """The first stage goes backward through its first two micro-batches in the other order."""
    real = Pipeline.training

    def training(self: Pipeline, micro_batches: int) -> list[Any]:
        actions = real(self, micro_batches)
        first, second, *_ = (i for i, a in enumerate(actions) if a.kind == "backward" and a.stage == self.rank)
        if self.rank == 0:
            actions[first], actions[second] = actions[second], actions[first]
        return actions

    return patch(Pipeline, "training", training)


def _branch_lost() -> Any:
    """What the last layer of a stage adds does not travel."""
    real = llama.Stage.hidden

    def hidden(self: llama.Stage, *a: Any, **k: Any) -> torch.Tensor:
        if self.placement.has_head:
            return real(self, *a, **k)
        *_, last = self.layers.values()
        real_layer = last.forward

        def layer(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            x, branch = real_layer(*inputs)
            return x, branch * 0

        with patch(last, "forward", layer):
            return real(self, *a, **k)

    return patch(llama.Stage, "hidden", hidden)


def _labels_of_the_micro_batch_before() -> Any:
    real, before = llama.Stage.forward, [torch.empty(0)]

    def forward(self: llama.Stage, tokens: Any, labels: Any, *rest: Any, **named: Any) -> Any:
        if self.placement.has_head:
            labels, before[0] = before[0] if before[0].shape == labels.shape else labels, labels
        return real(self, tokens, labels, *rest, **named)

    return patch(llama.Stage, "forward", forward)


def _tied_copy_begins_otherwise() -> Any:
    real = build.initialise

    def initialise(stage: Any, table: Any, seed: int) -> None:
        real(stage, table, seed)
        if not stage.placement.has_embedding:
            stage.head.weight.data.copy_(stage.head.weight.data.roll(1, 0))

    return patch(build, "initialise", initialise)


def _labels_within_a_share() -> Any:
    """Of a context-parallel rank's tokens each one is to predict the next one that the rank has."""
    real = Batch.shard

    def shard(self: Any, rank: int, shards: int) -> Any:
        share = real(self, rank, shards)
        labels = share.tokens.reshape(-1).copy()
        labels[:-1] = labels[1:]
        return dataclasses.replace(share, labels=labels.reshape(share.labels.shape)) if shards > 1 else share

    return patch(Batch, "shard", shard)


# ---- samples, sums, updates -----------------------------------------------------------------------------------------


def _samples(of: Callable[[int, int], tuple[int, int]]) -> Any:
    """Which (first sample, data-parallel rank) a rank takes itself for."""
    real = steps.loader.micro_batches

    def micro_batches(data: Any, first: int, count: int, b: int, rank: int, size: int) -> list[Any]:
        first, rank = of(first, rank)
        return real(data, first, count, b, rank, size)

    return patch(steps.loader, "micro_batches", micro_batches)


def _first_bucket_not_reduced() -> Any:
    real = FlatStore.start_reduction

    def start_reduction(self: FlatStore, bucket: Any) -> None:
        if bucket is not self.buckets[0]:
            real(self, bucket)
        bucket.first, bucket.reduced = self.first, self.last

    return patch(FlatStore, "start_reduction", start_reduction)


def _copies_not_summed() -> Any:
    real = store.all_reduce
    return patch(store, "all_reduce", lambda x, group, **k: Done() if "async_op" in k else real(x, group, **k))


def _clipped_by_its_own_norm() -> Any:
    real = Optimizer.clip_grad_norm

    def clip(self: Optimizer, most: float) -> torch.Tensor:
        norm = real(self, most)
        own = sum(s.local_square_sum(self.rule.kernels.add_square_sum) for s in self.store.of_stages) ** 0.5
        self.divisor = (1 / (most / (own + 1e-6)).clamp(max=1.0)).float()
        return norm

    return patch(Optimizer, "clip_grad_norm", clip)


def _decays_twice(rule: AdamW, rest: Any, lr: float) -> float:
    for state in rule.states:
        if state.decay and dist.get_rank() == 2:
            state.weight.mul_(1 - lr * rule.config.weight_decay)
    return lr


def _without_nesterov() -> Any:
    real = Muon._directions

    def directions(self: Muon, places: Any, *rest: Any) -> torch.Tensor:
        real(self, places, *rest)
        return torch.cat([s.exp_avg[at : at + p.numel] for p, s, at in places if p.owned]).to(self.dtype)

    return patch(Muon, "_directions", directions)


def _copies_get_no_direction() -> Any:
    real = Muon._apply

    def apply(self: Muon, places: Any, updates: torch.Tensor, *rest: Any) -> None:
        parts = updates.split([piece.numel for piece, _, _ in places])
        for part in (part for part, (piece, _, _) in zip(parts, places, strict=True) if not piece.owned):
            part.zero_()
        real(self, places, updates, *rest)

    return patch(Muon, "_apply", apply)


def _other_matrices() -> Any:
    real = muon.plan_exchange
    return patch(muon, "plan_exchange", lambda *a: real(*a[:-1], not a[-1]))


def _moments_swapped_in_the_file() -> Any:
    real = steps.save_checkpoint

    def save(folder: Path, step: int, shards: Any, **more: Any) -> Any:
        names = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
        swapped = [
            dataclasses.replace(s, tensors={names.get(name, name): x for name, x in s.tensors.items()}) for s in shards
        ]
        return real(folder, step, swapped, **more)

    return patch(steps, "save_checkpoint", save)


def _updates_in_the_file() -> Any:
    real = steps.RunState.to_manifest

    def to_manifest(self: Any, optimizer: Optimizer) -> dict[str, Any]:
        state = real(self, optimizer)
        return state | {"optimizer": state["optimizer"] | {"updates": 1.0}}

    return patch(steps.RunState, "to_manifest", to_manifest)


def _decays_twice_at_the_border(rule: AdamW, rest: Any, lr: float) -> float:
    for state in rule.states:
        state.weight[:64].mul_(1 - lr * rule.config.weight_decay if state.decay else 1)
    return lr


def _copies_averaged() -> Any:
    real = store.all_reduce
    return patch(
        store,
        "all_reduce",
        lambda x, group, **k: real(x.div_(group.size) if "async_op" in k else x, group, **k),
    )


def _stages_of_a_rank_swapped() -> Any:
    """Where each of two ranks has three: the second and the third of the first rank."""
    real = Config.placement
    return patch(Config, "placement", lambda self, tp=0, stage=0: real(self, tp, {2: 4, 4: 2}.get(stage, stage)))


def _documents_dealt_otherwise() -> Any:
    """Each context-parallel rank cuts samples in its own way."""
    real = batch.share
    return patch(batch, "share", lambda ends, rank, shards, keep_whole: real(ends, rank, shards, rank == 0))


FAULTS: dict[str, Callable[[], Any]] = {
    "groups of the next rank": _groups_of_the_next_rank,
    "updates in the file": _updates_in_the_file,
    "decay twice at the border": partial(_update, _decays_twice_at_the_border),
    "copies averaged": _copies_averaged,
    "stages of a rank": _stages_of_a_rank_swapped,
    "dealt otherwise": _documents_dealt_otherwise,
    "rows of ranks": _rows_of_ranks_swapped,
    "own rows": _own_rows_for_all,
    "up of another rank": partial(_row, "_gate_up", _up_of_another_rank),
    "norms summed": partial(_row, "_stream_vector", lambda row, at: _slices(row, sum_over="tp")),
    "keys not summed": partial(_keys_summed_over, "none"),
    "keys summed over TP": partial(_keys_summed_over, "tp"),
    "groups in turn": _groups_in_turn,
    "copies of keys counted": partial(_row, "_qkv", lambda row, at: _slices(row, owned=True)),
    "bias on each rank": _bias_on_each_rank,
    "other ranks' tokens": _other_ranks_tokens_looked_up,
    "exponentials": _exponentials_of_ranks_not_rescaled,
    "gradients exchanged": _gradients_exchanged,
    "branch lost": _branch_lost,
    "labels before": _labels_of_the_micro_batch_before,
    "tied begins otherwise": _tied_copy_begins_otherwise,
    "labels of a share": _labels_within_a_share,
    "samples of rank 0": partial(_samples, lambda first, rank: (first, 0)),
    "samples overlap": partial(_samples, lambda first, rank: (first - rank, rank)),
    "a bucket not reduced": _first_bucket_not_reduced,
    "copies not summed": _copies_not_summed,
    "own clipping": _clipped_by_its_own_norm,
    "decay twice": partial(_update, _decays_twice),
    "Nesterov": _without_nesterov,
    "copies without direction": _copies_get_no_direction,
    "other matrices": _other_matrices,
    "tree in a row": lambda: patch(tree_store, "fold", lambda leaves: sum(leaves[1:], leaves[0])),
    "tree in another order": lambda: patch(tree_store.TreeStore, "order", lambda self, count: list(range(count))),
    "moments in the file": _moments_swapped_in_the_file,
    "seed of a rank": lambda: patch(
        build, "initialise", lambda s, t, seed, real=build.initialise: real(s, t, seed + s.placement.tp_rank)
    ),
    "source of a rank": lambda: patch(
        training_step,
        "sum_by_source",
        lambda batches, *rest, real=training_step.sum_by_source: real(
            [dataclasses.replace(b, sources=(b.sources + dist.get_rank() % 2) % 2) for b in batches], *rest
        ),
    ),
} | OTHER_FAULTS


def faulty_rank(rank: int, config: Config, fault: str) -> None:
    """What a rank of a proof does (``steps.run_rank``), with a fault in it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    ctx, folder = build_parallel_context(config.grid(world), torch.device("cpu")), Path(config.train.output)
    for name, dtype in precisions(config).items():
        with FAULTS[fault]():
            checkpoint = None if dtype == torch.float64 else folder / "checkpoints"
            write_outcome(folder / f"{name}-{rank}", take_steps(config, ctx, dtype, checkpoint))


def proof_with(fault: str, config: Config, world_size: int) -> parallel.Proof:
    """The proof of a layout whose ranks have a fault, without the launcher."""

    def launch(placed: Config, node: Any, entry: str) -> int:
        if node.world_size == 1:
            faulty_rank(0, placed, fault)
        else:
            run_distributed(node.world_size, faulty_rank, placed, fault)
        return 0

    with patch(parallel, "launch", launch):
        proof = parallel.prove_layout(config, world_size, lambda text: None)
    assert isinstance(proof, parallel.Proof)
    return proof
