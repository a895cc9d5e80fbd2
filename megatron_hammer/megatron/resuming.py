"""Reads what resuming a Megatron-LM run needs beside the weights: fp32 masters, optimizer moments, settings.

Of the formats in which Megatron-LM saves its distributed optimizer, ``fully_reshardable`` has masters and moments under
the names and global shapes of the model's tensors (``optimizer.state.exp_avg.decoder...``), so they are merged and cut
as these. ``dp_reshardable`` and the legacy files have flat buckets, whose order follows from the ranks, the bucket size
and the version that wrote them: only a Megatron-LM of the same grouping can read them, and they are refused.

The settings are those that decide what a step computes: Adam's, the schedule's, batch size and sequence length. The
samples that follow are not those that Megatron-LM would read next: the run begins its own order at the count of
consumed samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.config import Config, ModelConfig, OptimizerConfig, config_from_tree
from megatron_hammer.megatron.distributed import FULLY_RESHARDABLE, DistributedReader
from megatron_hammer.megatron.legacy import LegacyReader

KINDS_THERE = {"weight": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Our kinds of tensors, and theirs."""
_DEEPEST = 10  # of what common.pt says of the optimizer, where the steps lie: four
_STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant"}
_NUMBERS = {  # theirs -> our setting
    "lr": "optimizer.lr", "min_lr": "optimizer.min_lr", "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1", "adam_beta2": "optimizer.beta2", "adam_eps": "optimizer.eps",
    "clip_grad": "optimizer.clip_grad", "lr_warmup_iters": "schedule.warmup_steps",
    "lr_decay_iters": "schedule.decay_steps", "train_iters": "train.num_steps",
    "micro_batch_size": "train.micro_batch_size", "global_batch_size": "train.global_batch_size",
    "seq_length": "data.seq_length", "seed": "train.seed",
}  # fmt: skip


@dataclass(frozen=True)
class Resumable:
    """What a checkpoint with its optimizer has more."""

    reader: DistributedReader
    config: Config
    """Of the run that goes on."""
    state: dict[str, Any]
    """For the manifest."""


def resumable(reader: LegacyReader | DistributedReader | Any, model: ModelConfig) -> Resumable:
    """The rest of a checkpoint's state.

    Raises:
        CheckpointError: E430 the optimizer is in another format; E432, E434 settings that ours lacks, or none.
    """
    if not isinstance(reader, DistributedReader) or FULLY_RESHARDABLE not in reader.optimizer:
        found = f"is {reader.optimizer}" if reader.optimizer else "is not there"
        remedy = "save with --dist-ckpt-optim-fully-reshardable, or leave --optimizer out for the weights alone"
        rule = f"{found}; only {FULLY_RESHARDABLE} is read"
        raise CheckpointError(30, f"{reader.folder}: the optimizer's state", rule, remedy)
    where, args = str(reader.folder), reader.args
    updates = _updates(reader.common.get("optimizer"))
    if updates is None:
        raise CheckpointError(34, f"{where}: the optimizer's step", "is missing in common.pt", "leave --optimizer out")
    consumed = args.get("consumed_train_samples")
    if type(consumed) is not int or not 0 <= consumed < 2**53 or reader.iteration < 1:
        rule = "must be a whole number, and the iteration at least 1"
        raise CheckpointError(
            34, f"{where}: args.consumed_train_samples={str(consumed)[:80]}", rule, "leave --optimizer out"
        )
    scalars = {"updates": float(updates), "loss_scale": OptimizerConfig.initial_loss_scale, "good_steps": 0.0}
    config = _config(args, model, where)
    if config.train.precision != "fp16":
        scalars["loss_scale"] = 1.0
    return Resumable(reader, config, {"consumed_samples": consumed, "samples_digest": "", "optimizer": scalars})


def _updates(optimizer: Any) -> int | None:
    """The number of Adam's updates, which stands in each of its groups."""
    found = set(_steps(optimizer, 0))
    return found.pop() if len(found) == 1 else None


def _steps(tree: Any, depth: int) -> Iterator[int]:
    """Values of ``step``; a pickle may hold a mapping that holds itself."""
    if depth > _DEEPEST:
        return
    if isinstance(tree, dict):
        for name, value in tree.items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if name == "step" and type(number) in (int, float) and 0 <= number < 2**53 and number == int(number):
                yield int(number)
            else:
                yield from _steps(value, depth + 1)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _steps(value, depth + 1)


def _config(args: Mapping[str, Any], model: ModelConfig, where: str) -> Config:
    """The settings of the run, as far as a step computes with them."""
    style = args.get("lr_decay_style")
    if not isinstance(style, str) or style not in _STYLES:
        rule = f"is a schedule that ours lacks: only {', '.join(_STYLES)} can be gone on with"
        raise CheckpointError(32, f"{where}: args.lr_decay_style={str(style)[:80]}", rule, "leave --optimizer out")
    if args.get("optimizer", "adam") != "adam":
        rule = "is an optimizer that ours lacks: only adam can be gone on with"
        raise CheckpointError(
            32, f"{where}: args.optimizer={str(args['optimizer'])[:80]}", rule, "leave --optimizer out"
        )
    precision = "bf16" if args.get("bf16") else "fp16" if args.get("fp16") else "fp32"
    tree: dict[str, dict[str, Any]] = {
        "model": vars(model) | {"rope_scaling": None if model.rope_scaling is None else vars(model.rope_scaling)},
        "schedule": {"style": _STYLES[style]},
        "train": {"precision": precision},
    }
    for theirs, ours in _NUMBERS.items():
        if args.get(theirs) is not None:
            group, name = ours.split(".")
            tree.setdefault(group, {})[name] = args[theirs]
    if style == "constant":
        tree["schedule"].pop("decay_steps", None)
    try:
        config = config_from_tree(tree)
        for part in (config.optimizer, config.schedule, config.data, config.train):
            part.check()
    except ConfigError as error:
        rule = f"cannot be gone on with: {error.rule}"
        raise CheckpointError(32, f"{where}: args ({error.what})", rule, "leave --optimizer out") from None
    return config
