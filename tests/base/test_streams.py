"""Standard output and standard error that fail never end work, and end a listing as documented."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_hammer.base.errors import DiskError
from megatron_hammer.base.streams import Outlet, OutputKind, Vanished

PROGRAM = """
import sys
from pathlib import Path
from megatron_hammer.base.cli import ArgumentParser, print_json, run
from megatron_hammer.base.streams import OutputKind, only_list

def main():
    parser = ArgumentParser(description="x" * 200_000)
    parser.add_argument("kind")
    parser.add_argument("done", type=Path)
    parser.add_argument("code", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    if arguments.kind == "listing":
        only_list()
    print_json("\\u4e2d\\U0001f600")
    for number in range(20_000):
        print("line", number, "\\u4e2d \\udcff", flush=number % 100 == 0)
    print("to stderr \\u4e2d", file=sys.stderr)
    arguments.done.write_text("done")
    return arguments.code

run(main, OutputKind.LOG if "log" in sys.argv else OutputKind.REPORT)
"""


def _outlet_without_reader(kind: OutputKind | None) -> Outlet:
    reading, writing = os.pipe()
    os.close(reading)
    return Outlet(writing, kind)


def _full_outlet(kind: OutputKind | None) -> Outlet:
    return Outlet(os.open("/dev/full", os.O_WRONLY), kind)


@pytest.mark.parametrize("kind", [OutputKind.LOG, OutputKind.REPORT])
def test_work_goes_on_without_a_reader_and_says_so_once(kind: OutputKind, capsys: pytest.CaptureFixture[str]) -> None:
    outlet = _outlet_without_reader(kind)
    with io.TextIOWrapper(io.BufferedWriter(outlet), encoding="utf-8") as stream:
        for number in range(10_000):
            print(number, file=stream, flush=number % 1000 == 0)
    assert capsys.readouterr().err == "note: nobody reads standard output any more; the work goes on without it\n"
    assert outlet.loss() is None  # the program ends with the code of its work


def test_a_full_disk_is_no_loss_for_a_log_and_one_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    log, report = _full_outlet(OutputKind.LOG), _full_outlet(OutputKind.REPORT)
    assert log.write(b"abc") == 3 and report.write(b"abc") == 3 and report.write(b"abc") == 3
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 2
    assert log.loss() is None
    assert str(report.loss()).startswith("error[E601]: standard output could not be written: No space left on device")


def test_a_listing_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Vanished):
        _outlet_without_reader(OutputKind.LISTING).write(b"abc")
    outlet = _full_outlet(OutputKind.LISTING)
    with pytest.raises(DiskError):
        outlet.write(b"abc")
    assert outlet.write(b"left in the buffer") == 18  # the interpreter's last flush does not fail again
    assert capsys.readouterr().err == ""


def test_standard_error_fails_in_silence() -> None:
    outlet = _full_outlet(None)
    assert outlet.write(b"abc") == 3 and outlet.loss() is None
    assert outlet.failure is not None and outlet.failure.errno == errno.ENOSPC


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    content, taken = os.urandom(300_000), bytearray()

    def read() -> None:
        while len(taken) < len(content):
            taken.extend(os.read(reading, 4096))

    thread = threading.Thread(target=read)
    thread.start()
    with io.BufferedWriter(Outlet(writing, OutputKind.LOG)) as stream:
        stream.write(content)
    thread.join()
    assert taken == content


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def _shell(redirected: str, program: Path, *arguments: object, **environment: str) -> tuple[int, str]:
    """Exit code of the program (not of what reads it) and what is on the shell's stdout."""
    command = " ".join([sys.executable, str(program), *map(str, arguments)])
    done = subprocess.run(["bash", "-c", f"{command} {redirected}; exit ${{PIPESTATUS[0]}}"], text=True, timeout=60,
                          stdout=subprocess.PIPE, env={**os.environ, **environment}, check=False)  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "kind, redirected, code, complete",
    [
        ("log", "2>&1 | head -1", 7, True),
        ("report", "2>&1 | head -1", 7, True),
        ("listing", "2>&1 | head -1", 0, False),
        ("report", ">&- 2>&- <&-", 7, True),
        ("listing", "2>/dev/full", 7, True),
        ("listing", ">/dev/full 2>&1", 6, False),
        ("report", ">/dev/full 2>&1", 7, True),
    ],
)
def test_programs(kind: str, redirected: str, code: int, complete: bool, program: Path, tmp_path: Path) -> None:
    assert _shell(redirected, program, kind, tmp_path / "done", 7)[0] == code
    assert (tmp_path / "done").exists() == complete


def test_a_report_to_a_full_disk_ends_with_6_after_its_work(program: Path, tmp_path: Path) -> None:
    assert _shell(">/dev/full 2>&1", program, "report", tmp_path / "done")[0] == 6
    assert (tmp_path / "done").exists()


def test_help_without_a_reader_is_quiet(program: Path) -> None:
    code, shown = _shell("2>&1 >/dev/null | cat; true", program, "--help")
    assert (code, shown) == (0, "")
    code, shown = _shell("2>&1 | head -1", program, "--help")
    assert code == 0 and shown.startswith("usage") and shown.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8:strict"])
def test_any_encoding_will_do(encoding: str, program: Path, tmp_path: Path) -> None:
    code, shown = _shell("2>&1", program, "log", tmp_path / "done", PYTHONIOENCODING=encoding)
    assert code == 0 and json.loads(shown.splitlines()[0]) == "中\U0001f600"
    assert "\\udcff" in shown and "to stderr" in shown and ("中" in shown) == encoding.startswith("utf")


def test_a_file_opened_later_is_not_standard_output(tmp_path: Path) -> None:
    """Started without descriptors, a program must not write its messages into the first file that it opens."""
    code = (
        "from megatron_hammer.base.cli import run\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        import os; os.system('echo from a child; echo and another >&2')\n"
        "run(main)"
    )
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code], timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""


def test_sigpipe_stays_ignored() -> None:
    """What turns a vanished reader into an error that we can decide about, for threads of libraries too."""
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
