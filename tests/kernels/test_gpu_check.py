"""The first command on a GPU, over tests that pass, fail, are skipped, end their process and never end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import gpu_check

TESTS = """
import os, time, pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", [1, 2])
def test_good(n): pass

def test_bad(): assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="no such thing here")
def test_absent(): pass

def test_crash(): os.abort()

def test_hang(): time.sleep(600)
"""


def test_each_function_has_its_own_fate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each function's process starts in a third of the time
    folder, out = tmp_path / "tests", tmp_path / "out"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: as here")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_other.py").write_text("def test_for_a_cpu(): raise AssertionError")
    assert gpu_check.check(tmp_path, out, jobs=2, seconds=10) == 3
    lines = {line.split("::")[1].split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, word, says in (
        ("test_good", "ok", "2 passed"),
        ("test_bad", "FAILED", "one is not two"),
        ("test_absent", "skipped", "no such thing here"),
        ("test_crash", "CRASHED", "exit code -6"),
        ("test_hang", "TIME", "not done after 10 s"),
    ):
        assert lines[name].startswith(word) and says in lines[name]
    assert sorted(path.name for path in out.iterdir()) == [
        "test_some.py-test_bad.log", "test_some.py-test_crash.log", "test_some.py-test_hang.log",
    ]  # fmt: skip
    assert "one is not two" in (out / "test_some.py-test_bad.log").read_text()
    assert gpu_check.functions(tmp_path, "good or hang") == [
        "tests/test_some.py::test_good",
        "tests/test_some.py::test_hang",
    ]


def test_it_finds_ours() -> None:
    """Every file with the marker, wherever it lies."""
    found = gpu_check.functions(gpu_check.ROOT)
    files = {name.split("::")[0] for name in found}
    assert {"tests/test_gpu.py", "tests/kernels/test_fused_gpu.py", "tests/kernels/test_fp8.py"} <= files
    assert all("test_gpu_check" not in name for name in found)
