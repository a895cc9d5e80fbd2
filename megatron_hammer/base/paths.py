"""What a path that is not there probably means: one spelt alike, or one below another folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def neighbour_of(path: Path) -> Path | None:
    """An existing path that differs in one name, spelt alike or with another ending; None where there is none."""
    parents = [path, *path.parents]
    there = next((parent for parent in parents[1:] if parent.is_dir()), None)
    if there is None:
        return None
    missing = parents[parents.index(there) - 1]
    try:
        names = sorted(os.listdir(there))
    except OSError:
        return None
    below = path.relative_to(missing)
    fitting = [name for name in names if (there / name / below if below.parts else there / name).exists()]
    same_stem = [name for name in fitting if Path(name).stem == missing.stem]
    close = difflib.get_close_matches(missing.name, fitting, n=1, cutoff=0.75) or same_stem[:1]
    return there / close[0] / below if close else None


def missing_remedy(path: Path, otherwise: str) -> str:
    """The remedy for a path that is not there; ``otherwise`` where nothing is spelt alike."""
    near = neighbour_of(path)
    if near is not None:
        return f"did you mean {near}?"
    return otherwise if path.is_absolute() else f"{otherwise} (looked for {Path.cwd() / path})"
