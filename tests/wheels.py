"""Python sources of published packages: a wheel is downloaded once into a cache folder, read, and never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_hammer"


def sources_of(package: str, version: str, name: str) -> Path:
    """The folder, called ``name``-``version`` in the cache, that holds the package's Python files.

    Skips the test where it is neither there nor to be had.
    """
    folder = CACHE / f"{name}-{version}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "--timeout", "10"]
        wanted = [f"{package}=={version}", "--no-deps", "--only-binary", ":all:", "-d", downloads]
        try:
            done = subprocess.run([*pip, "download", *wanted], capture_output=True, text=True, timeout=60)
            why = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            why = "pip download took more than 60 seconds"
        wheels = list(Path(downloads).glob("*.whl"))
        if not wheels:
            pytest.skip(f"no sources of {package} {version} in {folder}: {why}")
        CACHE.mkdir(parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(dir=CACHE))
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if name.endswith(".py")])
        if not folder.exists():  # another run may have been quicker
            unpacked.rename(folder)
    return folder
