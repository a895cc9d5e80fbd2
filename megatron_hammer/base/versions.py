"""The versions of the libraries that decide what a run computes: for checkpoints, trackers and the doctor. No torch."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib import metadata

PACKAGES = ("megatron_hammer", "torch", "numpy", "transformers", "sentencepiece", "tokenizers")


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Python's version, and that of each of ``PACKAGES`` that is installed; looked up once, for each save asks."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
