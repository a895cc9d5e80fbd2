"""The Python sources of Transformer Engine, downloaded once into a cache folder, read and never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

VERSION = "2.20.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_hammer" / f"te-{VERSION}"


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder that holds ``transformer_engine/`` of that version."""
    if not CACHE.exists():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "--timeout", "10"]
            wanted = [f"transformer-engine=={VERSION}", "--no-deps", "--only-binary", ":all:", "-d", folder]
            try:
                done = subprocess.run([*pip, "download", *wanted], capture_output=True, text=True, timeout=60)
                why = (done.stderr.strip().splitlines() or [""])[-1]
            except subprocess.TimeoutExpired:
                why = "pip download took more than 60 seconds"
            wheels = list(Path(folder).glob("*.whl"))
            if not wheels:
                pytest.skip(f"no sources of transformer-engine {VERSION} in {CACHE}: {why}")
            CACHE.parent.mkdir(parents=True, exist_ok=True)
            unpacked = Path(tempfile.mkdtemp(dir=CACHE.parent))
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if name.endswith(".py")])
            if not CACHE.exists():  # another run may have been quicker
                unpacked.rename(CACHE)
    return CACHE
