"""The ledger of a run: which samples of the order it leaves out, and why (``OUT/ledger.jsonl``).

A run that goes back from a bad step to a checkpoint (``train.on_spike=rewind``) reads other samples from there on than
its order alone says. Each time, one line is appended, before anything else changes, and never taken back::

    {"rewind": 1, "step": 42, "finding": "spike", "back_to_step": 40, "skipped_samples": [[656, 672]]}

Samples are named by their place in the order of the run, counted from 0, the end not included. So what a run reads is
a function of its config and of this file::

    order          0 1 2 3 4 5 6 7 8 9 ...           TrainData, without a ledger
    left out             x x x
    number in run  0 1 2       3 4 5 6 ...           ``Skips`` (``phases.py``): the i-th sample that is not left out

Every checkpoint holds the lines of its run so far. Needs no torch.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.reading import parse_json, read_regular

LEDGER = "ledger.jsonl"  # in a run's folder
MAX_LEDGER_BYTES = 4 * 2**20  # thirty thousand rewinds

Finding = Literal["nonfinite", "spike"]
"""What is wrong with a step (``train/health.py``)."""
Range = tuple[int, int]
"""[first, end)"""

_KEYS = ("rewind", "step", "finding", "back_to_step", "skipped_samples")


@dataclass(frozen=True)
class Rewind:
    """One line of the ledger."""

    number: int
    """From 1."""
    step: int
    """The one whose loss or gradient was bad."""
    finding: Finding
    back_to_step: int
    """That of the checkpoint that the run went back to; 0: it began anew."""
    skipped: tuple[Range, ...]
    """Places in the order, rising; none of them is left out by a line before."""

    @property
    def samples(self) -> int:
        """How many it leaves out."""
        return sum(end - first for first, end in self.skipped)

    def to_tree(self) -> dict[str, Any]:
        """The line, as JSON values."""
        values = self.number, self.step, self.finding, self.back_to_step, [list(part) for part in self.skipped]
        return dict(zip(_KEYS, values, strict=True))


Ledger = tuple[Rewind, ...]


# ---- as values and as a file ----------------------------------------------------------------------------------------


def ledger_from_trees(trees: Iterable[Any], where: str) -> Ledger:
    """The inverse of ``Rewind.to_tree``, of all lines; none is asked for after one that is wrong.

    Args:
        where: the file, for the error.

    Raises:
        CheckpointError: E436: a line is not one that a run has written.
    """
    ledger: list[Rewind] = []
    skipped: list[Range] = []  # of the lines so far, rising
    for line, tree in enumerate(trees, start=1):
        try:
            rewind = _from_tree(tree)
            if rewind.number != line:
                raise ValueError(f"rewind={rewind.number}, not {line}")
            _add_apart(skipped, rewind.skipped)
        except (ValueError, TypeError, KeyError) as error:
            rule = f"is not a line of a ledger ({error})"
            remedy = "restore it from a copy; without the file, a run goes by the ledger in its newest checkpoint"
            raise CheckpointError(36, f"{where}:{line}", rule, remedy) from None
        ledger.append(rewind)
    return tuple(ledger)


def _from_tree(tree: Any) -> Rewind:
    if not isinstance(tree, dict) or tuple(sorted(tree)) != tuple(sorted(_KEYS)):
        raise ValueError(f"its keys are not {', '.join(_KEYS)}")
    finding = tree["finding"]
    if finding not in get_args(Finding):
        raise ValueError(f"finding={finding!r:.40}")
    skipped = tuple((_count(first), _count(end)) for first, end in tree["skipped_samples"])
    if not skipped or any(first >= end for first, end in skipped):
        raise ValueError(f"skipped_samples={tree['skipped_samples']!r:.60}")
    step, back_to = _count(tree["step"]), _count(tree["back_to_step"])
    if back_to >= step:
        raise ValueError(f"back_to_step={back_to}, step={step}")
    return Rewind(_count(tree["rewind"]), step, finding, back_to, skipped)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _add_apart(ranges: list[Range], more: Sequence[Range]) -> None:
    """Put ranges in among others that rise and are apart; they must be apart from them, and from each other."""
    for new in more:
        at = bisect.bisect_left(ranges, new)
        for before, behind in itertools.pairwise([*ranges[max(at - 1, 0) : at], new, *ranges[at : at + 1]]):
            if behind[0] < before[1]:
                raise ValueError(f"sample {behind[0]} is left out twice")
        ranges.insert(at, new)


def read_ledger(path: Path) -> Ledger | None:
    """What a file holds; None where there is none. A torn last line, which a kill leaves, is no line.

    Raises:
        CheckpointError: E436: it is no ledger.
        OSError: nothing can have the path (names that are too long, links in a circle).
    """
    try:
        content = read_regular(path, MAX_LEDGER_BYTES, follow=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and not os.path.lexists(path):
            raise
        rule, remedy = f"cannot be read as a ledger ({error.strerror})", "put the file itself there"
        raise CheckpointError(36, str(path), rule, remedy) from None
    return ledger_from_trees(map(_parsed, content.split(b"\n")[:-1]), str(path))


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None  # which is no line of a ledger


def ledger_bytes(ledger: Sequence[Rewind]) -> bytes:
    """The content of the file that holds a ledger."""
    return b"".join(json.dumps(rewind.to_tree()).encode() + b"\n" for rewind in ledger)
