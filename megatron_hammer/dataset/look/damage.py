"""Which blocks of an indexed dataset are not what was written: its tokens held against the hashes of its header.

The header has an XXH3-128 of every 64 MiB of ``.bin`` (``dataset/format.py``). Opening a dataset reads none of them, so
a flipped bit goes unseen until its id is read, and if that id is in the vocabulary, for ever. ``damaged_blocks`` reads
all tokens once, as fast as the disk gives them, and names the documents of each damaged block: it is for programs that
look at a dataset before a run. ``verify.py`` does the same on its one pass over everything else. No torch.
"""

from __future__ import annotations

import xxhash

from megatron_hammer.base.files import hash_file
from megatron_hammer.dataset.format import BLOCK_BYTES, DatasetHeader
from megatron_hammer.dataset.look.inspect import TokenMap, document_of_token
from megatron_hammer.dataset.look.verify_report import counted
from megatron_hammer.dataset.reader import IndexedDataset


def damaged_blocks(dataset: IndexedDataset) -> list[str]:
    """What of a dataset's files is not what was written, in sentences; empty: all is, or there is no header to say so.

    Raises:
        DataError: E350 a file was changed meanwhile.
    """
    problems: list[str] = []
    if dataset.header is not None and hash_file(dataset.idx_path) != dataset.header.idx_hash:
        problems.append(f"{dataset.idx_path} has changed since it was written: its checksum differs")
    hashes = block_hashes(dataset.header, BLOCK_BYTES, problems)
    for block, first, tokens in TokenMap(dataset).blocks(BLOCK_BYTES) if hashes is not None else ():
        assert hashes is not None
        if xxhash.xxh3_128_hexdigest(tokens.data) != hashes[block]:
            problems.append(describe_damage(dataset, block, first, first + len(tokens)))
    return problems


def block_hashes(header: DatasetHeader | None, block_bytes: int, problems: list[str]) -> tuple[str, ...] | None:
    """The checksums of the blocks of .bin, or None where there are none to use; why not goes to ``problems``."""
    if header is None:
        return None
    if header.block_bytes != block_bytes or len(header.block_hashes) != -(-header.bin_bytes // block_bytes):
        problems.append(
            f"{counted(len(header.block_hashes), 'checksum')} of blocks of {header.block_bytes:,} bytes in the header "
            f"do not fit a .bin of {header.bin_bytes:,} bytes"
        )
        return None
    return header.block_hashes


def describe_damage(dataset: IndexedDataset, block: int, first: int, end: int) -> str:
    """A block whose hash is not the header's: tokens [first, end) of the dataset."""
    low, high = (document_of_token(dataset, token)[0] for token in (first, end - 1))
    size = dataset.dtype.itemsize
    return (
        f"{dataset.bin_path}: block {block} (bytes {first * size:,} to {end * size:,}, documents {low:,} to {high:,}) "
        "has changed since it was written: its checksum differs"
    )
