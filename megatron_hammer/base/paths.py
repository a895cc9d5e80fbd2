"""What a path probably means: one that is not there, and a folder where the beginning of files' names is asked for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import say


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


def check_prefix(option: str, prefix: str | Path, ending: str) -> Path:
    """The prefix of files to write, which ends in a name.

    Args:
        ending: what follows it in the first file's name, such as ``_text_document.idx``.

    Raises:
        ConfigError: E288 it ends in a slash, or is a folder's other name.
    """
    text = os.fspath(prefix)
    if text.endswith(os.sep) or Path(text).name in ("", ".."):
        remedy = f"name the files too: {option} {Path(text) / 'NAME'}"
        raise ConfigError(
            88, f"{option}={text}", f"names a folder, and the files in it would be called {ending}", remedy
        )
    if Path(text).is_dir():
        say(f"note: {text} is a folder: {text}{ending} is written beside it; {Path(text) / 'NAME'} would be in it")
    return Path(text)
