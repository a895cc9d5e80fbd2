"""Errors are one line in four parts, survive the way to another process, and docs/errors.md lists them all."""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_hammer.base import cli
from megatron_hammer.base.errors import (
    ERRORS_BY_EXIT_CODE,
    ConfigError,
    DataError,
    DiskError,
    HammerError,
    MemoryShortage,
    from_exception,
    from_fields,
    from_os_error,
    to_fields,
)

ROOT = Path(__file__).parents[2]
EXIT_CODES = {cls.__name__: code for code, cls in ERRORS_BY_EXIT_CODE.items()}


def test_the_line() -> None:
    error = ConfigError(5, "a.b=3", "must divide\nc=4", "use 1")
    assert str(error) == "error[E205]: a.b=3 must divide c=4; use 1"
    again = from_fields(to_fields(error))
    assert type(again) is ConfigError and str(again) == str(error)


def test_operating_system_errors_become_exit_code_6(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "absent" / "file").write_text("")
    error = from_os_error(caught.value, "testing")
    assert isinstance(error, DiskError) and "absent" in str(error) and "testing" in str(error)


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "can be written to"),
        (errno.EIO, "dmesg"),
        (errno.ENOENT, "is not there"),
        (errno.ENOTDIR, "a file, not a folder"),
        (errno.EISDIR, "not a folder"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.ESTALE, "mount it again"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.EFBIG, "files of this size"),
        (errno.EXFULL, "the cause that the system names"),
    ],
)
def test_subject_and_remedy_fit_what_the_system_refused(number: int, remedy: str) -> None:
    """Without a file name the subject is what was under way, said once; with one it is the file."""
    error = OSError(number, os.strerror(number))
    rank, doing = str(from_exception(error, "rank 0")), str(from_os_error(error, "saving runs/x"))
    assert rank.startswith(f"error[E601]: rank 0 failed: {os.strerror(number)}") and remedy in rank
    assert doing.startswith(f"error[E601]: saving runs/x failed: {os.strerror(number)}")
    named = str(from_exception(OSError(number, os.strerror(number), "/a/b", None, "/a/c"), "rank 0"))
    assert named.startswith("error[E601]: /a/b -> /a/c could not be used while rank 0 was running: ")
    assert ("permissions" in rank) == (number in (errno.EACCES, errno.EPERM))


def test_free_space_is_stated_and_no_memory_is_an_error_of_its_own(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "absent" / "file"))
    assert re.search(r"No space left on device, [\d,.]+ MB free; free space there", str(from_os_error(full, "writing")))
    nowhere = str(from_os_error(OSError(errno.EDQUOT, "Disk quota exceeded"), "saving x", place=tmp_path))
    assert re.search(r"saving x failed: Disk quota exceeded, [\d,.]+ MB free; ", nowhere)
    memory = from_exception(OSError(errno.ENOMEM, "Cannot allocate memory"), "rank 3")
    assert isinstance(memory, MemoryShortage) and "max_map_count" in str(memory) and memory.what == "rank 3"
    numbered = from_os_error(OSError(errno.EBADF, "Bad file descriptor", 7), "reading x")
    assert numbered.what == "reading x"  # a descriptor's number is no name


def _codes_in_python() -> set[str]:
    """Every ``XError(number, ...)`` with a literal number in the package and the tools."""
    codes = set()
    for path in [*(ROOT / "megatron_hammer").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if (
                name in EXIT_CODES
                and isinstance(node, ast.Call)
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                codes.add(f"E{EXIT_CODES[name]}{node.args[0].value:02d}")
    return codes


def test_the_page_lists_them_all() -> None:
    listed = set(re.findall(r"^\| (E\d+) \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE))
    used = _codes_in_python()
    for script in (ROOT / "tools" / "make_venv.sh", ROOT / "examples" / "pretrain_1b4.sh"):
        used |= {f"E2{number}" for number in re.findall(r"\bfail (\d\d) ", script.read_text(encoding="utf-8"))}
    assert used - listed == set(), "missing on the page"


@pytest.mark.parametrize("language", ["", ".zh-CN"])
def test_what_is_cured_is_listed(language: str) -> None:
    """docs/troubleshooting.md has codes that docs/errors.md has, the same in both languages, of each exit code."""
    pages = [
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in (f"troubleshooting{language}", "errors")
    ]
    rows = "".join(re.findall(r"^\| (E\d[^|]*)\|", pages[0], re.MULTILINE))
    listed = set(re.findall(r"^\| (E\d+) \|", pages[1], re.MULTILINE))
    assert len(set(re.findall(r"E\d+", rows))) > 50 and not set(re.findall(r"E\d+", rows)) - listed
    first = re.findall(r"^\| (E\d.*?) \|", pages[0].replace("、", ", ").replace("至", "to"), re.MULTILINE)
    english = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert first == re.findall(r"^\| (E\d.*?) \|", english, re.MULTILINE)
    headings = " ".join(re.findall(r"^## .*", pages[0], re.MULTILINE))
    assert {int(number) for number in re.findall(r"\d+", headings)} == {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 75}


@pytest.mark.parametrize("error, code", [(DataError(1, "x", "y", "z"), 3), (OSError(28, "No space left", "f"), 6),
                                         (KeyboardInterrupt(), 130), (None, 0)])  # fmt: skip
def test_programs_end_with_the_documented_code(
    error: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == code
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == (0 if error is None else 1)
    assert isinstance(error, HammerError | OSError) == stderr.startswith("error[E")


PROGRAMS = sorted((ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=[p.name for p in PROGRAMS])
def test_tools_explain_themselves_and_refuse_in_one_line(program: Path) -> None:
    """--help works and loads no torch; a wrong call is one line and exit code 2."""
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(program.parent)!r})\n"
        f"try: runpy.run_path({str(program)!r}, run_name='__main__')\n"
    )
    code += "except SystemExit as end: assert end.code in (0, None), end\nassert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "usage" in shown.stdout, shown.stderr
    wrong = subprocess.run([sys.executable, str(program), "--nonsense"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error[E2") and wrong.stderr.count("\n") == 1, wrong.stderr


def test_a_python_without_what_is_needed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python of the machine, where .venv was not activated: before any import of the package."""
    there = importlib.util.find_spec
    for name in ("megatron_hammer", "orjson"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, name=name: None if n == name else there(n))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools/require_package/__init__.py"))
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.startswith(f"error[E251]: the module {name} is not there")
        assert "source .venv/bin/activate" in said and said.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", there)
    other = tmp_path / "another clone"
    for folder in ("megatron_hammer", "tools/require_package"):
        (other / folder).mkdir(parents=True)
    (other / "megatron_hammer/__init__.py").touch()
    spec = importlib.util.spec_from_file_location("megatron_hammer", other / "megatron_hammer/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: spec if n == "megatron_hammer" else there(n))
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools/require_package/__init__.py"))
    said = capsys.readouterr().err
    assert f"has the package megatron_hammer of {other}, and this program is of {ROOT}; there, source .venv" in said
    shutil.rmtree(other / "tools")  # installed without a clone
    runpy.run_path(str(ROOT / "tools/require_package/__init__.py"))
    for program in PROGRAMS:
        imports = [line for line in program.read_text().splitlines() if line.startswith(("import ", "from "))]
        ours = next(i for i, line in enumerate(imports) if "megatron_hammer" in line)
        assert "require_package" in imports[ours - 1], program


def test_a_python_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line by every program, in whatever way it is started; as an ImportError in somebody's own program."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    for path, argument in (("tools/require_package/__init__.py", "tools/x.py"), ("megatron_hammer/__init__.py", "-m")):
        monkeypatch.setattr(sys, "argv", [argument])
        with pytest.raises(SystemExit) as caught:
            exec(compile((ROOT / path).read_text(encoding="utf-8"), path, "exec"), {"__file__": str(ROOT / path)})
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.startswith("error[E250]: ") and said.count("\n") == 1
        assert "Python 3.9" in said and "source .venv/bin/activate" in said
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    with pytest.raises(ImportError, match=r"E250.*source .venv/bin/activate"):
        exec(compile((ROOT / path).read_text(encoding="utf-8"), path, "exec"), {})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"].startswith(">=3.11,")


@pytest.mark.parametrize("module", ["megatron_hammer.train", "megatron_hammer.launch"])
def test_training_programs_explain_themselves(module: str, tmp_path: Path) -> None:
    """Where PyYAML is missing too."""
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert shown.returncode == 0
    for field in ("optimizer.lr (float) = 0.0005", "parallel.tensor_model_parallel_size", "data.valid"):
        assert field in shown.stdout
