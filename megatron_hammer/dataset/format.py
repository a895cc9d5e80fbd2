"""The format of an indexed dataset: what its files look like, and what reader and writer have to agree on.

A dataset with the prefix ``P`` is three files. The first two are Megatron-LM's format::

    P.idx, little endian, no padding                                      P.bin
    0   "MMIDIDX\\0\\0"   u64 version = 1   u8 dtype code                    the tokens of all sequences, nothing else
    18  u64 S sequences   u64 D = documents + 1
    34  int32[S] lengths in tokens
        int64[S] byte offsets into .bin, each where the one before ends   P.meta.json
        int64[D] first sequence of each document, then S                  our dataset header, absent in Megatron's own

A document may hold no sequence (an empty text). Neither of the first two files has a checksum or says which tokenizer
made it; the header adds both (``DatasetHeader``). ``reader.py`` reads datasets and ``writer.py`` writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hammer.base.errors import DataError, UnfitFile
from megatron_hammer.base.reading import open_regular, parse_json, read_regular

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
FIRST_LENGTH = 34  # bytes before the lengths
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"), 2: np.dtype("<i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
    5: np.dtype("<i8"), 6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCABULARY = 65500  # below it Megatron-LM writes uint16, from it on int32

HEADER_FORMAT = "megatron_hammer indexed dataset"
HEADER_VERSION = 2
_OLD_HEADER_VERSIONS = (1,)  # sources without tokens, hash and rejected; still read
MAX_HEADER_BYTES = 16 << 20  # hashes of 20 TB, or 50,000 sources
HASH_BLOCK_BYTES = 64 << 20  # of .bin under one checksum: small enough to name the damaged place, 16 hashes a gigabyte
_SAMPLED_BLOCKS, _SAMPLED_BYTES = 16, 64 << 10

REMAKE = "prepare this dataset again, or copy all its files again"


def dtype_for(vocab_size: int | None) -> np.dtype:
    """The token type Megatron-LM chooses for a vocabulary."""
    return DTYPES[8] if vocab_size is not None and vocab_size < SMALL_VOCABULARY else DTYPES[4]


def path_of(prefix: str | Path, suffix: str) -> Path:
    """``P.bin`` of ``P``; the prefix itself may contain dots."""
    return Path(f"{prefix}{suffix}")


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer the ids belong to."""

    fingerprint: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    path: str | None = None
    """The file, as it was named when the dataset was made; None: not recorded."""

    def __str__(self) -> str:
        """For people, who cannot tell two fingerprints apart."""
        return f"{self.path or 'an unnamed tokenizer'} of {self.vocab_size:,} ids"


@dataclass(frozen=True)
class SourceRecord:
    """One input text: what was read, and what was taken from it."""

    path: str
    """As given."""
    bytes: int
    """Of the file on disk."""
    documents: int
    """Taken, empty ones included."""
    tokens: int | None = None
    """Of these documents; None: not recorded."""
    xxh3: str | None = None
    """XXH3-128 of the file as ``xxhsum -H2`` prints it; None: not recorded."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Documents that were left out, for each cause (``E304``: malformed JSON ...)."""


@dataclass(frozen=True)
class DatasetHeader:
    """``P.meta.json``: what the two other files cannot say about themselves."""

    dtype: str
    sequences: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_hash: str
    """XXH3-128 of the whole .idx."""
    block_bytes: int
    block_hashes: tuple[str, ...]
    """XXH3-128 of each ``block_bytes`` of .bin; the last block is shorter."""
    fingerprint: str
    """``IndexedDataset.fingerprint`` of the files as written."""
    max_token_id: int | None
    """None: not known, because there are no tokens, negative ones or floating-point ones."""
    tokenizer: TokenizerRecord | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """How the text was prepared: json_key, append_eod, prepend_bos."""
    sources: tuple[SourceRecord, ...] = ()

    def to_json(self) -> str:
        """The text of the file; the same dataset gives the same bytes."""
        tree = {"format": HEADER_FORMAT, "version": HEADER_VERSION, **asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetHeader:
        """The inverse of ``to_json``; raises ``ValueError`` with the reason."""
        tree = parse_json(text)
        if not isinstance(tree, dict) or tree.get("format") != HEADER_FORMAT:
            raise ValueError(f'its "format" is not "{HEADER_FORMAT}"')
        if tree.get("version") not in (HEADER_VERSION, *_OLD_HEADER_VERSIONS):
            raise ValueError(f"it has version {tree.get('version')!r}, this program reads version {HEADER_VERSION}")
        hashes, sources = _take(tree, "block_hashes", list), _take(tree, "sources", list)
        if not all(isinstance(value, str) for value in hashes) or not all(isinstance(s, dict) for s in sources):
            raise ValueError('"block_hashes" or "sources" hold something else than they should')
        tokenizer = _take(tree, "tokenizer", dict, optional=True)
        header: DatasetHeader = _record(
            cls,
            tree,
            block_hashes=tuple(hashes),
            tokenizer=None if tokenizer is None else _record(TokenizerRecord, tokenizer),
            options=_take(tree, "options", dict),
            sources=tuple(_record(SourceRecord, source, rejected=_rejected(source)) for source in sources),
        )
        return header


def _record(cls: type, tree: dict[str, Any], **others: Any) -> Any:
    """A record of a header: ``others``, and every number and text of its fields as the tree has it."""
    kinds = {"int": int, "str": str}
    for own in fields(cls):
        if own.name not in others:
            kind, _, may_be_absent = str(own.type).partition(" | ")
            others[own.name] = _take(tree, own.name, kinds[kind], bool(may_be_absent))
    return cls(**others)


def _take(tree: dict[str, Any], name: str, kind: type, optional: bool = False) -> Any:
    value: Any = tree.get(name)
    if value is None and optional:
        return None
    if type(value) is not kind or (isinstance(value, int) and value < 0):  # type(): a bool is not an int here
        raise ValueError(f'"{name}" is {value!r}, which is not a valid {kind.__name__}')
    return value


def _rejected(source: dict[str, Any]) -> dict[str, int]:
    counts = _take(source, "rejected", dict, optional=True) or {}
    return {cause: _take(counts, cause, int) for cause in counts}


def read_header(prefix: str | Path) -> DatasetHeader | None:
    """What the header of a dataset says, not compared with its other files; None where there is none.

    Raises:
        DataError: E339 the file is no header.
    """
    path = path_of(prefix, ".meta.json")
    if not os.path.lexists(path):
        return None
    try:
        return DatasetHeader.from_json(read_regular(path, MAX_HEADER_BYTES).decode("utf-8", "surrogateescape"))
    except UnfitFile as error:
        raise DataError(39, str(path), f"is not a dataset header: {error.strerror}", error.remedy) from None
    except ValueError as error:  # JSONDecodeError is a ValueError
        remedy = "prepare this dataset again; without this file it is read as one of another program"
        raise DataError(39, str(path), f"is not a dataset header: {error}", remedy) from None


def fingerprint_of(idx_hash: str, bin_path: Path) -> str:
    """See ``IndexedDataset.fingerprint``; at most 1 MiB of the .bin is read, evenly spread, both ends included."""
    digest = xxhash.xxh3_128()
    with open_regular(bin_path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{idx_hash} {size} ".encode())
        last = max(size - _SAMPLED_BYTES, 0)
        for place in sorted({last * k // (_SAMPLED_BLOCKS - 1) for k in range(_SAMPLED_BLOCKS)}):
            file.seek(place)
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
