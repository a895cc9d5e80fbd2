"""Corpus + tokenizer -> indexed dataset: what ``tools/preprocess_data.py`` does.

::

    F.jsonl ... -> read, parse -> encode (N threads) -> write P_text_document.{bin,idx,meta.json}
                   own thread     own thread            calling thread          published whole, at the end

The three stages overlap and hand each other batches of bounded size, so memory does not grow with the corpus; documents
keep their order, and the files are the same for any number of threads. As in Megatron-LM, an empty text becomes a
document without a sequence: it gets neither a first nor a last id. Any bad line ends the work, names file and line, and
leaves whatever had the output's name before.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from megatron_hammer.corpus.jsonl import JsonlCorpus, read_jsonl
from megatron_hammer.data.indexed import IndexedWriter, SourceRecord, TokenizerRecord
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

    from megatron_hammer.tokenizer.load import Tokenizer

BATCH_BYTES = 4 << 20  # of text encoded at once: work for several threads, some tens of megabytes in all stages
BATCH_DOCUMENTS = 8192  # the same for corpora of tiny documents
_BATCHES_WAITING = 2  # between two stages
_REPORT_SECONDS = 10.0  # between two plain progress lines

T = TypeVar("T")


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

    def __str__(self) -> str:
        rate = max(self.seconds, 1e-9)
        return (
            f"{self.prefix}: {self.documents:,} documents ({self.empty_documents:,} empty), {self.tokens:,} tokens of "
            f"{self.token_bytes} bytes from {self.text_bytes / 1e6:,.1f} MB in {self.seconds:,.1f} s: "
            f"{self.text_bytes / rate / 1e6:,.2f} MB/s, {self.tokens / rate:,.0f} tokens/s"
        )


def build_datasets(
    inputs: Sequence[str | Path],
    json_keys: Sequence[str],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    append_eod: bool,
    prepend_bos: bool = False,
    workers: int = 1,
) -> list[BuildSummary]:
    """Tokenize JSON lines into one dataset a key, ``{output_prefix}_{key}_document``; all are published, or none.

    Args:
        inputs: JSON lines files, in the order their documents shall have.
        json_keys: fields that hold text.
        append_eod: the tokenizer's eos id ends every document.
        prepend_bos: its bos id begins every document.
        workers: threads that encode; the result does not depend on it.

    Raises:
        ConfigError: a needed special id is missing in the tokenizer, a key is named twice, no workers.
        DataError: missing, empty or malformed input, see ``corpus/jsonl.py``; no text at all.
    """
    if workers < 1:
        raise ConfigError(75, f"--workers={workers}", "must be at least 1", "give the number of threads that encode")
    if len(set(json_keys)) != len(json_keys):
        raise ConfigError(74, f"--json-keys {' '.join(json_keys)}", "must not name a key twice", "name each key once")
    JsonlCorpus(inputs)  # a file that is missing should not be found out after an hour
    tokenizer = load_tokenizer(tokenizer_path)
    first = _needed_id("--prepend-bos", "beginning-of-document", tokenizer, tokenizer.bos_id) if prepend_bos else None
    last = _needed_id("--append-eod", "end-of-document", tokenizer, tokenizer.eos_id) if append_eod else None
    record = TokenizerRecord(
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.unk_id,
    )
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                IndexedWriter(
                    f"{output_prefix}_{key}_document",
                    tokenizer.vocab_size,
                    tokenizer=record,
                    options={"json_key": key, "append_eod": append_eod, "prepend_bos": prepend_bos},
                )
            )
            for key in json_keys
        ]
        return [
            _write_key(inputs, key, tokenizer, writer, first, last, workers) for key, writer in zip(json_keys, writers)
        ]


def _needed_id(option: str, meaning: str, tokenizer: Tokenizer, value: int | None) -> int:
    if value is None:
        raise ConfigError(70, f"{option} with {tokenizer.path}", f"needs a {meaning} id, which this tokenizer lacks",
                          f"leave {option} out, or use a tokenizer that has one")  # fmt: skip
    return value


@dataclass
class _Batch:
    source: int
    texts: list[str]
    text_bytes: int


def _write_key(
    inputs: Sequence[str | Path],
    key: str,
    tokenizer: Tokenizer,
    writer: IndexedWriter,
    first: int | None,
    last: int | None,
    workers: int,
) -> BuildSummary:
    started = time.monotonic()
    documents, text_bytes = [0] * len(inputs), 0
    encoded = _in_background(_encode(_in_background(_read_batches(inputs, key)), tokenizer, first, last, workers))
    total = sum(Path(path).stat().st_size for path in inputs)
    plain = not any(Path(path).suffix in (".gz", ".zst") for path in inputs)  # else the total is not known
    with closing(encoded), _Progress(key, total if plain else None) as progress:
        for batch, tokens, lengths in encoded:
            writer.add(tokens, lengths)
            documents[batch.source] += len(lengths)
            text_bytes += batch.text_bytes
            progress.advance(batch.text_bytes, len(tokens))
    for path, count in zip(inputs, documents):
        writer.sources.append(SourceRecord(str(path), Path(path).stat().st_size, count))
    if writer.num_tokens == 0:
        raise DataError(43, f'key "{key}" of {", ".join(map(str, inputs))}', "holds no text", "give a corpus with text")
    return BuildSummary(
        writer.prefix,
        writer.num_documents,
        writer.num_documents - writer.num_sequences,
        writer.num_tokens,
        writer.dtype.itemsize,
        text_bytes,
        time.monotonic() - started,
    )


def _read_batches(inputs: Sequence[str | Path], key: str) -> Iterator[_Batch]:
    """Texts in order; a batch never holds documents of two files."""
    for source, path in enumerate(inputs):
        batch = _Batch(source, [], 0)
        for record in read_jsonl(path, key):
            batch.texts.append(record.text)
            batch.text_bytes += record.raw_bytes
            if batch.text_bytes >= BATCH_BYTES or len(batch.texts) >= BATCH_DOCUMENTS:
                yield batch
                batch = _Batch(source, [], 0)
        yield batch


def _encode(
    batches: Generator[_Batch, None, None], tokenizer: Tokenizer, first: int | None, last: int | None, workers: int
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """Each batch with its ids, int32, and the lengths of its documents, both as ``IndexedWriter.add`` takes them."""
    with closing(batches):  # an error here must stop the reading thread
        for batch in batches:
            documents = tokenizer.encode_batch(batch.texts, threads=workers)
            batch.texts = []
            for ids in documents:
                if ids and first is not None:
                    ids.insert(0, first)
                if ids and last is not None:
                    ids.append(last)
            lengths = np.fromiter(map(len, documents), np.int64, len(documents))
            tokens = np.fromiter(itertools.chain.from_iterable(documents), np.int32, int(lengths.sum()))
            yield batch, tokens, lengths


def _in_background(items: Iterable[T]) -> Generator[T, None, None]:
    """The items, made by a thread of its own up to a few ahead; its exception is raised here.

    Closing the generator stops the thread, also while it waits for room.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(_BATCHES_WAITING)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    break
        except BaseException as error:
            end = error
        finally:
            if isinstance(items, Generator):
                items.close()
            put(None, end)

    thread = threading.Thread(target=produce, daemon=True)  # daemon: a Ctrl-C must not wait for it
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


class _Progress:
    """A bar on a terminal, else a plain line now and then, on stderr."""

    def __init__(self, name: str, total_bytes: int | None) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.done_bytes = self.tokens = 0
        self._started = self._reported = time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=self.total_bytes, desc=self.name, unit="B", unit_scale=True)
        return self

    def advance(self, text_bytes: int, tokens: int) -> None:
        self.done_bytes += text_bytes
        self.tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(text_bytes)
            self._bar.set_postfix_str(f"{self.tokens / seconds:,.0f} tokens/s", refresh=False)
        elif now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            share = f" of {self.total_bytes / 1e6:,.0f}" if self.total_bytes else ""
            print(
                f"{self.name}: {self.done_bytes / 1e6:,.0f}{share} MB, {self.done_bytes / seconds / 1e6:,.2f} MB/s, "
                f"{self.tokens / seconds:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
