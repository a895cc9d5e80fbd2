"""Run the commands of a page of docs/, block by block, in a folder that looks like the repository to them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.warm_python import write_python

ROOT = Path(__file__).parents[1]


def blocks_of(text: str) -> list[str]:
    """The bash blocks of a Markdown text."""
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prepare_folder(folder: Path) -> Path:
    """Tools and examples of the repository, and ``python`` as the interpreter that runs the tests, libraries warm."""
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    write_python(folder / "bin" / "python")
    return folder


def run_block(block: str, folder: Path, timeout: float = 280, **variables: str) -> str:
    """What one block prints; its first command that fails ends it and the test."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout
