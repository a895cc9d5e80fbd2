"""The presets by their names, wherever the package is: ``tiny`` for ``examples/configs/tiny.yaml``.

The repository has them in ``examples/configs/``, a wheel in the package (``base/shipped.py``).
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_hammer.base.shipped import shipped_folder

PRESETS = shipped_folder("configs", "examples/configs")
"""Their folder."""


def preset_names() -> list[str]:
    """What ``load_config`` takes beside the paths of files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(name: str | os.PathLike[str]) -> Path | None:
    """The file of a preset; None where this is no name of one, or a file that is there has the name."""
    if not isinstance(name, str) or not name.isidentifier() or os.path.lexists(name):
        return None
    path = PRESETS / f"{name}.yaml"
    return path if path.is_file() else None
