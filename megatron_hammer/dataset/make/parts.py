"""Parts of a dataset: one task of a cluster makes each from one range of a file, and the driver joins them.

::

    P_KEY_document.parts/                       in a file system that all nodes see
      NAME/  0.{bin,idx,meta.json}  1....       a dataset for each JSON key
             rejected.jsonl                     on demand
      hash-NAME                                 XXH3-128 of a file that is cut into several ranges
      attempt-...                               being made

NAME is a hash of all that decides the bytes: the file with its size and time of change, the place in it, the options,
the tokenizer, our version. A part gets its name by one rename when it is whole, and the headers of its datasets repeat
what was hashed. So a part that has the right name and opens is done, whichever process made it, and another run's parts
are never taken.

When a node is given up, its worker may still write while the task is repeated on another node. So each attempt has a
folder of its own, and the first that is done gives the name. Nothing in this module knows Ray.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from megatron_hammer import __version__
from megatron_hammer.base.errors import DataError, HammerError, from_exception, to_fields
from megatron_hammer.base.files import publish, write_durably
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import read_regular
from megatron_hammer.base.signals import Stopped
from megatron_hammer.corpus import readers
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.file_blocks import FileRange, Position
from megatron_hammer.corpus.quarantine import RejectedFile
from megatron_hammer.corpus.stream import check_file, check_unchanged, file_changed, file_identity, open_stream
from megatron_hammer.dataset.make.encoding import encode_blocks
from megatron_hammer.dataset.make.job import Job
from megatron_hammer.dataset.make.journal import Tally
from megatron_hammer.dataset.make.output import tokenizer_record, write_documents
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

REJECTED = "rejected.jsonl"
UNKNOWN_LINE = 2
"""Where a range inside a file begins to count: not at 1, since in a first line marks of an encoding are looked for."""

_VISIBLE_SECONDS = 60.0  # so late a network file system may show a new folder to another node
_AT_A_NODE = {"E276", "E301", "E309", "E310", "E311"}  # may be the mistake of one node: the message says which


@dataclass(frozen=True)
class HashTask:
    """XXH3-128 of a file that is cut into ranges: it cannot be joined from hashes of them."""

    path: Path
    """Absolute: a task has another working folder."""
    folder: Path
    """Of all parts, absolute."""
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the file that holds the hash."""
        return f"hash-{_digest(self.identity)}"


@dataclass(frozen=True)
class PartTask:
    """One range of a file, and what to do with it."""

    path: Path
    folder: Path
    identity: dict[str, Any]
    """All that decides the part's bytes."""
    file_range: FileRange
    """Of the file by itself: its ``source`` is 0."""
    keys: tuple[str, ...]
    tokenizer_path: Path
    fingerprint: str
    append_eod: bool
    prepend_bos: bool
    on_error: OnError
    text_documents: str
    threads: int

    @property
    def name(self) -> str:
        """Of the part's folder."""
        return _digest(self.identity)

    @property
    def counts_lines(self) -> bool:
        """Whether line numbers are those of the range, from ``UNKNOWN_LINE``."""
        is_parquet = readers.kind_of(self.path, self.text_documents) == "parquet"
        return self.file_range.start.line == UNKNOWN_LINE and not is_parquet


def _digest(identity: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def plan_tasks(job: Job, folder: Path, shard_bytes: int, threads: int) -> list[list[PartTask | HashTask]]:
    """For each input its tasks, in the order of the documents; the hash of a file that is cut comes first."""
    plan = []
    for path in job.files:
        identity = file_identity(path.absolute())
        ranges = _ranges_of(path, job.text_documents, shard_bytes)
        tasks: list[PartTask | HashTask] = []
        if len(ranges) > 1:
            tasks.append(HashTask(path.absolute(), folder, identity))
        for file_range in ranges:
            facts = {
                "version": __version__,
                "file": identity,
                "start": file_range.start.offset,
                "end": file_range.end,
                "json_keys": list(job.keys),
                "append_eod": job.append_eod,
                "prepend_bos": job.prepend_bos,
                "text_documents": job.text_documents,
                "tokenizer": job.tokenizer.fingerprint,
            }
            tasks.append(
                PartTask(
                    path.absolute(),
                    folder,
                    facts,
                    file_range,
                    job.keys,
                    job.tokenizer.path.absolute(),
                    job.tokenizer.fingerprint,
                    job.append_eod,
                    job.prepend_bos,
                    job.on_error,
                    job.text_documents,
                    threads,
                )
            )
        plan.append(tasks)
    return plan


def _ranges_of(path: Path, text_documents: str, shard_bytes: int) -> list[FileRange]:
    """The ranges of one file, as of the only input."""
    try:
        ranges = list(readers.plan_ranges([path], text_documents, shard_bytes))
    except HammerError:  # a parquet file that cannot be opened: its task says so, in the order of the documents
        return [FileRange(0)]
    if readers.kind_of(path, text_documents) == "parquet":
        return ranges
    unknown = [replace(r, start=Position(r.start.offset, UNKNOWN_LINE)) for r in ranges[1:]]
    return [ranges[0], *unknown]


# ---- a task, in a worker process of some node ----


def run_task(task: PartTask | HashTask, version: str) -> dict[str, Any]:
    """Make a part, or hash a file; numbers about a part, or the fields of a user's mistake under ``error``."""
    try:
        if version != __version__:
            raise _unlike_driver(f"megatron_hammer {__version__}", f"is not the driver's version {version}",
                                 "install the same version on all nodes")  # fmt: skip
        return _make_part(task) if isinstance(task, PartTask) else _make_hash(task)
    except Exception as error:
        known = from_exception(error, "the task")
        if known is None:
            raise
        fields = to_fields(known)
        if known.code in _AT_A_NODE or known.exit_code in (6, 10):
            fields["rule"] = f"{known.rule} (on the node {socket.gethostname()})"
        return {"error": fields}


def _unlike_driver(what: str, rule: str, remedy: str) -> DataError:
    return DataError(75, what, f"{rule} (on the node {socket.gethostname()})", remedy)


@lru_cache(maxsize=2)
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """Loaded once a worker process."""
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise _unlike_driver(f"{path} of fingerprint {tokenizer.fingerprint}",
                             f"is not the driver's tokenizer {fingerprint}", "put the same file there")  # fmt: skip
    return tokenizer


def _identity_here(task: PartTask | HashTask) -> dict[str, Any]:
    """Of the file as this node sees it. A copy of its own may have another time of change, not another size."""
    size = task.identity["bytes"] if isinstance(task, HashTask) else task.identity["file"]["bytes"]
    check_file(task.path)
    identity = file_identity(task.path)
    if identity["bytes"] != size:
        raise file_changed(task.path)
    return identity


def _make_hash(task: HashTask) -> dict[str, Any]:
    identity = _identity_here(task)
    with open_stream(task.path) as stream:
        digest = stream.hash_of_all()
    check_unchanged(task.path, identity)
    attempt = _new_attempt(task.folder)
    write_durably(attempt, digest.encode())
    publish(attempt, task.folder / task.name)
    return {}


def _new_attempt(folder: Path) -> Path:
    """A name that nobody else has, and who has it."""
    return folder / f"attempt-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"


def _make_part(task: PartTask) -> dict[str, Any]:
    """Read, parse, encode and write a range of a file, and give it its name."""
    identity = _identity_here(task)
    tokenizer = _tokenizer(task.tokenizer_path, task.fingerprint)
    kinds = (readers.kind_of(task.path, task.text_documents),)
    marks = task.append_eod, task.prepend_bos
    job = Job((task.path,), kinds, (identity,), task.keys, tokenizer, *marks, task.on_error, task.text_documents)
    attempt = _new_attempt(task.folder)
    attempt.mkdir()
    try:
        facts = _write_part(job, task, attempt)
        check_unchanged(task.path, identity)
        try:
            publish(attempt, task.folder / task.name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another attempt has made the same
                raise
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    tokens = sum(facts["tally"]["tokens"].values())
    sizes = {"raw_bytes": facts["raw_bytes"], "text_bytes": facts["text_bytes"], "tokens": tokens}
    return {**sizes, "encoder": tokenizer.encoder}


def _write_part(job: Job, task: PartTask, folder: Path) -> dict[str, Any]:
    """A dataset for each key, and on demand the rejected documents; the facts that the headers hold."""
    tally, damaged, text_bytes, raw_bytes, end = Tally(), False, 0, 0, task.file_range.start
    lenient = job.on_error != "stop"
    blocks = readers.read_range(task.path, task.file_range, job.keys, job.text_documents, None, lenient)
    with ExitStack() as stack:
        writers = {}
        for k, key in enumerate(job.keys):
            record = tokenizer_record(job.tokenizer)
            writers[key] = IndexedWriter(folder / str(k), job.tokenizer.vocab_size, tokenizer=record)
            stack.enter_context(writers[key])
        rejected = None
        if job.on_error == "quarantine":
            rejected = stack.enter_context(RejectedFile(folder / REJECTED, None))
        for item in encode_blocks(job, blocks, task.threads):
            block = item.block
            write_documents(job, item, writers, tally, task.threads)
            tally.xxh3 = block.file_hash
            if rejected is not None:
                rejected.write(task.path, item.rejected)
            text_bytes, raw_bytes, end = text_bytes + block.text_bytes, raw_bytes + block.raw_bytes, block.end
            damaged = damaged or (block.kind == "parquet" and block.trouble is not None)
        facts = {
            "identity": task.identity,
            "on_error": job.on_error,
            "tally": asdict(tally),
            "damaged": damaged,
            "lines": end.line - task.file_range.start.line,
            "text_bytes": text_bytes,
            "raw_bytes": raw_bytes,
        }
        for writer in writers.values():
            writer.options["part"] = facts
    return facts


# ---- the parts, as the driver sees them ----


def number_of(parts: int) -> str:
    """For the user."""
    return "1 part" if parts == 1 else f"{parts:,} parts"


class Parts:
    """The folder of the parts. Its ``with`` block removes them when it ends well; else whole ones stay for a next run.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path, on_error: OnError) -> None:
        self.folder, self.on_error = folder, on_error
        self._begun = False

    def begin(self, restart: bool) -> None:
        """Take what an earlier run has left, or drop it; to be called when the lock of the output is ours."""
        self._begun = True
        if restart:
            self._remove_all()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_attempts()
        there = self._count()
        if there:
            say(f"going on from {self.folder}, which holds {number_of(there)}")

    def find(self, task: PartTask | HashTask) -> dict[str, Any] | None:
        """The facts of a part that is there, whole, and good for this run; of a file's hash ``{"xxh3"}``."""
        path = self.folder / task.name
        if not path.exists():
            return None
        if isinstance(task, HashTask):
            return {"xxh3": read_regular(path, follow=False).decode()}
        facts = None
        try:
            for k in range(len(task.keys)):
                dataset = IndexedDataset(path / str(k))
                facts = None if dataset.header is None else dataset.header.options.get("part")
                if facts is None or facts["identity"] != task.identity:
                    return None
                _ = dataset.fingerprint  # E340 where it is not the one of the header
        except DataError:  # damaged: it will be made again
            return None
        if facts is not None and facts["tally"]["rejected"]:
            # A run that ends at a bad document must meet it, and a quarantine wants its text.
            good = {"stop": (), "skip": ("skip", "quarantine"), "quarantine": ("quarantine",)}[self.on_error]
            return facts if facts["on_error"] in good else None
        return facts

    def await_visible(self, task: PartTask | HashTask) -> dict[str, Any]:
        """The facts of a part that a task has made.

        Raises:
            DataError: E376 it does not show.
        """
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while True:
            os.listdir(self.folder)  # makes a network file system look again
            facts = self.find(task)
            if facts is not None:
                return facts
            if time.monotonic() > deadline:
                raise DataError(76, str(self.folder), "does not show here what a node of the cluster has written there",
                                "put --output-prefix into a folder that all nodes share")  # fmt: skip
            time.sleep(0.2)

    def drop(self, task: PartTask | HashTask) -> None:
        """Remove what stands in the way of a new part."""
        _remove(self.folder / task.name)

    def _remove_attempts(self) -> None:
        for pattern in ("attempt-*", "removed-*"):
            for path in self.folder.glob(pattern):
                _remove(path)

    def _remove_all(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _count(self) -> int:
        return sum(path.is_dir() for path in self.folder.iterdir())

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._begun or not self.folder.exists():
            return
        if kind is None:
            return self._remove_all()
        self._remove_attempts()
        kept = self._count()
        if not kept:
            return self._remove_all()
        if isinstance(error, Stopped):
            error.args = (f"stopped with {number_of(kept)} done; the same command goes on from there",)
        else:
            say(f"{self.folder} keeps what was done, {number_of(kept)}: the same command goes on from there")


def _remove(path: Path) -> None:
    """Renamed first: a task of a killed run that is still at work must not give a name to what is half removed."""
    trash = path.with_name(f"removed-{uuid.uuid4().hex}")
    try:
        os.rename(path, trash)
    except FileNotFoundError:
        return
    if trash.is_dir():
        shutil.rmtree(trash, ignore_errors=True)
    else:
        trash.unlink(missing_ok=True)
