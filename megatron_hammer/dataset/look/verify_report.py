"""The report of ``verify.py``: problems, which make a dataset unsound, remarks, which do not, and facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_hammer.base.errors import DataError, RefusedError
from megatron_hammer.dataset.format import REMAKE

EXAMPLES = 5
"""Places that a sentence names, of those that are alike."""


@dataclass
class DatasetReport:
    """What verification found."""

    prefix: str
    problems: list[str] = field(default_factory=list)
    """Each makes the dataset unsound."""
    contaminated: list[str] = field(default_factory=list)
    """Held-out sets with a document that is in the dataset too."""
    remarks: list[str] = field(default_factory=list)
    """Worth knowing, no fault."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts, ready for JSON."""

    def describe(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "prefix": self.prefix,
            "sound": not self.problems and not self.contaminated,
            "problems": [*self.problems, *self.contaminated],
            "remarks": self.remarks,
            **self.facts,
        }

    def raise_if_unsound(self) -> None:
        """End the program with a documented exit code.

        Raises:
            DataError: E370 damaged, or not what its header says.
            RefusedError: E538 sound in itself, but it holds documents of a held-out set.
        """
        if self.problems:
            rule = f"is not sound: {counted(len(self.problems), 'problem')}, first: {self.problems[0]}"
            raise DataError(70, self.prefix, rule, REMAKE)
        if self.contaminated:
            raise RefusedError(38, self.prefix, f"holds held-out documents: {'; '.join(self.contaminated)}",
                               "take them out of the corpus before preparing it, or hold out others")  # fmt: skip


def format_report(report: DatasetReport) -> str:
    """The report for people: facts, then remarks and problems, then the verdict."""
    lines = []
    for name, value in report.facts.items():
        title = f"{name.replace('_', ' '):15} "
        if name == "held_out":
            lines += [f"{title}{path}: {_plain(facts)}" for path, facts in value.items()]
        elif name == "characters":
            scripts = ", ".join(f"{script} {100 * share:.3g} %" for script, share in value["scripts"].items())
            lines += [f"{title}{_plain({key: value[key] for key in value if key != 'scripts'})}"]
            lines += [f"{'scripts':15} {scripts}"]
        else:
            lines.append(title + _plain(value))
    lines += [f"remark: {remark}" for remark in report.remarks]
    lines += [f"PROBLEM: {problem}" for problem in [*report.problems, *report.contaminated]]
    verdict = "sound" if not report.problems and not report.contaminated else "NOT SOUND"
    return "\n".join([*lines, f"{report.prefix}: {verdict}"])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def counted(count: int, noun: str) -> str:
    """``1 document``, ``2 documents``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
