"""What tests of preprocessing share: from a corpus to datasets in one call, by either engine; a folder in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_hammer.dataset.make import local
from megatron_hammer.dataset.make.job import OnError, prepare_job
from megatron_hammer.dataset.make.output import BuildSummary


@pytest.fixture(name="tmp_path")
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a folder: what is synced a thousand times in these tests is not what they test."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def build_datasets(
    inputs: Sequence[str | Path],
    json_keys: Sequence[str],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    append_eod: bool,
    prepend_bos: bool = False,
    workers: int | None = None,
    on_error: OnError = "stop",
    text_documents: str = "file",
    engine: Callable[..., list[BuildSummary]] = local.build_datasets,
    **options: object,
) -> list[BuildSummary]:
    """``prepare_job``, then the engine; arguments as theirs, which have their own default for ``workers``."""
    job = prepare_job(inputs, json_keys, tokenizer_path, append_eod, prepend_bos, on_error, text_documents)
    if workers is not None:
        options["workers"] = workers
    return engine(job, output_prefix, **options)
