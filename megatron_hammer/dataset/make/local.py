"""Makes the datasets of a job on this machine: what ``tools/preprocess_data.py`` does unless it is given a cluster.

::

    files -> blocks -> parse, encode (N threads) -> append, in order -> P_KEY_document.{bin,idx,meta.json}
    corpus/readers.py       encoding.py             output.py           published whole, at the end

Documents keep their order, and the files are the same for any number of threads. As in Megatron-LM, an empty text
becomes a document without a sequence: it gets neither a first nor a last id.

A bad document ends the work, names file, line and byte, and leaves whatever had the output's name before; or it is
skipped, counted by cause, and on demand written to ``P_KEY_document.rejected.jsonl``. A document of which one JSON key
is bad is left out for all keys.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from megatron_hammer.base.progress import Progress
from megatron_hammer.base.signals import Stopped
from megatron_hammer.corpus.file_blocks import Block, FileRange, Position
from megatron_hammer.corpus.readers import read_range
from megatron_hammer.corpus.stream import check_unchanged
from megatron_hammer.dataset.make.encoding import encode_blocks
from megatron_hammer.dataset.make.job import SHARD_BYTES, Job
from megatron_hammer.dataset.make.journal import input_changed, other_command
from megatron_hammer.dataset.make.output import BuildSummary, DatasetOutput, check_numbers


def build_datasets(
    job: Job,
    output_prefix: str | Path,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    stop: threading.Event | None = None,
) -> list[BuildSummary]:
    """Tokenize a corpus into one dataset a key, ``{output_prefix}_{key}_document``; all are published, or none.

    Args:
        job: what ``prepare_job`` returns.
        workers: threads that parse and encode; the result does not depend on it.
        shard_bytes: of text between two journals.
        restart: drop what an interrupted run left, its journal or a cluster's parts, instead of going on from it.
        stop: setting it ends the work soon, with a journal.

    Raises:
        ConfigError: no workers, no bytes between two journals.
        DataError: malformed or changing input, see ``corpus/readers.py``; no text at all.
        RefusedError: the journal of another command is there, or an input has changed.
        Stopped: ``stop`` was set.
    """
    check_numbers(workers, shard_bytes)
    output = DatasetOutput(job, output_prefix, shard_bytes, workers, restart)
    if output.parts_path.exists() and not restart:
        raise other_command(output.parts_path, "engine ray, now local")
    with output:
        if restart:
            shutil.rmtree(output.parts_path, ignore_errors=True)  # only now: the lock is ours
        total = sum(identity["bytes"] for identity in job.identities)
        with (
            Progress(" ".join(job.keys), total, done=output.journal.raw_bytes, note=output.describe_rates) as progress,
            closing(encode_blocks(job, _remaining_blocks(job, output), workers, stop)) as encoded,
        ):
            for item in encoded:
                output.append(item)
                progress.advance(item.block.raw_bytes)
        if stop is not None and stop.is_set() and output.journal.source < len(job.files):
            raise Stopped(output.stop())
        output.check_complete()
    return output.summaries()


def _remaining_blocks(job: Job, output: DatasetOutput) -> Generator[Block, None, None]:
    """The blocks that are still to do."""
    journal = output.journal
    first, place, expected = journal.source, Position(journal.offset, journal.line), journal.content_hash
    for source, path in enumerate(job.files[first:], first):
        resume = place if source == first and place.offset else None
        blocks = read_range(path, FileRange(source), job.keys, job.text_documents, resume, job.on_error != "stop")
        for number, block in enumerate(blocks):
            if resume is not None and number == 0 and block.content_hash != expected:
                raise input_changed(output.journal_path, path)
            if block.last:
                check_unchanged(path, job.identities[source])
            yield block
