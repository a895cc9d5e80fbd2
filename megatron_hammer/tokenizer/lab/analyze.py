"""Measures how good a tokenizer is: compression of texts, coverage of Chinese characters, make-up of its vocabulary.

    texts           --> count_tokens        --> bytes per token, compared compression, throughput, use of each id
    character table --> measure_coverage    --> share of characters that are one piece
    tokenizer, use  --> describe_vocabulary --> lengths and scripts of pieces, dead tokens, byte fallback

Definitions, those of the published HammerLLM table where it has them:

- bytes per token: UTF-8 bytes of the texts / tokens; compared compression: tokens / tokens of the reference (lower is
  better). Every document is encoded on its own and without special ids, so a dummy prefix counts for each document.
- covered character: it encodes to one piece that is neither a byte piece nor unk, a leading lone space piece (the
  dummy prefix) left out.
- byte piece: ``<0x..>`` of byte fallback, or a piece of byte-level BPE that is no whole character.
- dead token: a text piece (neither control nor byte piece) that no given text uses.

Streams the texts: memory holds one batch and its ids. Without torch; tokenizer libraries only through ``load``.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_hammer.base.errors import DataError
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.pieces import Pieces
from megatron_hammer.tokenizer.scripts import SCRIPTS, script_of

OVERALL = "overall"
BATCH_CHARACTERS = 4_000_000
"""Text encoded in one call: enough documents for every core."""

# First and last assigned character of each block (Unicode 15.1), written out because Python's own database is older.
HAN_BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    "Unified": ((0x4E00, 0x9FFF),),
    "Ext A": ((0x3400, 0x4DBF),),
    "Ext B": ((0x20000, 0x2A6DF),),
    "Ext C": ((0x2A700, 0x2B739),),
    "Ext D": ((0x2B740, 0x2B81D),),
    "Ext E": ((0x2B820, 0x2CEA1),),
    "Ext F": ((0x2CEB0, 0x2EBE0),),
    "Ext G": ((0x30000, 0x3134A),),
    "Ext H": ((0x31350, 0x323AF),),
    "Ext I": ((0x2EBF0, 0x2EE5D),),
    "Compat.": ((0xF900, 0xFA6D), (0xFA70, 0xFAD9), (0x2F800, 0x2FA1D)),
}


# ---- texts: compression, dead tokens, byte fallback ----


@dataclass
class Usage:
    """What one tokenizer made of some texts."""

    ids: np.ndarray
    """[vocab_size] int64: how often each id was used; empty unless asked for."""
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time inside ``encode_documents``, reading of the texts not included."""

    @property
    def bytes_per_token(self) -> float:
        """Compression: UTF-8 bytes of the texts for each of their tokens."""
        return self.bytes / self.tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.ids + other.ids, self.bytes + other.bytes, self.tokens + other.tokens, self.seconds + other.seconds
        )


def count_usage(
    tokenizers: Mapping[str, Tokenizer],
    texts: Mapping[str, Iterable[str]],
    threads: int = 1,
    *,
    count_ids: bool = False,
    progress: Callable[[int], None] = lambda done_bytes: None,
) -> dict[str, dict[str, Usage]]:
    """Encode all texts with all tokenizers: tokenizer -> domain -> usage, with the sum under ``overall`` at the end.

    Args:
        tokenizers: by name; each batch of text goes through all of them, so that texts are read once.
        texts: documents by domain.
        threads: of ``encode_documents``.
        count_ids: count each id too (``Usage.ids``).
        progress: called after each batch and tokenizer with the bytes encoded by it.

    Raises:
        DataError: E322 a domain without text.
    """
    assert texts, "count_usage needs at least one domain"
    sizes = {name: tokenizer.vocab_size if count_ids else 0 for name, tokenizer in tokenizers.items()}
    usage = {name: {domain: Usage(np.zeros(size, dtype=np.int64)) for domain in texts} for name, size in sizes.items()}
    for domain, documents in texts.items():
        for batch in _batches(documents):
            num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
            for name, tokenizer in tokenizers.items():
                found = usage[name][domain]
                started = time.perf_counter()
                ids, _ = tokenizer.encode_documents(batch, threads)
                found.seconds += time.perf_counter() - started
                found.bytes += num_bytes
                found.tokens += len(ids)
                if count_ids:
                    found.ids += np.bincount(ids, minlength=sizes[name])
                progress(num_bytes)
        if any(of_tokenizer[domain].tokens == 0 for of_tokenizer in usage.values()):
            raise DataError(22, f"--texts {domain}", "holds no text to analyse", "name files with text in them")
    for of_tokenizer in usage.values():
        of_tokenizer[OVERALL] = functools.reduce(Usage.__add__, of_tokenizer.values())
    return usage


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        if document:
            batch.append(document)
            characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def describe_compression(usage: Mapping[str, Mapping[str, Usage]], reference: str) -> dict[str, dict[str, Any]]:
    """Tokenizer -> domains (bytes, tokens, bytes_per_token, compared_compression) and megabytes_per_second."""
    described: dict[str, dict[str, Any]] = {}
    for name, of_tokenizer in usage.items():
        domains = {
            domain: {
                "bytes": found.bytes,
                "tokens": found.tokens,
                "bytes_per_token": found.bytes_per_token,
                "compared_compression": found.tokens / usage[reference][domain].tokens,
            }
            for domain, found in of_tokenizer.items()
        }
        total = of_tokenizer[OVERALL]
        described[name] = {"domains": domains, "megabytes_per_second": total.bytes / 1e6 / max(total.seconds, 1e-9)}
    return described


# ---- characters ----


class CharacterTokens(NamedTuple):
    """How a tokenizer writes single characters."""

    counts: np.ndarray
    """[n] int32: tokens of each character, without a leading lone space; 0 where unk is among them or there is none."""
    is_whole: np.ndarray
    """[n] bool: covered, one piece that is neither a byte piece nor unk."""


def encode_characters(tokenizer: Tokenizer, pieces: Pieces, characters: Sequence[str]) -> CharacterTokens:
    """Encode each character by itself."""
    counts = np.zeros(len(characters), dtype=np.int32)
    is_whole = np.zeros(len(characters), dtype=bool)
    for i, ids in enumerate(tokenizer.encode_batch(list(characters))):
        if len(ids) > 1 and pieces.content[ids[0]] == b" " and not pieces.is_byte[ids[0]]:
            ids = ids[1:]
        if tokenizer.unk_id in ids:
            continue
        counts[i] = len(ids)
        is_whole[i] = len(ids) == 1 and pieces.is_text[ids[0]]
    return CharacterTokens(counts, is_whole)


@dataclass(frozen=True)
class Share:
    """How many of some characters are covered."""

    covered: int
    characters: int

    @property
    def percent(self) -> float:
        return 100.0 * self.covered / self.characters


@dataclass(frozen=True)
class Coverage:
    """Coverage of the table of characters and of the blocks of Han characters outside it."""

    levels: dict[int, Share]
    blocks: dict[str, Share]
    """Block -> its characters that are not in the table."""
    tokens: CharacterTokens
    """Of the table's characters, in the table's order."""


def measure_coverage(tokenizer: Tokenizer, table: Sequence[tuple[str, int]]) -> Coverage:
    """Which characters are one piece.

    Args:
        tokenizer: any.
        table: characters with their levels (``characters.load_table``).
    """
    pieces = tokenizer.read_pieces()
    tokens = encode_characters(tokenizer, pieces, [character for character, _ in table])
    level_of = np.array([level for _, level in table])
    levels = {int(level): _share(tokens.is_whole[level_of == level]) for level in np.unique(level_of)}
    inside = {character for character, _ in table}
    blocks = {}
    for name, ranges in HAN_BLOCKS.items():
        outside = [chr(code) for first, last in ranges for code in range(first, last + 1) if chr(code) not in inside]
        blocks[name] = _share(encode_characters(tokenizer, pieces, outside).is_whole)
    return Coverage(levels, blocks, tokens)


def _share(is_whole: np.ndarray) -> Share:
    return Share(int(is_whole.sum()), len(is_whole))


def describe_coverage(coverage: Coverage) -> dict[str, Any]:
    """The coverage as JSON values."""

    def plain(share: Share) -> dict[str, Any]:
        return {"covered": share.covered, "characters": share.characters, "percent": share.percent}

    return {
        "levels": {str(level): plain(share) for level, share in coverage.levels.items()},
        "blocks": {name: plain(share) for name, share in coverage.blocks.items()},
    }


# ---- vocabulary ----


@dataclass(frozen=True)
class Vocabulary:
    """The make-up of a vocabulary."""

    lengths: dict[int, int]
    """Bytes -> number of text pieces of that length, in order."""
    scripts: dict[str, int]
    """Name of ``SCRIPTS`` -> number of pieces; they add up to vocab_size."""
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    """Domain -> ``dead_tokens``, ``dead_share``, ``byte_fallback_rate``; empty without texts."""

    @property
    def mean_bytes(self) -> float:
        """Mean length of a text piece; 0 where there is none."""
        return sum(n * count for n, count in self.lengths.items()) / max(1, sum(self.lengths.values()))


def describe_vocabulary(tokenizer: Tokenizer, usage: Mapping[str, Usage] | None = None) -> Vocabulary:
    """Lengths and scripts of the pieces, and what texts use of them.

    Args:
        tokenizer: any.
        usage: its texts by domain, from ``count_usage`` with ``count_ids``.
    """
    pieces = tokenizer.read_pieces()
    lengths = Counter(len(content) for content, is_text in zip(pieces.content, pieces.is_text) if is_text)
    scripts = Counter(dict.fromkeys(SCRIPTS, 0))
    for content, is_byte in zip(pieces.content, pieces.is_byte):
        scripts["bytes" if is_byte else "control" if not content else script_of(content.decode())] += 1
    num_text = max(1, int(pieces.is_text.sum()))
    of_domain = {}
    for domain, found in (usage or {}).items():
        dead = int((pieces.is_text & (found.ids == 0)).sum())
        fallback = int(found.ids[pieces.is_byte].sum())
        of_domain[domain] = {
            "dead_tokens": dead,
            "dead_share": dead / num_text,
            "byte_fallback_rate": fallback / found.tokens,
        }
    return Vocabulary(dict(sorted(lengths.items())), dict(scripts), of_domain)
