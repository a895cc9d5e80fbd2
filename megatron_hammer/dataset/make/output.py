"""The output of a preprocessing run: its unfinished datasets, the file of rejected documents, and the journal of both.

::

    EncodedBlock --append--> P_KEY_document.{bin,idx,meta.json}      one dataset for each JSON key
                             P_KEY_document.rejected.jsonl           on demand (quarantine.py)
                             P_KEY_document.journal.json             after each `shard_bytes` of text (journal.py)

Everything is published whole when the work is complete. A run that is killed or stopped leaves its temporary files and
a journal, from which the same command goes on to the same bytes; one that ends at a bad document before the first
journal leaves nothing, and never touches what had the output's name before.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import StaleState
from megatron_hammer.base.progress import say, size_of
from megatron_hammer.base.signals import Stopped
from megatron_hammer.corpus.long import LongText
from megatron_hammer.corpus.quarantine import RejectedFile
from megatron_hammer.corpus.readers import TEXT_DOCUMENTS
from megatron_hammer.dataset.format import SourceRecord, TokenizerRecord, dtype_for
from megatron_hammer.dataset.make.encoding import EncodedBlock, marks_of
from megatron_hammer.dataset.make.job import Job
from megatron_hammer.dataset.make.journal import Journal, Tally, check_journal, load_journal
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.tokenizer.interface import Tokenizer


@dataclass(frozen=True)
class BuildSummary:
    """What became of one JSON key."""

    prefix: Path
    documents: int
    empty_documents: int
    tokens: int
    token_bytes: int
    """Of one token on disk."""
    text_bytes: int
    """Of the input lines, uncompressed."""
    seconds: float
    rejected: dict[str, int] = field(default_factory=dict)
    """Documents that were left out, for each cause."""
    encoder: str = ""

    def __str__(self) -> str:
        causes = ", ".join(f"{code} {count:,}" for code, count in sorted(self.rejected.items()))
        rejected = f", {sum(self.rejected.values()):,} rejected ({causes})" if self.rejected else ""
        speed = rates(self.text_bytes, self.tokens, self.seconds)
        return (
            f"{self.prefix}: {self.documents:,} documents ({self.empty_documents:,} empty){rejected}, {self.tokens:,} "
            f"tokens of {self.token_bytes} bytes from {size_of(self.text_bytes)} in {self.seconds:,.1f} s: "
            f"{speed}; encoder: {self.encoder}"
        )


def rates(text_bytes: int, tokens: int, seconds: float) -> str:
    """How fast text, uncompressed, has become tokens."""
    seconds = max(seconds, 1e-9)
    return f"{text_bytes / seconds / 1e6:,.2f} MB/s, {tokens / seconds:,.0f} tokens/s"


def tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    """What a dataset's header says about its tokenizer."""
    special = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id
    return TokenizerRecord(tokenizer.fingerprint, tokenizer.vocab_size, *special, str(tokenizer.path))


def check_numbers(workers: int, shard_bytes: int) -> None:
    """Refuse a number of threads, or of bytes between two journals, with which nothing would be done."""
    if workers < 1:
        raise ConfigError(75, f"--workers={workers}", "must be at least 1", "give the number of threads that encode")
    if shard_bytes < 1:
        raise ConfigError(78, f"--shard-mb={shard_bytes / 1e6:g}", "must be above 0", "give megabytes of text")


def write_documents(
    job: Job, item: EncodedBlock, writers: Mapping[str, IndexedWriter], tally: Tally, threads: int
) -> None:
    """Append the documents of a block to each key's dataset, and count them.

    Args:
        threads: that encode a document too long to be held.
    """
    for rejected in item.rejected:
        tally.rejected[rejected.code] = tally.rejected.get(rejected.code, 0) + 1
    tally.documents += 1 if item.long is not None else len(item.documents[0][1])
    for key, text in zip(job.keys, item.long or ()):
        tally.tokens[key] = tally.tokens.get(key, 0) + _write_long(job, text, writers[key], threads)
    for key, (ids, lengths) in zip(job.keys, item.documents):
        writers[key].add(ids, lengths)
        tally.tokens[key] = tally.tokens.get(key, 0) + len(ids)


def _write_long(job: Job, text: str | LongText, writer: IndexedWriter, threads: int) -> int:
    """Encode and write a long document, piece by piece; its tokens."""
    (first, last), count = marks_of(job), 0
    for ids in job.tokenizer.encode_pieces([text] if isinstance(text, str) else text.pieces(), threads):
        if not len(ids):
            continue
        if count == 0 and first is not None:
            writer.add_part(np.array([first]))
            count += 1
        writer.add_part(ids)
        count += len(ids)
    if count and last is not None:
        writer.add_part(np.array([last]))
        count += 1
    writer.add(np.empty(0, np.int32), np.array([count]))
    return count


class DatasetOutput(AbstractContextManager["DatasetOutput"]):
    """The files of one job: a ``with`` block opens them, and publishes them or keeps what a journal stands for.

    Args:
        shard_bytes: of text between two journals.
        workers: threads that encode a document too long to be held.
        restart: begin with nothing, instead of going on from the journal of an interrupted run.
    """

    def __init__(self, job: Job, output_prefix: str | Path, shard_bytes: int, workers: int, restart: bool) -> None:
        self.job, self.shard_bytes, self.workers, self.restart = job, shard_bytes, workers, restart
        self.prefixes = {key: Path(f"{output_prefix}_{key}_document") for key in job.keys}
        base = self.prefixes[job.keys[0]]
        self.journal_path = Path(f"{base}.journal.json")
        self.rejected_path = Path(f"{base}.rejected.jsonl")
        self.parts_path = Path(f"{base}.parts")
        """Of a run on a cluster: ``ray.py``."""
        identity = {
            "inputs": [str(path) for path in job.files],
            "json_keys": list(job.keys),
            "append_eod": job.append_eod,
            "prepend_bos": job.prepend_bos,
            "text_documents": job.text_documents,
            "tokenizer": job.tokenizer.fingerprint,
        }
        self.journal = Journal(identity, list(job.identities), job.on_error, tallies=[Tally() for _ in job.files])
        self._kept = False  # whether a journal of this run is on disk
        self._text_bytes_kept = 0
        self._started = self._started_now = time.monotonic()
        self._done_before = 0, 0  # by the run that left the journal: bytes of text, tokens
        self._stack = ExitStack()
        self.writers: dict[str, IndexedWriter] = {}
        self.rejected: RejectedFile | None = None

    # ---- begin ----

    def __enter__(self) -> DatasetOutput:
        found = None if self.restart or not self.journal_path.exists() else load_journal(self.journal_path)
        if found is None or not self._goes_on(found):
            self._open_files(None)
            self._remove_journal()  # only now: the lock is ours
        return self

    def _goes_on(self, found: Journal) -> bool:
        """Whether the files are open where a journal says; False where they are not those that it speaks of."""
        check_journal(self.journal_path, found, self.journal)
        found.files, found.on_error = self.journal.files, self.journal.on_error
        try:
            self._open_files(found)
        except StaleState as reason:
            say(f"{self.journal_path}: {reason}: beginning again")
            return False
        self.journal, self._kept, self._text_bytes_kept = found, True, found.text_bytes
        self._started -= found.seconds
        self._done_before = found.text_bytes, self._num_tokens()
        say(f"going on from {self.journal_path}: {found.text_bytes / 1e6:,.0f} MB of text are done")
        return True

    def _open_files(self, journal: Journal | None) -> None:
        """Open everything for writing, anew or behind what a journal states."""
        job = self.job
        options = dict[str, object](append_eod=job.append_eod, prepend_bos=job.prepend_bos, on_error=job.on_error)
        if set(job.kinds) & set(TEXT_DOCUMENTS):
            options["text_documents"] = job.text_documents
        self.writers, self.rejected = {}, None
        with ExitStack() as stack:
            for key, prefix in self.prefixes.items():
                if journal is not None and self._is_published(journal, f"{prefix}.idx", f"{prefix}.bin.tmp"):
                    continue  # killed between the datasets of two keys
                writer = IndexedWriter(
                    prefix,
                    job.tokenizer.vocab_size,
                    tokenizer=tokenizer_record(job.tokenizer),
                    options={"json_key": key, **options},
                    resume=None if journal is None else journal.writers[key],
                )
                self.writers[key] = stack.enter_context(writer)
            if job.on_error == "quarantine":
                self._open_rejected(journal, stack)
            self._stack = stack.pop_all()

    def _open_rejected(self, journal: Journal | None, stack: ExitStack) -> None:
        temporary = RejectedFile.temporary_of(self.rejected_path)
        if journal is None or not self._is_published(journal, self.rejected_path, temporary):
            self.rejected = RejectedFile(self.rejected_path, None if journal is None else journal.rejected_bytes)
            stack.enter_context(self.rejected)

    def _is_published(self, journal: Journal, path: str | Path, temporary: str | Path) -> bool:
        return journal.source == len(self.job.files) and os.path.exists(path) and not os.path.exists(temporary)

    # ---- on the way ----

    def describe_rates(self) -> str:
        """How fast this run makes tokens of text."""
        text_bytes, tokens = self._done_before
        made = self.journal.text_bytes - text_bytes, self._num_tokens() - tokens
        return f"text: {rates(*made, time.monotonic() - self._started_now)}"

    def _num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self.writers.values())

    def append(self, item: EncodedBlock) -> None:
        """Write a block's documents, and a journal where one is due."""
        journal, block = self.journal, item.block
        tally = journal.tallies[block.source]
        write_documents(self.job, item, self.writers, tally, self.workers)
        if self.rejected is not None:
            self.rejected.write(self.job.files[block.source], item.rejected)
        journal.text_bytes += block.text_bytes
        journal.raw_bytes += block.raw_bytes
        journal.source, (journal.offset, journal.line) = block.source, block.end
        journal.content_hash = block.content_hash
        if block.last:
            tally.xxh3 = block.file_hash
            journal.source, journal.offset, journal.line, journal.content_hash = block.source + 1, 0, 1, None
        if journal.text_bytes - self._text_bytes_kept >= self.shard_bytes:
            self.save_journal()

    def save_journal(self) -> None:
        """Make everything durable up to here, and say so."""
        for key, writer in self.writers.items():
            self.journal.writers[key] = writer.save_state()
        if self.rejected is not None:
            self.journal.rejected_bytes = self.rejected.save_state()
        self.journal.seconds = time.monotonic() - self._started
        self.journal.save(self.journal_path)
        self._kept, self._text_bytes_kept = True, self.journal.text_bytes

    def stop(self) -> str:
        """Keep what is done; what to tell the user."""
        if self.journal.text_bytes == 0:
            return "stopped before the first document"
        self.save_journal()
        return f"stopped after {self.journal.text_bytes / 1e6:,.0f} MB of text; the same command goes on from there"

    # ---- end ----

    def check_complete(self) -> None:
        """All input is read: nothing is published where there is no text."""
        for key, writer in self.writers.items():
            if writer.num_tokens == 0:
                raise self._no_text(key)
            for identity, tally in zip(self.journal.files, self.journal.tallies):
                rejected = dict(sorted(tally.rejected.items()))
                taken = tally.documents, tally.tokens.get(key, 0), tally.xxh3, rejected
                writer.sources.append(SourceRecord(identity["path"], identity["bytes"], *taken))
        if self._kept:
            self.save_journal()  # a kill while the datasets get their names must find them finished

    def _no_text(self, key: str) -> DataError:
        inputs = ", ".join(map(str, self.job.files[:4])) + (" ..." if len(self.job.files) > 4 else "")
        return DataError(43, f'key "{key}" of {inputs}', "holds no text", "give a corpus with text")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish everything, or keep what a journal stands for, or leave no trace."""
        if kind is not None and self._kept and not isinstance(error, Stopped):
            done = f"{self._text_bytes_kept / 1e6:,.0f} MB"
            say(f"{self.journal_path} keeps what was done, {done} of text: the same command goes on from there")
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self._remove_journal()

    def _remove_journal(self) -> None:
        self.journal_path.unlink(missing_ok=True)
        Path(f"{self.journal_path}.tmp").unlink(missing_ok=True)

    def summaries(self) -> list[BuildSummary]:
        """For each key, in order."""
        tallies = self.journal.tallies
        documents = sum(tally.documents for tally in tallies)
        rejected = sum((Counter(tally.rejected) for tally in tallies), Counter[str]())
        facts = self.journal.text_bytes, time.monotonic() - self._started, dict(rejected), self.job.tokenizer.encoder
        token_bytes = dtype_for(self.job.tokenizer.vocab_size).itemsize
        found = []
        for key in self.job.keys:
            writer = self.writers.get(key)  # None: published by the run before
            sequences = self.journal.writers[key]["sequences"] if writer is None else writer.num_sequences
            tokens = sum(tally.tokens.get(key, 0) for tally in tallies)
            found.append(
                BuildSummary(self.prefixes[key], documents, documents - sequences, tokens, token_bytes, *facts)
            )
        return found
