"""Reads a file in blocks and takes the texts and the rejected documents out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.corpus import parse, readers
from megatron_hammer.corpus.file_blocks import Block
from megatron_hammer.corpus.parse import RejectedDocument

GOOD = [json.dumps({"text": f"document {k} " + "字" * (k % 7)}, ensure_ascii=False).encode() for k in range(40)]


def blocks_of(
    path: Path, text_documents: str = "file", range_bytes: int | None = None, lenient: bool = False,
    keys: Sequence[str] = ("text",),
) -> list[Block]:  # fmt: skip
    ranges = list(readers.plan_ranges([path], text_documents, range_bytes))
    return [b for s in ranges for b in readers.read_range(path, s, keys, text_documents, lenient=lenient)]


def texts_of(path: Path, blocks: list[Block]) -> list[str]:
    return [text for block in blocks for text in parse.parse_block(block, path, ["text"], True).texts[0]]


def rejected_of(path: Path, blocks: list[Block]) -> list[RejectedDocument]:
    return [r for block in blocks for r in parse.parse_block(block, path, ["text"], False).rejected]
