"""What Triton can do on this machine: marks for tests that need it."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest


def _interpreter_fails() -> bool:
    """Triton 3.6 (torch 2.11) with NumPy 2.4 and later, which makes no int of an array of one element: no loop whose
    bounds are no constants."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("numpy") is None:
        return False
    numpy = tuple(int(part) for part in metadata.version("numpy").split(".")[:2])
    return metadata.version("triton").startswith("3.6.") and numpy >= (2, 4)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or _interpreter_fails(),
    reason="needs the package triton, and one whose interpreter works with this NumPy (3.6 does not from 2.4 on)",
)
