"""The indices of a run, built ahead: what ``tools/build_index.py`` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.config.phases import Course, Phase
from megatron_hammer.sampling.cache import SMALLEST
from megatron_hammer.sampling.samples import Order, TrainData


@dataclass(frozen=True)
class IndexPlan:
    """What the indices of a run follow from; the fields are those of ``TrainData``."""

    phases: Sequence[Phase] | Mapping[str, float]
    seq_length: int
    seed: int
    num_samples: int
    order: Order = "independent"
    index_folder: str | None = None


def plan_of(config: Config, course: Course | None = None) -> IndexPlan:
    """That of a config.

    Args:
        course: of its run; absent: one that begins with this config.

    Raises:
        ConfigError: it names no training data.
    """
    if not config.phases:
        raise ConfigError(85, "data.train", "is absent, so there is nothing to index", "add data.train=PREFIX")
    config.data.check()
    return IndexPlan(
        config.phases,
        config.data.seq_length,
        config.train.seed,
        (course or config.course()).num_samples,
        config.data.order,
        config.data.index_folder,
    )


def build_indices(
    plan: IndexPlan, epochs: int | None = None, begins: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Build, or find and check, all indices of a run; yields a line on each part as it is done.

    Args:
        epochs: those of the first passes over every source; None: those that the run's samples reach.
        begins: called with what is done next.

    Raises:
        ConfigError: a number is out of range, or ``epochs`` is given for the order "megatron".
        DataError: a dataset is missing or damaged, or another process builds for too long.
    """
    for name, value in (("--seq-length", plan.seq_length), ("--samples", plan.num_samples), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise ConfigError(86, f"{name}={value}", "must be at least 1", f"raise {name}")
    if epochs is not None and plan.order == "megatron":
        raise ConfigError(86, f"--epochs={epochs}", "has no meaning for the order megatron, whose epochs are one index",
                          "leave it out")  # fmt: skip
    started = time.monotonic()
    notes: list[str] = []
    data = TrainData(
        plan.phases,
        plan.seq_length,
        plan.seed,
        plan.order,
        plan.num_samples,
        index_folder=plan.index_folder,
        note=notes.append,
    )
    documents = sum(data.dataset(source).num_documents for source in range(len(data.sources)))
    begins(f"building the indices of {documents:,} documents in {len(data.sources)} sources")
    if epochs is None:
        data.prepare(0, plan.num_samples)
    else:
        data.prepare_epochs(epochs)
    yield from notes
    for dataset in map(data.dataset, range(len(data.sources))):
        small = dataset.num_documents < SMALLEST
        why = " (too few documents to keep an index: it is built in a moment)" if small else ""
        yield f"{dataset.prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens{why}"
    yield f"all indices are there after {time.monotonic() - started:,.1f} s"
