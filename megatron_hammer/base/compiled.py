"""Finds the extension modules that ``setup.py`` compiles. Where one is missing, Python code does its work."""

from __future__ import annotations

import importlib
from typing import Any


def find_compiled(name: str, interface: int) -> Any:
    """The compiled module, or None where the installation did not build it, or built it from other sources.

    Args:
        name: in full, as ``megatron_hammer.sampling._index``.
        interface: what its ``INTERFACE`` must be, so that an old build is not called with new arguments.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return module if getattr(module, "INTERFACE", None) == interface else None
