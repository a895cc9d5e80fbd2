"""The version is one and the same wherever it stands, and a release is refused where it is not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import megatron_hammer

ROOT = Path(__file__).parents[1]
FILES = ["CHANGELOG.md", "CITATION.cff", "megatron_hammer/__init__.py", "tools/check_release.sh"]


def check(tree: Path, version: str) -> tuple[int, str]:
    command = ["bash", str(tree / "tools/check_release.sh"), version]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def copy(tree: Path) -> None:
    for name in FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)


def test_one_version_everywhere() -> None:
    version = megatron_hammer.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert newest is not None and newest[1] == version


def test_a_release_needs_its_date_and_its_version(tmp_path: Path) -> None:
    copy(tmp_path)
    version, changes = megatron_hammer.__version__, tmp_path / "CHANGELOG.md"
    code, said = check(tmp_path, "99.0.0")
    assert code == 2 and said.startswith("error[E260]: megatron_hammer/__init__.py is not of version 99.0.0")
    changes.write_text(changes.read_text().replace(f"## {version} (unreleased)", f"## {version} (2026-12-31)", 1))
    code, said = check(tmp_path, version)
    assert (code, said) == (0, f"version {version} may be tagged: git tag -a v{version} -F release-notes.md\n")
    notes = (tmp_path / "release-notes.md").read_text()
    assert notes.strip() and "## " not in notes
    changes.write_text(changes.read_text().replace("(2026-12-31)", "(unreleased)", 1))
    code, said = check(tmp_path, version)
    assert code == 2 and "its newest heading must be" in said
