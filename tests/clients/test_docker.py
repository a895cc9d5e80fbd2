"""The registry has every version of the images, and the CPU image's steps run as a script in a copy of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docker import PINS, ROOT


def test_the_registry_has_every_version() -> None:
    absent = []
    for name, version in PINS.items():
        words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", name]
        said = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
        if version not in said.replace(",", " ").split():
            absent.append(f"{name}=={version}")
    assert not absent


@pytest.mark.timeout(1200)
def test_the_steps_of_the_cpu_image_run_without_docker(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PYTHON": os.environ.get("PYTHON", f"python3.{sys.version_info.minor}")}
    words = ["bash", "docker/install.sh", "torch", "environment", "check"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "torch 2.13.0" in done.stdout and (tmp_path / ".venv" / ".complete").exists()
