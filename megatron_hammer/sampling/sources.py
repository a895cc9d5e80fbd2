"""Names for the data sources of a run: short ones for people, and keys by content for counts that outlive a path.

::

    /data/zh/wiki_text_document, /data/zh/books, /data/en/wiki_text_document   ->   zh.wiki, books, en.wiki

A name is the end of a prefix, as long as it must be to be the only one. Needs no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

ENDING = "_text_document"  # which Megatron-LM's preparation appends to every prefix
_NO_NAME = re.compile(r"[^\w.\- ]")  # what mlflow allows in the name of a metric, but for the slash that separates ours


def source_names(prefixes: Sequence[str | Path]) -> list[str]:
    """A short name for each prefix, no two equal."""
    parts = [_parts(prefix) for prefix in prefixes]
    lengths = [1] * len(parts)
    while True:
        names = [".".join(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        times = Counter(names)
        longer = [n + (times[name] > 1 and n < len(p)) for name, p, n in zip(names, parts, lengths, strict=True)]
        if longer == lengths:
            return _numbered(names)
        lengths = longer


SourceKey = tuple[str, int]
"""Content of a source, and a number that tells apart what one mix names twice."""


def keys_in_mix(fingerprints: Sequence[str]) -> list[SourceKey]:
    """What the sources of one mix are told apart by, from their contents in the order in which they are named."""
    return [(fingerprint, list(fingerprints[:i]).count(fingerprint)) for i, fingerprint in enumerate(fingerprints)]


def names_by_prefix(mixes: Sequence[Sequence[str]], fingerprint_of: Mapping[str, str]) -> dict[str, str]:
    """What a run calls each prefix of its mixes: a source that moves keeps one name, that of its last path."""
    keys = [dict(zip(mix, keys_in_mix([fingerprint_of[prefix] for prefix in mix]), strict=True)) for mix in mixes]
    last = {key: prefix for mix in keys for prefix, key in mix.items()}
    names = dict(zip(sorted(last), source_names([last[key] for key in sorted(last)]), strict=True))
    return {prefix: names[key] for mix in keys for prefix, key in mix.items()}


def source_keys(fingerprints: Sequence[str]) -> list[str]:
    """The fingerprint of each source; a second one of the same content is told apart by its number."""
    return _numbered(fingerprints)


def _parts(prefix: str | Path) -> list[str]:
    path = Path(prefix)
    ends = [part for part in path.parts if part not in (path.anchor, ".", "..")]
    last = ends[-1].removesuffix(ENDING) or ends[-1]
    return [_NO_NAME.sub("_", part) for part in (*ends[:-1], last)]


def _numbered(names: Sequence[str]) -> list[str]:
    """Equal names with .2, .3 and so on behind all but the first; none is given that another one has."""
    given: list[str] = []
    for i, name in enumerate(names):
        number, unique = 1, name
        while unique in given or (number > 1 and unique in names[i + 1 :]):
            number += 1
            unique = f"{name}.{number}"
        given.append(unique)
    return given
