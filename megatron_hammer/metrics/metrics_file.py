"""OUT/metrics.jsonl: one JSON object a step, cut back to the step of the checkpoint that a run goes on from.

Damage in it (a line that is no JSON, NULs, a digit that makes another step of it) never ends a run: the damaged file is
kept as ``metrics.jsonl.aside-HEX``, a note says so, and training goes on with the lines that can be read. A torn last
line is what every kill leaves, and is dropped without a note. Needs no torch.
"""

from __future__ import annotations

import bisect
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.files import aside_path, make_durable, replace_file, set_aside, sync_folder, writing
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import open_regular, parse_json, read_regular
from megatron_hammer.base.system import end_of_hole

METRICS = "metrics.jsonl"
MAX_LINE_BYTES = 2**22  # of a step, with the figures of thousands of sources: whoever reads the file takes no more
MAX_LINES_BYTES = 2**28  # of a file that gets a line now and then: one is some hundreds of bytes


@dataclass(frozen=True)
class KeptLines:
    """What an earlier run has written, as far as it can be read."""

    lines: tuple[tuple[int, bytes], ...] = ()
    """(step, the line without its end), by rising step."""
    damaged: tuple[int, ...] = ()
    """Numbers, from 1, of the lines that cannot be read."""

    @property
    def last_step(self) -> int:
        """The last step that is there; 0 without any."""
        return self.lines[-1][0] if self.lines else 0

    def content(self, after: int = 0, up_to: float = math.inf) -> bytes:
        """A file of those of steps ``after`` + 1 to ``up_to``."""
        return b"".join(line + b"\n" for step, line in self.lines if after < step <= up_to)


class MetricsFile:
    """The file, open for appending after it has been cut back to the step from which the run goes on."""

    def __init__(self, path: Path, last_step: int, note: Callable[[str], None] = say) -> None:
        """Keep the whole lines of steps up to ``last_step`` (0: none)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = read_lines(path)
        except OSError as error:
            kept, found = set_aside(path), KeptLines()
            note(f"{path} cannot be read ({error.strerror}): kept as {kept.name}, and begun anew")
        if found.damaged and last_step:
            kept = copy_aside(path)
            note(
                f"{path}: {len(found.damaged)} lines cannot be read, the first is line {found.damaged[0]}: the file as "
                f"it was is kept as {kept.name}; training goes on from its checkpoint"
            )
        replace_file(path, found.content(up_to=last_step))
        self.file = path.open("ab")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object and hand it to the operating system."""
        content = json.dumps(finite(line), ensure_ascii=False).encode() + b"\n"
        with writing(self.file.name, len(content)):
            self.file.write(content)
            self.file.flush()

    def sync(self) -> None:
        """Make sure that the lines so far are on the disk: before a checkpoint is committed."""
        make_durable(self.file)

    def close(self) -> None:
        """Nothing more will be written."""
        self.file.close()


def finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line as JSON can have it: what is not finite is None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def split_key(key: str) -> tuple[str, str, str]:
    """(kind, name, figure) of ``source/NAME/loss``, ``valid/NAME/loss`` or ``evaluation/NAME/loss``.

    A name may hold slashes. One of the whole run has neither kind nor name: ("", "", "loss").
    """
    kind, slash, rest = key.partition("/")
    name, _, figure = rest.rpartition("/")
    return (kind, name, figure) if slash else ("", "", key)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a whole line, or leave the file as it was; what a killed process left of one is taken out."""
    there = b""
    with suppress(FileNotFoundError):
        there = read_regular(path, MAX_LINES_BYTES, follow=False)
    whole = there[: there.rfind(b"\n") + 1]
    replace_file(path, whole + json.dumps(line, ensure_ascii=False).encode() + b"\n")


def copy_aside(path: Path) -> Path:
    """Keep a file as it is now under another name (``set_aside``), and leave an equal one in its place."""
    kept = aside_path(path)
    try:
        os.link(path, kept)  # at once, however large: whoever writes to the file again replaces it
    except OSError:  # a file system without links
        set_aside(path, kept)
        with open_regular(kept, follow=False) as file:
            replace_file(path, file.read())
    sync_folder(path.parent)
    return kept


def read_lines(path: Path) -> KeptLines:
    """The lines that are there; none where there is no file.

    Raises:
        OSError: the file cannot be read, or something else has its name.
    """
    try:
        with open_regular(path, follow=False) as file:
            raw = list(_whole_lines(file))
    except FileNotFoundError:
        return KeptLines()
    steps = [(number, _step_of(line)) for number, line in enumerate(raw, start=1) if line]
    good = [(number, step) for number, step in steps if step is not None]
    rising = longest_rising([step for _, step in good])
    damaged = {number for number, step in steps if step is None} | {good[i][0] for i in set(range(len(good))) - rising}
    kept = tuple((good[i][1], raw[good[i][0] - 1]) for i in sorted(rising))
    return KeptLines(kept, tuple(sorted(damaged)))


def _whole_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """The lines without their ends. Behind the last end stands nothing, or a torn line, which is left out; of one that
    is longer than any of ours, as a hole of gigabytes is, the first byte is left."""
    while line := file.readline(MAX_LINE_BYTES):
        if line.endswith(b"\n"):
            yield line[:-1]
        elif len(line) == MAX_LINE_BYTES:
            yield line[:1]
            while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                file.seek(end_of_hole(file.fileno(), file.tell()))


def _step_of(line: bytes) -> int | None:
    """The step of a line; None where it is not one of ours."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if type(step) is int and step > 0 else None


def longest_rising(steps: Sequence[int]) -> set[int]:
    """Positions of the longest strictly rising subsequence: a damaged digit takes its own line out, and no other."""
    ends: list[int] = []  # the smallest last step of a rising subsequence of each length, and where that is
    places: list[int] = []
    before: list[int] = []
    for at, step in enumerate(steps):
        length = bisect.bisect_left(ends, step)
        before.append(places[length - 1] if length else -1)
        ends[length : length + 1], places[length : length + 1] = [step], [at]
    kept, at = set[int](), places[-1] if places else -1
    while at >= 0:
        kept.add(at)
        at = before[at]
    return kept
