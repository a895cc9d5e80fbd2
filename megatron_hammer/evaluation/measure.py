"""Perplexity of several models on several sets, in figures that compare across tokenizers.

With L the sum of -ln p over the predicted tokens of a set (specials included)::

    loss                  L / predicted tokens          per token: compares models of one tokenizer only
    perplexity            e^loss
    bits_per_byte         L / ln 2 / UTF-8 bytes        of the text that these tokens stand for
    bits_per_character    L / ln 2 / characters
    reference_perplexity  e^(L / reference tokens)      the perplexity that a model of the reference tokenizer with the
                                                        same L has: how published tables make models comparable

The losses are those of ``train/evaluate.py`` itself: for a set of a run, with the same number of samples, every figure
is the one in metrics.jsonl. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Progress
from megatron_hammer.base.tables import align
from megatron_hammer.evaluation.sets import Framing, NamedSet, count_text, encoder_of, num_targets, open_set
from megatron_hammer.evaluation.subjects import Subject
from megatron_hammer.metrics.metrics_file import finite
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.train.evaluate import evaluate, perplexity

Around = Literal["auto", "both", "bos", "eos", "none"]
"""Ids around each document of a text. auto: eos, and bos where the model's documents begin with it in training."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How to measure; None: as the model's own config says."""

    seq_length: int | None = None
    micro_batch_size: int | None = None
    samples: int | None = None
    """Windows of each set; None: all."""
    around: Around = "auto"
    key: str = "text"
    dtype: str | None = None
    device: str = "cpu"
    document_mask: bool | None = None


@dataclass(frozen=True)
class Figures:
    """What one model gave on one set."""

    model: str
    set: str
    step: int | None
    seq_length: int
    tokens: int
    """Predicted."""
    loss: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_character: float | None
    reference_perplexity: float | None
    bytes: int | None
    characters: int | None
    reference_tokens: int | None
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether the model gave a probability to every token."""
        return math.isfinite(self.loss)

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON, where what is not finite is null."""
        return finite(asdict(self))


def sets_of(subjects: Sequence[Subject]) -> list[NamedSet]:
    """The validation sets of the first model that is a run with some, where the command names none.

    Raises:
        ConfigError: E234 no model has any.
    """
    for subject in subjects:
        if subject.valid:
            return [NamedSet(name, prefix, False) for name, prefix in subject.valid.items()]
    remedy = "name sets: --set NAME=PATH, an indexed dataset or a text file"
    raise ConfigError(34, "--set", "is not given, and none of the models is a run with data.valid", remedy)


def check_options(subjects: Sequence[Subject], options: EvaluationOptions) -> None:
    """Raise ``ConfigError`` for sizes that cannot be, or what a model is not made for."""
    sizes = {"--seq-length": options.seq_length, "--samples": options.samples}
    for name, value in (sizes | {"--micro-batch-size": options.micro_batch_size}).items():
        if value is not None and value < 1:
            raise ConfigError(33, f"{name}={value}", "must be at least 1", f"raise {name}")
    asked = {"both": ("bos", "eos"), "bos": ("bos",), "eos": ("eos",)}.get(options.around, ())
    for subject in subjects:
        for name in asked if subject.tokenizer is not None else ():
            if getattr(subject.tokenizer, f"{name}_id") is None:
                rule = f"asks for {name}, which the tokenizer of {subject.name} does not have"
                raise ConfigError(33, f"--around {options.around}", rule, "leave it out, or use --around none")
        longest = subject.longest
        if options.seq_length is not None and longest is not None and options.seq_length > longest:
            rule = f"is longer than {subject.name} is made for, {longest} tokens"
            raise ConfigError(33, f"--seq-length={options.seq_length}", rule, f"use at most {longest}")
        if subject.kind == "transformers" and options.document_mask:
            rule = f"is not for {subject.name}, which transformers computes"
            raise ConfigError(33, "--attention-mask document", rule, "leave it out")


def measure(
    subjects: Sequence[Subject],
    sets: Sequence[NamedSet],
    options: EvaluationOptions,
    reference: Tokenizer | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Figures]:
    """The figures of each model on each set, as they are known.

    Raises:
        HammerError: a set that is not the model's, weights that are damaged.
    """
    device = torch.device(options.device)
    ctx = ParallelContext.single(device)
    for subject in subjects:  # before the first of them takes its time
        for named in sets:
            if named.is_text:
                encoder_of(named, subject.tokenizer, subject.name)
    for subject in subjects:
        seq_length = options.seq_length or subject.seq_length
        note(f"{subject.name}: {subject.path} ({subject.kind}), windows of {seq_length} tokens")
        model = subject.load(ctx, options.dtype)
        for named in sets:
            with TemporaryDirectory(prefix="evaluate-") as folder:
                yield _measure_one(subject, model, named, seq_length, options, reference, Path(folder), ctx)
        del model  # before the next comes
        gc.collect()


def _measure_one(
    subject: Subject,
    model: Any,
    named: NamedSet,
    seq_length: int,
    options: EvaluationOptions,
    reference: Tokenizer | None,
    folder: Path,
    ctx: ParallelContext,
) -> Figures:
    mask = subject.document_mask if options.document_mask is None else options.document_mask
    valid = open_set(
        named,
        subject.tokenizer,
        framing_of(subject, options.around),
        subject.vocab_size,
        seq_length,
        options.samples,
        mask,
        folder,
        options.key,
    )
    counts = count_text(named, valid, subject.tokenizer, reference, options.key)
    began = time.perf_counter()
    size = options.micro_batch_size or subject.micro_batch_size
    with Progress(f"{subject.name} on {named.name}", -(-len(valid) // size), "micro-batches") as progress:
        result = evaluate(model, valid, size, None, ctx, advance=progress.advance)
    seconds = time.perf_counter() - began
    tokens = num_targets(valid)
    bits = result.loss * tokens / math.log(2)
    by_reference = None
    if counts is not None and counts.reference_tokens:
        by_reference = perplexity(result.loss * tokens / counts.reference_tokens)
    return Figures(
        subject.name,
        named.name,
        subject.step,
        seq_length,
        tokens,
        result.loss,
        result.perplexity,
        bits / counts.num_bytes if counts is not None and counts.num_bytes else None,
        bits / counts.num_characters if counts is not None and counts.num_characters else None,
        by_reference,
        None if counts is None else counts.num_bytes,
        None if counts is None else counts.num_characters,
        None if counts is None else counts.reference_tokens,
        seconds,
    )


def framing_of(subject: Subject, around: Around) -> Framing:
    """The ids around each document of a text for a model."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return Framing(None, None)
    wants_bos = subject.begins_with_bos if around == "auto" else around in ("both", "bos")
    return Framing(
        tokenizer.bos_id if wants_bos else None, tokenizer.eos_id if around in ("auto", "both", "eos") else None
    )


def results_table(figures: Sequence[Figures]) -> list[str]:
    """The figures as a table for people: a row a set and model, the models of a set together."""
    header = ["set", "model", "tokens", "loss", "perplexity", "bits/byte", "bits/character"]
    with_reference = any(f.reference_perplexity is not None for f in figures)
    rows = [header + (["by reference"] if with_reference else [])]
    for name in dict.fromkeys(f.set for f in figures):
        for f in figures:
            if f.set == name:
                rows.append([
                    f.set, f.model, f"{f.tokens:,}", f"{f.loss:.4f}", f"{f.perplexity:,.4f}",
                    *("-" if v is None else f"{v:.4f}" for v in (f.bits_per_byte, f.bits_per_character)),
                    *(["-" if f.reference_perplexity is None else f"{f.reference_perplexity:,.4f}"] * with_reference),
                ])  # fmt: skip
    return align(rows)
