"""Where our files that are not Python modules are: a wheel has them in the package, the repository beside it.

``setup.py`` puts programs, presets, essays and the pages of docs/ into a wheel. Imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
OF_A_WHEEL = (_PACKAGE / "tools").is_dir()
"""Whether the package was installed without its repository: then the programs are in it."""


def shipped_folder(in_wheel: str, in_repository: str) -> Path:
    """A folder of ours, by its names below the package and below the repository."""
    inside = _PACKAGE / in_wheel
    return inside if inside.is_dir() else _PACKAGE.parent / in_repository
