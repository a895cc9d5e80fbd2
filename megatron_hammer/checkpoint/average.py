"""The mean of several checkpoints' weights, as a first checkpoint of weights: smoother than any of them.

::

    checkpoint 1 --\
    checkpoint 2 ---+-- sum of weight x tensor, a few MiB at a time --> DIR/checkpoints/step-00000000, DIR/model.yaml
    checkpoint 3 --/

Equal weights (arXiv 1803.05407, 2306.03241), weights of one's own, or an exponential moving average over the
checkpoints in their order. Sums are made in fp64 in that order and rounded once, so that any machine gives the same
bits. What comes of it is exported and trained on like an imported model; the optimizer's moments belong to the runs and
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.base.paths import what_is
from megatron_hammer.base.progress import track
from megatron_hammer.checkpoint.commit import SliceToWrite
from megatron_hammer.checkpoint.first import chunks_from, refuse_taken, write_first_checkpoint, write_preset
from megatron_hammer.checkpoint.fit import check_fits
from megatron_hammer.checkpoint.folder import find_checkpoints, open_checkpoint
from megatron_hammer.checkpoint.manifest import TOKENIZER, Manifest, checked_tokenizer_folder, saved_model
from megatron_hammer.checkpoint.read import LogicalReader
from megatron_hammer.tokenizer.load import load_tokenizer

_BLOCK_ELEMENTS = 1 << 20  # 8 MiB of fp64 sums


def choose_checkpoints(named: Sequence[str], last: int | None) -> list[Manifest]:
    """Those that are meant: of a single run its newest ``last``, oldest first, else the named ones in their order.

    Raises:
        ConfigError: E201 ``last`` does not fit.
        CheckpointError: one is not there, or there are fewer.
    """
    if last is None:
        if len(named) < 2:
            raise ConfigError(1, named[0], "is one checkpoint, whose mean is itself", "name several, or add --last N")
        return [open_checkpoint(path) for path in named]
    if len(named) > 1 or last < 2:
        rule = "takes one run, and 2 checkpoints of it or more"
        raise ConfigError(1, f"--last {last} of {len(named)} paths", rule, "name one run, or leave --last out")
    found = find_checkpoints(named[0])
    if len(found) < last:
        what = what_is(Path(named[0]))
        if not found and what not in ("", "the folder of a run"):
            raise CheckpointError(1, str(named[0]), f"is {what}, no run", "name the folder of a run (train.output)")
        remedy = f"use --last {len(found)}" if len(found) > 1 else "save more often (checkpoint.save_interval_steps)"
        raise CheckpointError(1, f"{named[0]}: --last {last}", f"has {len(found)} checkpoints", remedy)
    return [open_checkpoint(path) for path in found[-last:]]


def shares_of(count: int, weights: Sequence[float] | None, ema: float | None) -> list[float]:
    """By what each checkpoint counts; they add up to one.

    Args:
        weights: any with a positive sum; None: all alike.
        ema: decay d of a moving average that begins with the first: mean = d mean + (1 - d) next.

    Raises:
        ConfigError: E201 they do not fit.
    """
    if ema is not None:
        if weights is not None or not 0 < ema < 1:
            raise ConfigError(1, f"--ema {ema}", "must lie between 0 and 1, without --weights", "0.9 is usual")
        return [(1 - ema if i else 1.0) * ema ** (count - 1 - i) for i in range(count)]
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or min(given) < 0 or not 0 < sum(given) < float("inf"):
        rule = f"must be a number of at least 0 for each of the {count} checkpoints, not all 0"
        raise ConfigError(1, f"--weights {given}", rule, "give as many as there are checkpoints, oldest first")
    return [weight / sum(given) for weight in given]


def average_checkpoints(checkpoints: Sequence[Manifest], shares: Sequence[float], output: str | Path) -> Path:
    """Write the mean of some checkpoints' weights; the folder of the new checkpoint.

    Args:
        checkpoints: of one model and tokenizer.
        shares: of each; they add up to one.
        output: becomes what ``hf_to_checkpoint.py`` makes.

    Raises:
        CheckpointError: E414 they are of different models; or one is damaged.
        RefusedError: E510 of different tokenizers; E527 ``output`` holds a run, or a Hugging Face model.
    """
    newest, folder = checkpoints[-1], Path(output)
    model = saved_model(newest)
    for other in checkpoints[:-1]:
        check_fits(other, model, {"weight"})
        theirs, ours = (None if m.tokenizer is None else m.tokenizer.fingerprint for m in (other, newest))
        if theirs != ours:
            rule = f"has tokenizer {theirs}, and {newest.folder} {ours}"
            raise RefusedError(10, str(other.folder), rule, "average checkpoints of one tokenizer")
    refuse_taken(folder, "--output")
    source = checked_tokenizer_folder(newest)
    tokenizer = None if source is None else load_tokenizer(source)
    with ExitStack() as stack:
        readers = [stack.enter_context(LogicalReader(checkpoint)) for checkpoint in checkpoints]
        slices = []
        for tensor in (t for t in newest.tensors if t.kind == "weight"):
            cols = (0, tensor.shape[1]) if len(tensor.shape) == 2 else None
            bands = partial(_mean, readers, shares, tensor.name)
            slices.append(
                SliceToWrite(
                    tensor.name, "weight", (0, tensor.shape[0]), cols, tensor.shape, "float32", chunks_from(bands)
                )
            )
        averaged = [
            {"checkpoint": str(c.folder), "step": c.step, "digest": c.digest, "share": share}
            for c, share in zip(checkpoints, shares, strict=True)
        ]
        state = {"averaged": averaged, **({"token_ids": ids} if (ids := newest.state.get("token_ids")) else {})}
        target = write_first_checkpoint(
            folder / "checkpoints",
            slices,
            model=model,
            state=state,
            weights_dtype=newest.weights_dtype,
            tokenizer=tokenizer,
            watch=lambda items: track(items, "averaging", len(items), "tensors"),
        )
    write_preset(folder / "model.yaml", model, None if tokenizer is None else target / TOKENIZER)
    return target


def _mean(readers: Sequence[LogicalReader], shares: Sequence[float], name: str) -> Iterator[Tensor]:
    """The mean of a tensor, some rows at a time."""
    for parts in zip(*(_rows(reader, name) for reader in readers), strict=True):
        total = torch.zeros(parts[0].shape, dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True):
            total.add_(part.double(), alpha=share)
        yield total.float()


def _rows(reader: LogicalReader, name: str) -> Iterator[Tensor]:
    """A tensor's rows in blocks that are the same for every type that it may be stored in."""
    rest: Tensor | None = None
    for band in reader.bands(name):
        rest = band.clone() if rest is None else torch.cat([rest, band])
        height = max(1, _BLOCK_ELEMENTS // max(1, rest[0].numel()))
        while len(rest) >= height:
            yield rest[:height]
            rest = rest[height:]
    if rest is not None and len(rest):
        yield rest
