"""What other systems lack: asked for in one module only, with another way, or refused by name."""

from __future__ import annotations

import ast
import errno
import fcntl
import importlib
import json
import mmap
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_hammer.base import system
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import load_config
from megatron_hammer.train.prepare import check_system
from tests.faults.kills import ended, forked, needs_to_train_in_a_child

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hammer"
ASKED_THERE = PACKAGE / "base" / "system.py"
MODULES = ("errno", "fcntl", "mmap", "os", "resource", "select", "signal", "socket", "time")
LINUX_PATHS = ("/proc", "/sys/", "/dev/shm")
MAY_NAME_PATHS = {
    "base/paths.py": "folders that nobody means as an output, as text",
    "verify/doctor.py": "says what is wrong with /dev/shm, on Linux",
    "verify/nvidia.py": "a driver that Linux alone has; no file is no driver",
}


# ---- which names macOS lacks, by the stubs that mypy brings ----------------------------------------------------------


def _holds(test: ast.expr, platform: str) -> bool:
    """A condition on the system or the version, for a system and Python 3.12."""
    version = (3, 12)
    known = type("sys", (), {"platform": platform, "version_info": version})
    return bool(eval(compile(ast.Expression(test), "stub", "eval"), {"sys": known, "TYPE_CHECKING": True}))


def _defined(body: list[ast.stmt], platform: str) -> Iterator[str]:
    for node in body:
        match node:
            case ast.If():
                yield from _defined(node.body if _holds(node.test, platform) else node.orelse, platform)
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.AnnAssign(target=ast.Name(name)) | ast.Assign(targets=[ast.Name(name)]):
                yield name
            case ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in node.names)


@cache
def only_linux(module: str) -> frozenset[str]:
    """Names of a module of the standard library that Linux has and macOS has not."""
    stubs = Path(pytest.importorskip("mypy").__file__).parent / "typeshed" / "stdlib"
    found = next(path for path in (stubs / f"{module}.pyi", stubs / module / "__init__.pyi") if path.exists())
    body = ast.parse(found.read_text(encoding="utf-8")).body
    return frozenset(_defined(body, "linux")) - frozenset(_defined(body, "darwin"))


def linux_names(tree: ast.AST) -> Iterator[str]:
    """What of a module's text is Linux's alone, or asks the C library by itself."""
    described = {id(n.body[0].value) for n in ast.walk(tree)
                 if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
                 and n.body and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(module), attr=name) if module in MODULES and name in only_linux(module):
                yield f"{module}.{name}"
            case ast.Attribute(value=ast.Name("ctypes"), attr="CDLL"):
                yield "ctypes.CDLL"
            case ast.ImportFrom(module=module) if module in MODULES:
                yield from (f"{module}.{a.name}" for a in node.names if a.name in only_linux(str(module)))
            case ast.Constant(value=str(text)) if id(node) not in described and text.startswith(LINUX_PATHS):
                yield text


def test_only_one_module_asks_for_what_macos_lacks() -> None:
    assert {"memfd_create", "sched_getaffinity", "O_DIRECT", "posix_fallocate", "fdatasync"} <= only_linux("os")
    words, found = {name for module in MODULES for name in only_linux(module)} | {"CDLL"}, {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        worth_parsing = words.intersection(re.findall(r"\w+", text)) or any(part in text for part in LINUX_PATHS)
        names = set(linux_names(ast.parse(text))) if worth_parsing else set[str]()
        if str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT)) in MAY_NAME_PATHS:
            names = {name for name in names if not name.startswith("/")}
        if names and path != ASKED_THERE:
            found[str(path.relative_to(ROOT))] = sorted(names)
    assert found == {}, "ask megatron_hammer/base/system.py instead"
    assert set(linux_names(ast.parse("import os\nos.memfd_create('x')\nopen('/proc/self/maps')"))) == {
        "os.memfd_create", "/proc/self/maps"}  # fmt: skip


# ---- a system without them -------------------------------------------------------------------------------------------


def become_a_mac() -> None:
    """From now on this process has none of what macOS lacks. What libraries have loaded before stays."""
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron_hammer"]:
        del sys.modules[name]
    sys.platform = "darwin"
    for module in ("os", "fcntl", "mmap", "resource", "signal"):
        for name in only_linux(module):
            if hasattr(sys.modules[module], name):
                delattr(sys.modules[module], name)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(LINUX_PATHS):
            raise FileNotFoundError(errno.ENOENT, "macOS has no such path", str(arguments[0]))
        if event == "ctypes.dlsym" and arguments[1] in ("prctl", "mremap"):
            raise AttributeError(f"macOS has no {arguments[1]}")

    sys.addaudithook(refuse)


def program(*words: object) -> None:
    """Run a program in this process; its failure is an ``AssertionError``."""
    sys.argv = [str(word) for word in words]
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (sys.argv, end.code)


def from_text_to_export(folder: Path) -> int:
    """A tokenizer, a dataset, two steps, two more after a resume, an export that is proved."""
    become_a_mac()
    from megatron_hammer.base import system as there

    assert not there.IS_LINUX and there.usable_cores() >= 1 and there.peak_resident_bytes() > 2**10  # of KiB, here
    sys.path.insert(0, str(ROOT / "tools"))
    texts = folder / "texts.jsonl"
    lines = [f"the {n % 7} quick brown foxes jump over {n} lazy dogs, 狐狸跳过{n % 11}只狗。" * 3 for n in range(200)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tools, tokenizer, data = ROOT / "tools", folder / "t.model", folder / "data"
    program(tools / "train_tokenizer.py", "--input", texts, "--output", tokenizer, "--vocab-size", 350)
    program(tools / "preprocess_data.py", "--input", texts, "--tokenizer-model", tokenizer, "--output-prefix", data,
            "--append-eod", "--workers", 2)  # fmt: skip
    run = ["megatron_hammer.train", ROOT / "examples" / "configs" / "tiny.yaml", f"data.train={data}_text_document",
           f"tokenizer.path={tokenizer}", f"train.output={folder / 'run'}", "data.seq_length=16", "train.device=cpu",
           "checkpoint.save_interval_steps=2", "log.tensorboard=false", "train.global_batch_size=2"]  # fmt: skip
    program(*run, "train.num_steps=2")
    program(*run, "train.num_steps=4", "--accept", "train.num_steps")
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    from megatron_hammer.huggingface.certificate import prove
    from megatron_hammer.huggingface.export import export_hf

    certificate = export_hf(folder / "run", folder / "hf", prove=prove)
    return 0 if max(steps) == 4 and certificate["step"] == 4 else 98


def test_from_text_to_export_without_what_macos_lacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needs_to_train_in_a_child()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    assert only_linux("os")  # read before the fork
    for name in ("fcntl", "mmap", "resource", "signal"):
        only_linux(name)
    said = ended(forked(lambda: from_text_to_export(tmp_path)))
    assert said == 0, capfd.readouterr().err[-3000:]


# ---- the other ways, one by one --------------------------------------------------------------------------------------


def _without(patch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> None:
    for name in names:
        patch.delattr(module, name)


def test_files_and_memory_without_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    _without(monkeypatch, os, "memfd_create", "posix_fallocate", "posix_fadvise", "O_DIRECT", "preadv")
    _without(monkeypatch, mmap, "MAP_POPULATE")
    monkeypatch.setattr(os, "fsync", synced.append)
    descriptor = system.shared_memory_file("hammer test")
    memory = system.take_memory(descriptor, 8192)
    memory[:3] = b"abc"
    assert os.pread(descriptor, 3, 0) == b"abc" and os.fstat(descriptor).st_nlink == 0
    room = bytearray(8)
    assert system.read_at(descriptor, memoryview(room), 1) == 8 and room[:2] == b"bc"
    assert not system.set_direct(descriptor) and system.open_direct(descriptor) is None
    system.begin_to_write_out(descriptor, 0, 10)
    system.sync(descriptor)
    assert synced == [descriptor]
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda number, what, *value: asked.append((what, *value)))  # type: ignore[arg-type]
    system.sync(descriptor)
    assert system.set_direct(descriptor)
    assert asked == [(51,), (48, 1)] and synced == [descriptor]  # F_FULLFSYNC in the place of fsync
    os.close(descriptor)


@pytest.mark.parametrize("number, ends", [(errno.ENOTSUP, True), (errno.EIO, False)])
def test_sync_on_a_network_file_system_of_macos(number: int, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    synced: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    if ends:
        system.sync(7)
        assert synced == [7]
    else:
        with pytest.raises(OSError):
            system.sync(7)


def test_processes_by_ps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = system.find_process(os.getpid())
    assert ours is not None and ours.parent == os.getppid() and ours.state == "R"
    assert system.find_process(2**22 + 1) is None and system.parents()[os.getpid()] == os.getppid()
    monkeypatch.setattr(system, "_PROCESSES", tmp_path / "absent")
    one = "state=,ppid=,time=,lstart"
    told = {one: "S+    1   0:01.52 Mon Nov 30 00:01:02 2026    \n", "pid=,ppid": "  7 1\n 8 7\n", "rss": "  2048\n"}
    monkeypatch.setattr(system, "_ps", lambda columns, pid: told[columns])
    process = system.find_process(7)
    assert process == system.Process("S", 1, 1.52, "Mon Nov 30 00:01:02 2026")
    assert system.parents() == {7: 1, 8: 7} and system.resident_bytes() == 2**21
    assert system.peak_resident_bytes() > 2**20 and system.wait_channel(7) == "" and system.command_of(7) == b""
    told[one] = ""
    assert system.find_process(9) is None


def test_a_process_ends_with_its_parent_without_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child of a child: its parent ends, and the thread sees it."""
    reading, writing = os.pipe()

    def parent() -> int:
        monkeypatch.setattr(system, "IS_LINUX", False)
        monkeypatch.setattr(system, "PARENT_SECONDS", 0.02)
        ready, told = os.pipe()
        here = os.getpid()
        if os.fork() == 0:
            system.die_with_parent(here)
            os.write(told, b"x")
            signal.pause()
        os.read(ready, 1)
        return 0

    assert ended(forked(parent)) == 0
    os.close(writing)
    assert os.read(reading, 1) == b""  # the grandchild, the last that could write, has gone
    os.close(reading)


# ---- what has no other way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting, ranks, names", [
    ("checkpoint.mode=background", 1, ("checkpoint.mode=background", "memfd_create", "checkpoint.mode=blocking")),
    ("checkpoint.mode=blocking", 2, ("2 ranks", "parent-death signal", "WSL2")),
])  # fmt: skip
def test_what_cannot_run_elsewhere_says_so(
    setting: str, ranks: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(ROOT / "examples" / "configs" / "tiny.yaml", [setting])
    check_system(config, ranks)
    monkeypatch.setattr(system, "IS_LINUX", False)
    with pytest.raises(ConfigError, match="E292") as raised:
        check_system(config, ranks)
    assert all(name in str(raised.value) for name in (*names, "cannot run on", "Linux alone has"))
    check_system(load_config(ROOT / "examples" / "configs" / "tiny.yaml", [setting, "train.dry_run=true"]), ranks)


@pytest.mark.parametrize("words, raised", [(["-m"], SystemExit), ([r"C:\venv\Scripts\hammer.exe", "train"], SystemExit),
                                           (["notebook"], ImportError)])  # fmt: skip
def test_windows_is_refused_in_one_line(
    words: list[str], raised: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(raised) as seen:
        exec(compile((PACKAGE / "__init__.py").read_text(encoding="utf-8"), "__init__.py", "exec"), {})
    said = capsys.readouterr().err if raised is SystemExit else str(seen.value)
    assert said.startswith("error[E292]") and "WSL2" in said and said.strip().count("\n") == 0


def test_programs_refuse_windows_in_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    obstacle: Callable[[], str | None] = importlib.import_module("require_package").obstacle
    assert obstacle() is None
    monkeypatch.setattr(sys, "platform", "win32")
    said = str(obstacle())
    assert said.startswith("error[E292]") and "WSL2" in said and "\n" not in said


def test_flags_of_the_compiler_by_system() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    flags: Callable[..., tuple[list[str], list[str]]] = script["openmp_flags"]
    assert flags("linux", None) == (["-fopenmp"], ["-fopenmp"])
    assert flags("darwin", None) == (["-Wno-unknown-pragmas"], [])
    compiled, linked = flags("darwin", "/opt/homebrew/opt/libomp")
    assert compiled == ["-Xpreprocessor", "-fopenmp", "-I/opt/homebrew/opt/libomp/include"]
    assert linked == ["-L/opt/homebrew/opt/libomp/lib", "-lomp", "-Wl,-rpath,/opt/homebrew/opt/libomp/lib"]
    for extension in script["EXTENSIONS"]:
        assert "-fopenmp" in extension.extra_compile_args or "native" not in extension.name
