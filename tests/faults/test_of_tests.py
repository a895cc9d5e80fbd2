"""The tests of the tests: each safety measure is switched off in a copy of the tree, and a test must notice.

``HAMMER_TEST_OF_TESTS=1`` does so, in minutes: before a release, and after any change to a measure or its test.
``HAMMER_TEST_OF_TESTS=10:20`` takes some of them. In every run of the tests the table is held against the code.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_hammer.base.system import die_with_parent
from tests.faults.measures import MEASURES, Measure

ROOT = Path(__file__).parents[2]
WANTED = os.environ.get("HAMMER_TEST_OF_TESTS", "")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", "*.egg-info")
FAILED, SECONDS = 1, 90.0  # pytest's exit code where tests failed; a test that hangs without a measure misses it too


def test_the_table_is_that_of_the_code() -> None:
    for measure in MEASURES:
        code = (ROOT / "megatron_hammer" / measure.file).read_text()
        assert code.count(measure.old) == 1, f"{measure.name}: {measure.old!r} in {measure.file}"
        compile(code.replace(measure.old, measure.new), measure.file, "exec")
        file, _, name = measure.test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), measure.test
    assert len({measure.name for measure in MEASURES}) == len(MEASURES)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tree in which all the tests pass."""
    folder = tmp_path_factory.mktemp("copy") / "tree"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    assert run_tests(folder, *{measure.test for measure in wanted()}) == 0
    yield folder
    shutil.rmtree(folder)


def run_tests(tree: Path, *tests: str, seconds: float | None = None) -> int | None:
    """Exit code of pytest in a copy of the tree; None where it does not end."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("HAMMER_TEST_OF_TESTS")
    run = subprocess.Popen(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )  # fmt: skip
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def wanted() -> list[Measure]:
    first, _, end = WANTED.partition(":")
    return list(MEASURES[int(first or 0) : int(end or len(MEASURES))] if ":" in WANTED else MEASURES)


@pytest.mark.slow
@pytest.mark.skipif(not WANTED, reason="HAMMER_TEST_OF_TESTS=1 runs it: minutes")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("measure", wanted() if WANTED else MEASURES[:1], ids=lambda measure: measure.name)
def test_somebody_misses_it(copy: Path, measure: Measure) -> None:
    path = copy / "megatron_hammer" / measure.file
    code = path.read_text()
    path.write_text(code.replace(measure.old, measure.new))
    try:
        assert run_tests(copy, measure.test, seconds=SECONDS) in (FAILED, None), f"{measure.test} passes without it"
    finally:
        path.write_text(code)
