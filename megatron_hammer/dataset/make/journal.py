"""The journal of a preprocessing run: how far it has come, so that a run that was killed can go on.

::

    P_KEY_document.bin.tmp, .idx.tmp, .documents.tmp    what was written so far; synced before the journal
    P_KEY_document.journal.json                         how much of that is good, and for which inputs and options

The journal is replaced as a whole after the data is on the disk. So there is always one whole journal, and what it
states is there. A run that finds a journal cuts the temporary files to what it states and goes on from there. The
journal of another command (other inputs, options or tokenizer) is refused, and the difference named.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import DataError, RefusedError
from megatron_hammer.base.files import make_durable, open_new, publish
from megatron_hammer.base.reading import parse_json, read_regular

JOURNAL_FORMAT = "megatron_hammer preprocessing journal"
JOURNAL_VERSION = 1


@dataclass
class Tally:
    """What was taken from one input so far."""

    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """For each JSON key."""
    rejected: dict[str, int] = field(default_factory=dict)
    """For each cause."""
    xxh3: str | None = None
    """Of the raw file, once it is read to its end."""


@dataclass
class Journal:
    """Everything a run needs to go on."""

    identity: dict[str, Any]
    """What must not change: inputs by path, keys, options, tokenizer."""
    files: list[dict[str, Any]]
    """Size and time of change of each input, as ``stream.file_identity`` gives them."""
    on_error: str
    source: int = 0
    """The input that is being read; the number of inputs when all are read."""
    offset: int = 0
    line: int = 1
    content_hash: str | None = None
    """XXH3-128 of the text of this input up to ``offset``; None for parquet, or at its start."""
    tallies: list[Tally] = field(default_factory=list)
    writers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each key the state of its ``IndexedWriter``."""
    rejected_bytes: int = 0
    """Of the file of rejected lines."""
    text_bytes: int = 0
    raw_bytes: int = 0
    seconds: float = 0.0
    """Worked so far, over all runs."""

    def save(self, path: Path) -> None:
        """Replace the journal as a whole, durably."""
        tree = {"format": JOURNAL_FORMAT, "version": JOURNAL_VERSION, **asdict(self)}
        temporary = Path(f"{path}.tmp")  # of a fixed name: the next run overwrites what a killed one leaves
        with open_new(temporary) as file:
            file.write(json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogateescape"))
            make_durable(file)
        publish(temporary, path)


def load_journal(path: Path) -> Journal | None:
    """The journal of an interrupted run, if there is one.

    Raises:
        DataError: E348 something else is there.
    """
    try:
        tree = parse_json(read_regular(path, follow=False).decode("utf-8", "surrogateescape"))
        if tree.pop("format") != JOURNAL_FORMAT or tree.pop("version") != JOURNAL_VERSION:
            raise ValueError("of another format or version")
        tree["tallies"] = [Tally(**tally) for tally in tree["tallies"]]
        return Journal(**tree)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(48, str(path), f"is not a journal of this program ({error})",
                        "give --restart to begin again") from None  # fmt: skip


def check_journal(path: Path, journal: Journal, current: Journal) -> None:
    """Refuse to go on where another command, or an input that was read and has changed since, would be mixed in.

    The input that was being read is checked when it is read again, by its content: it may have been mended further on.

    Raises:
        RefusedError: E534 another command, E535 an input has changed.
    """
    for name, ours in current.identity.items():
        theirs = journal.identity.get(name)
        if theirs != ours:
            raise other_command(path, f"{name} {_short(theirs)}, now {_short(ours)}")
    if journal.on_error not in ("stop", current.on_error):  # what was skipped before cannot be treated otherwise now
        raise other_command(path, f"on_error {journal.on_error}, now {current.on_error}")
    for number, (then, now) in enumerate(zip(journal.files, current.files)):
        read = number < journal.source or (number == journal.source and journal.offset and not journal.content_hash)
        if read and then != now:
            raise input_changed(path, then["path"])


def input_changed(journal: Path, path: object) -> RefusedError:
    """E535: an input was changed where an interrupted run has read it already."""
    return RefusedError(
        35, str(path), f"has changed since {journal} was written, in a part that is read already",
        "restore it, or give --restart to begin again",
    )  # fmt: skip


def other_command(path: Path, difference: str) -> RefusedError:
    """E534: what an interrupted run has left belongs to another command."""
    return RefusedError(34, str(path), f"was left by another command: {difference}",
                        "give that command again to finish it, or --restart to drop it and begin this one")  # fmt: skip


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
