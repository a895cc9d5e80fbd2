"""From blocks of text to tokens: each block is parsed and encoded, several at a time, and they stay in their order.

::

    blocks --one thread--> [room for a few] --N threads: parse, encode--> EncodedBlock, in order --> the caller

Threads and not processes: parser and encoder are compiled code that gives up the interpreter's lock where it takes
time, and nothing has to be copied from one process to another. The room is a number of bytes, so memory does not grow
with the corpus.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from megatron_hammer.corpus import file_blocks
from megatron_hammer.corpus.file_blocks import Block
from megatron_hammer.corpus.long import LongText
from megatron_hammer.corpus.parse import RejectedDocument, parse_block
from megatron_hammer.dataset.make.job import Job

_ROOM_BLOCKS = 2  # in flight for each worker, beside the one in work


@dataclass
class EncodedBlock:
    """What a block has become."""

    block: Block
    """Without its data."""
    documents: list[tuple[np.ndarray, np.ndarray]]
    """For each key the ids, [sum of lengths] int32, and the lengths, [documents] int64; none of a long document."""
    rejected: list[RejectedDocument]
    long: list[str | LongText] | None = None
    """For each key the text of a long document, still to be encoded, piece by piece: it would not fit in memory."""


# ---- one block ----


def marks_of(job: Job) -> tuple[int | None, int | None]:
    """The ids that begin and end every document; None where the job wants none."""
    return job.tokenizer.bos_id if job.prepend_bos else None, job.tokenizer.eos_id if job.append_eod else None


def encode_block(job: Job, block: Block, threads: int) -> EncodedBlock:
    """Parse and encode: a pure function of the block, for any thread.

    Raises:
        DataError: a bad document, where these end the work.
    """
    first, last = marks_of(job)
    parsed = parse_block(block, job.files[block.source], job.keys, job.on_error == "stop", in_pieces=True)
    block.data = None  # a long document needs the memory
    documents = [job.tokenizer.encode_documents(texts, threads, first, last) for texts in parsed.texts]
    return EncodedBlock(block, documents, parsed.rejected, parsed.long)


# ---- several at a time ----


def encode_blocks(
    job: Job, blocks: Generator[Block, None, None], workers: int, stop: threading.Event | None = None
) -> Generator[EncodedBlock, None, None]:
    """What each block becomes, in order.

    Args:
        blocks: read in a thread of its own, and none while the text of those that are read and not done with fills the
            room: a block that is larger is worked on alone. What reading or encoding raises is raised here, in the
            block's turn.
        workers: threads that parse and encode.
        stop: when it is set, nothing more is read, and no more results are given.

    Closing the generator ends the threads; what a worker has begun it finishes first.
    """
    # The C++ encoder runs in as many calls at once as we like, each with its own caches; other libraries spread one
    # call over their own threads.
    calls, threads = (workers, 1) if job.tokenizer.encoder.startswith("C++") else (1, workers)
    room = calls * (1 + _ROOM_BLOCKS) * file_blocks.BLOCK_BYTES
    futures: SimpleQueue[Future[EncodedBlock] | None] = SimpleQueue()  # in order; None behind the last
    changed, stopped = threading.Condition(), stop or threading.Event()
    held, ended = 0, False  # bytes of text in the room, and whether the caller is done: guarded by `changed`
    pool = ThreadPoolExecutor(calls + 1)

    def read() -> None:
        nonlocal held
        try:
            for block in blocks:
                is_long = block.text_bytes > 2 * file_blocks.BLOCK_BYTES
                futures.put(pool.submit(encode_block, job, block, workers if is_long else threads))
                with changed:
                    held += block.text_bytes
                    while held >= room and not ended:
                        changed.wait()
                if ended or stopped.is_set():
                    return
        finally:
            futures.put(None)

    reading = pool.submit(read)
    try:
        while (future := futures.get()) is not None and not stopped.is_set():
            encoded = future.result()
            yield encoded
            with changed:
                held -= encoded.block.text_bytes
                changed.notify()
        if not stopped.is_set():
            reading.result()  # raises what `blocks` has raised
    finally:
        with changed:
            ended = True
            changed.notify()
        pool.shutdown(cancel_futures=True)
        blocks.close()
