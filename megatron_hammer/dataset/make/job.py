"""Corpus + tokenizer -> indexed dataset: what ``tools/preprocess_data.py`` does.

::

    files -> shards -> blocks -> parse, encode (N threads) -> append, in order -> P_KEY_document.{bin,idx,meta.json}
                       one thread  no order needed            calling thread      published whole, at the end

The three stages overlap (``overlap.py``) and hold blocks of bounded size, so memory does not grow with the corpus;
documents keep their order, and the files are the same for any number of threads. As in Megatron-LM, an empty text
becomes a document without a sequence: it gets neither a first nor a last id.

A bad document ends the work, names file, line and byte, and leaves whatever had the output's name before; or it is
skipped, counted by cause, and on demand written to ``P_KEY_document.rejected.jsonl``. A document of which one JSON key
is bad is left out for all keys. Every ``shard_bytes`` of text a journal is written (``journal.py``): a run that was
killed goes on from there when the same command is given again, to the same bytes.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.progress import say
from megatron_hammer.corpus import readers
from megatron_hammer.corpus.long import LongText
from megatron_hammer.corpus.parse import Rejected, parse_block
from megatron_hammer.corpus.readers import Block, Position
from megatron_hammer.corpus.stream import file_identity
from megatron_hammer.dataset.format import SourceRecord, TokenizerRecord, dtype_for, path_of
from megatron_hammer.dataset.make.journal import (
    Journal,
    Tally,
    check_journal,
    input_changed,
    load_journal,
    other_command,
    remove_journal,
)
from megatron_hammer.dataset.make.pipeline import in_order
from megatron_hammer.dataset.make.quarantine import RejectedFile
from megatron_hammer.dataset.writer import IndexedWriter, StaleState
from megatron_hammer.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

    from megatron_hammer.tokenizer.load import Tokenizer

OnError = Literal["stop", "skip", "quarantine"]
SHARD_BYTES = 1 << 30  # of text between two journals: ten to twenty seconds of work for two cores
_ROOM_BLOCKS = 2  # in flight for each worker, beside the one in work
_REPORT_SECONDS = 10.0  # between two plain progress lines


class Stopped(Exception):
    """The work was stopped from outside and can go on; the text says from where."""


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
        rate = max(self.seconds, 1e-9)
        causes = ", ".join(f"{code} {count:,}" for code, count in sorted(self.rejected.items()))
        rejected = f", {sum(self.rejected.values()):,} rejected ({causes})" if self.rejected else ""
        return (
            f"{self.prefix}: {self.documents:,} documents ({self.empty_documents:,} empty){rejected}, {self.tokens:,} "
            f"tokens of {self.token_bytes} bytes from {self.text_bytes / 1e6:,.1f} MB in {self.seconds:,.1f} s: "
            f"{self.text_bytes / rate / 1e6:,.2f} MB/s, {self.tokens / rate:,.0f} tokens/s; encoder: {self.encoder}"
        )


@dataclass(frozen=True)
class Job:
    """What decides the bytes of the datasets, besides the files' content."""

    files: tuple[Path, ...]
    keys: tuple[str, ...]
    tokenizer: Tokenizer
    append_eod: bool
    prepend_bos: bool
    on_error: OnError
    text_documents: str

    @property
    def first(self) -> int | None:
        """The id that begins every document."""
        return self.tokenizer.bos_id if self.prepend_bos else None

    @property
    def last(self) -> int | None:
        """The id that ends every document."""
        return self.tokenizer.eos_id if self.append_eod else None

    def header_options(self, key: str) -> dict[str, object]:
        """What the dataset's header says about how it was made."""
        options: dict[str, object] = {"json_key": key, "append_eod": self.append_eod, "prepend_bos": self.prepend_bos}
        options["on_error"] = self.on_error
        if any(readers.kind_of(path, self.text_documents) in readers.TEXT_DOCUMENTS for path in self.files):
            options["text_documents"] = self.text_documents
        return options

    def new_journal(self) -> Journal:
        """Of this job, before its first document."""
        identity = {
            "inputs": [str(path) for path in self.files],
            "json_keys": list(self.keys),
            "append_eod": self.append_eod,
            "prepend_bos": self.prepend_bos,
            "text_documents": self.text_documents,
            "tokenizer": self.tokenizer.fingerprint,
        }
        files = [file_identity(path) for path in self.files]
        return Journal(identity, files, self.on_error, tallies=[Tally() for _ in files])


def prepare_job(
    inputs: Sequence[str | Path],
    json_keys: Sequence[str],
    tokenizer_path: str | Path,
    append_eod: bool,
    prepend_bos: bool = False,
    on_error: OnError = "stop",
    text_documents: str = "file",
) -> Job:
    """Check what the user asks for, find the files, load the tokenizer.

    Args:
        inputs: files, folders and patterns, in the order their documents shall have (``corpus/readers.py``).
        json_keys: fields (parquet: columns) that hold text; plain text files are the text of every key.
        append_eod: the tokenizer's eos id ends every document.
        prepend_bos: its bos id begins every document.
        on_error: what to do with a bad document: end the work, leave it out, or leave it out and write it down.
        text_documents: what a document of a ``.txt`` file is, one of ``readers.TEXT_DOCUMENTS``.

    Raises:
        ConfigError: a needed special id is missing in the tokenizer, a key is named twice, an unknown choice.
        DataError: a missing input or tokenizer, or a damaged one.
    """
    if len(set(json_keys)) != len(json_keys):
        raise ConfigError(74, f"--json-keys {' '.join(json_keys)}", "must not name a key twice", "name each key once")
    for option, value, choices in (
        ("--on-error", on_error, get_args(OnError)),
        ("--text-documents", text_documents, readers.TEXT_DOCUMENTS),
    ):
        if value not in choices:
            raise ConfigError(77, f"{option}={value}", f"must be one of {', '.join(choices)}", "choose one of these")
    files = tuple(readers.expand_inputs(inputs))  # a file that is missing should not be found out after an hour
    tokenizer = load_tokenizer(tokenizer_path)
    if prepend_bos:
        _check_id("--prepend-bos", "beginning-of-document", tokenizer, tokenizer.bos_id)
    if append_eod:
        _check_id("--append-eod", "end-of-document", tokenizer, tokenizer.eos_id)
    return Job(files, tuple(json_keys), tokenizer, append_eod, prepend_bos, on_error, text_documents)


def _check_id(option: str, meaning: str, tokenizer: Tokenizer, value: int | None) -> None:
    if value is None:
        raise ConfigError(70, f"{option} with {tokenizer.path}", f"needs a {meaning} id, which this tokenizer lacks",
                          f"leave {option} out, or use a tokenizer that has one")  # fmt: skip


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
        restart: drop the journal that an interrupted run left, instead of going on from it.
        stop: setting it ends the work soon, with a journal.

    Raises:
        ConfigError: no workers, no bytes between two journals.
        DataError: malformed or changing input, see ``corpus/readers.py``; no text at all.
        RefusedError: the journal of another command is there, or an input has changed.
        Stopped: ``stop`` was set.
    """
    check_numbers(workers, shard_bytes)
    output = Output(job, output_prefix, shard_bytes, workers)
    if restart:
        output.open_new()
        shutil.rmtree(output.parts_path, ignore_errors=True)
    else:
        output.open()
    with output:
        _run(job, output, workers, stop)
        output.check_complete()
    return output.summaries()


def check_numbers(workers: int, shard_bytes: int) -> None:
    if workers < 1:
        raise ConfigError(75, f"--workers={workers}", "must be at least 1", "give the number of threads that encode")
    if shard_bytes < 1:
        raise ConfigError(78, f"--shard-mb={shard_bytes / 1e6:g}", "must be above 0", "give megabytes of text")


def tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    """What a dataset's header says about its tokenizer."""
    return TokenizerRecord(
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.unk_id,
    )


# ---- one block ----


@dataclass
class Encoded:
    """What a block becomes."""

    block: Block
    """Without its data."""
    documents: list[tuple[np.ndarray, np.ndarray]]
    """For each key the ids, [sum of lengths] int32, and the lengths, [documents] int64."""
    rejected: list[Rejected]
    long: list[str | LongText] | None = None
    """For each key the text of a long document, still to be encoded, piece by piece: it would not fit in memory."""


def encode_block(job: Job, block: Block, threads: int = 1) -> Encoded:
    """Parse and encode: a pure function of the block, for any thread.

    Raises:
        DataError: a bad document, where these end the work.
    """
    parsed = parse_block(block, job.files[block.source], job.keys, job.on_error == "stop", in_pieces=True)
    block.data = None  # a long document needs the memory
    if parsed.long is not None:
        return Encoded(block, [], parsed.rejected, parsed.long)
    documents = []
    for texts in parsed.texts:
        nothing = np.empty(0, np.int32), np.empty(0, np.int64)
        documents.append(job.tokenizer.encode_documents(texts, threads, job.first, job.last) if texts else nothing)
        if texts is not parsed.texts[-1]:
            texts.clear()
    return Encoded(block, documents, parsed.rejected)


def write_documents(
    job: Job, item: Encoded, writers: Mapping[str, IndexedWriter], threads: int
) -> tuple[dict[str, int], int]:
    """Append what a block has become to each key's dataset; the tokens of each key, and the documents."""
    if item.long is not None:
        return {key: _write_long(job, text, writers[key], threads) for key, text in zip(job.keys, item.long)}, 1
    for key, (tokens, lengths) in zip(job.keys, item.documents):
        writers[key].add(tokens, lengths)
    counts = {key: len(tokens) for key, (tokens, _) in zip(job.keys, item.documents)}
    return counts, len(item.documents[0][1])


def _write_long(job: Job, text: str | LongText, writer: IndexedWriter, threads: int) -> int:
    """Encode and write a long document, piece by piece; its tokens."""
    count = 0
    for ids in job.tokenizer.encode_pieces([text] if isinstance(text, str) else text.pieces(), threads):
        if not len(ids):
            continue
        if count == 0 and job.first is not None:
            writer.add_part(np.array([job.first]))
            count += 1
        writer.add_part(ids)
        count += len(ids)
    if count and job.last is not None:
        writer.add_part(np.array([job.last]))
        count += 1
    writer.add(np.empty(0, np.int32), np.array([count]))
    return count


# ---- the run ----


def encode_blocks(
    job: Job, blocks: Iterator[Block], workers: int, stop: threading.Event | None = None
) -> Generator[Encoded, None, None]:
    """What each block becomes, in order; several are worked on at once."""
    # The C++ encoder runs in as many calls at once as we like, each with its own caches; other libraries spread one
    # call over their own threads.
    calls, threads = (workers, 1) if job.tokenizer.encoder.startswith("C++") else (1, workers)

    def work(block: Block) -> Encoded:
        alone = block.text_bytes > 2 * readers.BLOCK_BYTES
        return encode_block(job, block, workers if alone else threads)

    room = (calls * (1 + _ROOM_BLOCKS)) * readers.BLOCK_BYTES
    return in_order(blocks, work, calls, lambda block: block.text_bytes, room, stop)


def _run(job: Job, output: Output, workers: int, stop: threading.Event | None) -> None:
    encoded = encode_blocks(job, _blocks(job, output), workers, stop)
    total = sum(identity["bytes"] for identity in output.journal.files)
    before = sum(writer.num_tokens for writer in output.writers.values())
    with closing(encoded), BuildProgress(" ".join(job.keys), total, output.journal.raw_bytes, before) as progress:
        for item in encoded:
            output.append(item)
            tokens = sum(writer.num_tokens for writer in output.writers.values())
            progress.advance(item.block.raw_bytes, item.block.text_bytes, tokens)
    if stop is not None and stop.is_set() and output.journal.source < len(job.files):
        raise Stopped(output.stop())


def _blocks(job: Job, output: Output) -> Iterator[Block]:
    """The blocks that are still to do."""
    journal = output.journal
    source, offset, line, expected = journal.source, journal.offset, journal.line, journal.content_hash
    for shard in readers.plan_shards(job.files, job.text_documents):
        if shard.source < source:
            continue
        resume = Position(offset, line) if shard.source == source and offset else None
        path = job.files[shard.source]
        blocks = readers.read_shard(path, shard, job.keys, job.text_documents, resume, job.on_error != "stop")
        for number, block in enumerate(blocks):
            if resume is not None and number == 0 and block.content_hash != expected:
                raise input_changed(output.journal_path, path)
            if block.last:
                _check_unchanged(path, journal.files[shard.source])
            yield block


def _check_unchanged(path: Path, identity: dict) -> None:
    if stat.S_ISREG(os.stat(path).st_mode) and file_identity(path) != identity:
        raise file_changed(path)


def file_changed(path: Path) -> DataError:
    """E349."""
    return DataError(49, str(path), "was changed while it was read", "run again when nothing writes to it")


class Output:
    """The datasets, the file of rejected lines and the journal: what is on disk, and how far it is."""

    def __init__(self, job: Job, output_prefix: str | Path, shard_bytes: int, workers: int) -> None:
        self.job, self.shard_bytes, self.workers = job, shard_bytes, workers
        self.prefixes = {key: Path(f"{output_prefix}_{key}_document") for key in job.keys}
        base = self.prefixes[job.keys[0]]
        self.journal_path = path_of(base, ".journal.json")
        self.rejected_path = path_of(base, ".rejected.jsonl")
        self.parts_path = path_of(base, ".parts")
        """Of a run on a cluster: ``build_ray.py``."""
        self.journal = job.new_journal()
        self._kept = False  # whether a journal of this run is on disk
        self._text_bytes_kept = 0
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._stack = ExitStack()
        self.writers: dict[str, IndexedWriter] = {}
        self.rejected: RejectedFile | None = None

    # ---- begin and end ----

    def open(self) -> None:
        """Go on from the journal of an interrupted run, or begin where there is none."""
        if self.parts_path.exists():
            raise other_command(self.parts_path, "engine ray, now local")
        found = load_journal(self.journal_path)
        if found is None:
            return self.open_new()
        check_journal(self.journal_path, found, self.journal)
        found.files, found.on_error = self.journal.files, self.journal.on_error
        try:
            self._open(found)
        except StaleState as reason:
            self._stack.close()
            say(f"{self.journal_path}: {reason}: beginning again")
            return self.open_new()
        say(f"going on from {self.journal_path}: {found.text_bytes / 1e6:,.0f} MB of text are done")

    def open_new(self) -> None:
        """Begin with nothing."""
        self._open(None)
        remove_journal(self.journal_path)  # only now: the lock is ours

    def _open(self, journal: Journal | None) -> None:
        self._stack, self.writers, self.rejected = ExitStack(), {}, None
        tokenizer = self.job.tokenizer
        with ExitStack() as stack:
            stack.push(self._drop_journal)
            for key, prefix in self.prefixes.items():
                if journal is not None and self._is_published(journal, prefix):
                    continue  # killed between the datasets of two keys
                self.writers[key] = IndexedWriter(
                    prefix,
                    tokenizer.vocab_size,
                    tokenizer=tokenizer_record(tokenizer),
                    options=self.job.header_options(key),
                    resume=None if journal is None else journal.writers[key],
                )
                self.writers[key].keep_temporaries = journal is not None
                stack.push(self.writers[key])
            if self.job.on_error == "quarantine" and not self._rejected_is_published(journal):
                self.rejected = RejectedFile(self.rejected_path, None if journal is None else journal.rejected_bytes)
                stack.push(self.rejected)
            self._stack = stack.pop_all()
        if journal is not None:
            self.journal, self._kept = journal, True
            self._text_bytes_kept, self._seconds_before = journal.text_bytes, journal.seconds

    def _is_published(self, journal: Journal, prefix: Path) -> bool:
        return (
            journal.source == len(self.job.files)
            and path_of(prefix, ".idx").exists()
            and not path_of(prefix, ".bin.tmp").exists()
        )

    def _rejected_is_published(self, journal: Journal | None) -> bool:
        return (
            journal is not None
            and journal.source == len(self.job.files)
            and self.rejected_path.exists()
            and not RejectedFile.temporary_of(self.rejected_path).exists()
        )

    def _drop_journal(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:  # everything is published
            remove_journal(self.journal_path)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish everything, or keep what a journal stands for, or leave no trace."""
        if kind is not None and self._kept and not isinstance(error, Stopped):
            done = f"{self._text_bytes_kept / 1e6:,.0f} MB"
            say(f"{self.journal_path} keeps what was done, {done} of text: the same command goes on from there")
        self._stack.__exit__(kind, error, trace)

    # ---- between ----

    def append(self, item: Encoded) -> None:
        """Write a block's documents, and a journal where one is due."""
        block, tally = item.block, self.journal.tallies[item.block.source]
        tokens, documents = write_documents(self.job, item, self.writers, self.workers)
        tally.add(documents, tokens, Counter(rejected.code for rejected in item.rejected))
        if self.rejected is not None:
            self.rejected.write(self.job.files[block.source], item.rejected)
        journal = self.journal
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
            writer.keep_temporaries = True
        if self.rejected is not None:
            self.journal.rejected_bytes = self.rejected.save_state()
        self.journal.seconds = self._seconds()
        self.journal.save(self.journal_path)
        self._kept, self._text_bytes_kept = True, self.journal.text_bytes

    def stop(self) -> str:
        """Keep what is done; what to tell the user."""
        if self.journal.text_bytes == 0:
            return "stopped before the first document"
        self.save_journal()
        return f"stopped after {self.journal.text_bytes / 1e6:,.0f} MB of text; the same command goes on from there"

    def check_complete(self) -> None:
        """All input is read: nothing is published where there is no text."""
        for key, writer in self.writers.items():
            if writer.num_tokens == 0:
                inputs = ", ".join(map(str, self.job.files[:4])) + (" ..." if len(self.job.files) > 4 else "")
                raise DataError(43, f'key "{key}" of {inputs}', "holds no text", "give a corpus with text")
            writer.sources += [
                SourceRecord(identity["path"], identity["bytes"], tally.documents, tally.tokens.get(key, 0), tally.xxh3,
                             dict(sorted(tally.rejected.items())))
                for identity, tally in zip(self.journal.files, self.journal.tallies)
            ]  # fmt: skip
        if self._kept:
            self.save_journal()  # a kill while the datasets get their names must find them finished

    def summaries(self) -> list[BuildSummary]:
        """For each key, in order."""
        rejected: dict[str, int] = {}
        for tally in self.journal.tallies:
            for code, count in tally.rejected.items():
                rejected[code] = rejected.get(code, 0) + count
        documents = sum(tally.documents for tally in self.journal.tallies)
        found = []
        for key in self.job.keys:
            writer = self.writers.get(key)  # None: published by the run before
            sequences = self.journal.writers[key]["sequences"] if writer is None else writer.num_sequences
            found.append(
                BuildSummary(
                    self.prefixes[key],
                    documents,
                    documents - sequences,
                    sum(tally.tokens.get(key, 0) for tally in self.journal.tallies),
                    dtype_for(self.job.tokenizer.vocab_size).itemsize,
                    self.journal.text_bytes,
                    self._seconds(),
                    rejected,
                    self.job.tokenizer.encoder,
                )
            )
        return found

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


# ---- what the user sees on the way ----


class BuildProgress:
    """A bar on a terminal, else a plain line now and then, on stderr: how far, and how fast.

    How far: in bytes of the files, as on disk, with those of the run before. How fast: in bytes of text and in tokens,
    of this run alone. (``base/progress.py`` counts bytes of one sort.)
    """

    def __init__(self, name: str, total_bytes: int, done_bytes: int, tokens: int) -> None:
        self.name, self.total_bytes, self.done_bytes, self._tokens_before = name, total_bytes, done_bytes, tokens
        self.raw_bytes = self.text_bytes = self.tokens = 0  # of this run
        self._started = self._reported = time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> BuildProgress:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=self.total_bytes, initial=self.done_bytes, desc=self.name, unit="B", unit_scale=True
            )
        return self

    def advance(self, raw_bytes: int, text_bytes: int, tokens: int) -> None:
        """Account for some more; ``tokens`` are all that there are now."""
        self.done_bytes += raw_bytes
        self.raw_bytes += raw_bytes
        self.text_bytes += text_bytes
        self.tokens = tokens - self._tokens_before
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(raw_bytes)
            self._bar.set_postfix_str(self._rates(seconds), refresh=False)
        elif now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            left = max(self.total_bytes - self.done_bytes, 0) * seconds / max(self.raw_bytes, 1)
            share = self.done_bytes / max(self.total_bytes, 1)
            say(f"{self.name}: {self.done_bytes / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB ({share:.0%}), "
                 f"{self._rates(seconds)}, {left:,.0f} s left")  # fmt: skip

    def pass_over(self, raw_bytes: int, tokens: int) -> None:
        """Account for something that was done before this run."""
        self.done_bytes += raw_bytes
        self._tokens_before += tokens
        if self._bar is not None:
            self._bar.update(raw_bytes)

    def _rates(self, seconds: float) -> str:
        """Of text, uncompressed."""
        return f"{self.text_bytes / seconds / 1e6:,.2f} MB/s, {self.tokens / seconds:,.0f} tokens/s"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
