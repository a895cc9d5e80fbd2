"""The portable attention kernels as C++ alone, compiled for aarch64 and run in an emulator.

That needs a compiler for aarch64 (``pip install ziglang``: Clang) and, to run what it makes, ``qemu-aarch64`` or
``qemu-aarch64-static`` on PATH (Debian's qemu-user-static); without them the test is skipped. It passed with ziglang
0.17.1 and qemu 7.2 on 29 Nov. 2026. On this processor the same kernels are tested by ``test_cpu_attention.py``.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.native.test_cpu_attention import ERRORS

ROOT = Path(__file__).parents[3]
SOURCES = [str(Path(__file__).parent / "attention_check.cpp")]
SOURCES += [str(ROOT / "csrc/cpu" / name) for name in ("attention.cpp", "version_portable.cpp")]
OPTIONS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
OPTIONS += [f"-I{ROOT / 'csrc/cpu'}"]


def compile_check(compiler: list[str], target: Path) -> None:
    built = subprocess.run([*compiler, *OPTIONS, *SOURCES, "-o", str(target)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]


def assert_exact(command: list[str]) -> None:
    """The program's errors are within the bounds of the other versions."""
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    bounds = {str(dtype).removeprefix("torch."): bound for dtype, bound in ERRORS.items()}
    assert [line.split()[0] for line in lines] == list(bounds)
    for line in lines:
        dtype, *errors = line.split()
        assert len(errors) == 4 and all(float(error) <= bounds[dtype] for error in errors), line


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no compiler for aarch64: pip install ziglang")
def test_aarch64(tmp_path: Path) -> None:
    program = tmp_path / "check"
    compile_check([sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static"], program)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if platform.machine() == "aarch64":
        assert_exact([str(program)])
    elif emulator is None:
        pytest.skip("it compiled; to run it there is no qemu-aarch64 on PATH")
    else:
        assert_exact([emulator, str(program)])
