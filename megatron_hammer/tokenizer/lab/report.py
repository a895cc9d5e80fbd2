"""The analyses as tables for a terminal, and as a page of HTML with tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_hammer.base.html_page import escape, page_of, picture_of, table_of
from megatron_hammer.base.tables import align
from megatron_hammer.tokenizer.lab.analyze import Coverage, Vocabulary
from megatron_hammer.tokenizer.scripts import SCRIPTS

LENGTH_GROUPS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (17, 24), (25, None))
"""Bytes of a piece, first to last, as the table groups them."""


class Table(NamedTuple):
    """A row a tokenizer, its name first; cells as they are shown."""

    title: str
    header: list[str]
    rows: list[list[str]]


def format_table(table: Table) -> str:
    """Columns two spaces apart, the first to the left, the others to the right."""
    return "\n".join(align([table.header, *table.rows]))


def compression_table(described: Mapping[str, dict[str, Any]], reference: str) -> Table:
    """Bytes per token and compared compression for each domain and overall, and throughput."""
    domains = list(next(iter(described.values()))["domains"])
    header = ["tokenizer", *(f"{d} {what}" for d in domains for what in ("bytes/token", "compared")), "MB/s"]
    rows = []
    for name, facts in described.items():
        row = [name]
        for values in facts["domains"].values():
            row += [f"{values['bytes_per_token']:.4f}", f"{values['compared_compression']:.4f}"]
        rows.append([*row, f"{facts['megabytes_per_second']:.1f}"])
    return Table(f"Compression; compared: tokens / tokens of {reference}, lower is better", header, rows)


def coverage_table(coverage: Mapping[str, Coverage]) -> Table:
    """Levels of the table of characters, then the blocks without its characters."""
    first = next(iter(coverage.values()))
    header = ["tokenizer", *(f"level {level}" for level in first.levels), *first.blocks]
    rows = [
        [name, *(f"{share.percent:.2f}%" for share in [*of.levels.values(), *of.blocks.values()])]
        for name, of in coverage.items()
    ]
    title = "Characters that are one piece: levels of the standard table, then Unicode blocks without its characters"
    return Table(title, header, rows)


def vocabulary_tables(vocabularies: Mapping[str, Vocabulary]) -> list[Table]:
    """Use by the texts (where there are any), scripts, lengths."""
    tables = []
    domains = list(next(iter(vocabularies.values())).usage)
    if domains:
        header = ["tokenizer", *(f"{d} {what}" for d in domains for what in ("dead", "bytes"))]
        rows = []
        for name, of in vocabularies.items():
            use = [of.usage[domain] for domain in domains]
            shares = (share for u in use for share in (u["dead_share"], u["byte_fallback_rate"]))
            rows.append([name, *(f"{100 * share:.2f}%" for share in shares)])
        tables.append(Table("Dead text pieces, and byte pieces among the tokens", header, rows))
    present = [script for script in SCRIPTS if any(of.scripts[script] for of in vocabularies.values())]
    rows = []
    for name, of in vocabularies.items():
        total = sum(of.scripts.values())
        rows.append([name, f"{total:,}", *(f"{100 * of.scripts[script] / total:.2f}%" for script in present)])
    tables.append(Table("Pieces by script", ["tokenizer", "pieces", *present], rows))
    header = ["tokenizer", "mean", *(_length_name(first, last) for first, last in LENGTH_GROUPS)]
    rows = []
    for name, of in vocabularies.items():
        total = max(1, sum(of.lengths.values()))
        counts = (
            sum(count for n, count in of.lengths.items() if first <= n and (last is None or n <= last))
            for first, last in LENGTH_GROUPS
        )
        rows.append([name, f"{of.mean_bytes:.2f}", *(f"{100 * count / total:.2f}%" for count in counts)])
    tables.append(Table("Text pieces by length in bytes", header, rows))
    return tables


def _length_name(first: int, last: int | None) -> str:
    return f"{first}+" if last is None else str(first) if first == last else f"{first}-{last}"


# ---- report ----


def html_report(heading: str, tables: Sequence[Table], picture: bytes, notes: Sequence[str] = ()) -> bytes:
    """A self-contained HTML page: tables, notes, then the picture (PNG), nothing fetched from anywhere."""
    parts = []
    for table in tables:
        parts += [f"<h2>{escape(table.title)}</h2>", table_of(table.header, table.rows)]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    return page_of(heading, [*parts, picture_of(picture, heading)])
