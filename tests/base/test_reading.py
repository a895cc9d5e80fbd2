"""Every file is opened by the guarded open, which refuses what is no regular file; no folder can run code."""

from __future__ import annotations

import ast
import json
import os
import random
import socket
from pathlib import Path

import pytest

from megatron_hammer.base import reading
from megatron_hammer.base.errors import ConfigError, DataError, HammerError, UnfitFile, from_os_error
from megatron_hammer.base.reading import (
    PLAIN_JSON_BYTES,
    is_own_pipe,
    open_input,
    open_regular,
    parse_json,
    read_regular,
)

ROOT = Path(__file__).parents[2]
PROGRAMS = [path for room in ("megatron_hammer", "tools") for path in sorted((ROOT / room).rglob("*.py"))]

READERS = {
    "read_text", "read_bytes", "os.open", "io.open", "open", "json.load", "np.load", "np.fromfile", "np.memmap",
    "torch.load", "gzip.open", "bz2.open", "lzma.open", "tarfile.open", "zipfile.ZipFile", "safe_open", "yaml.load",
    "pyarrow.parquet.ParquetFile", "gzip.decompress", "bz2.decompress", "pickle.load", "pickle.loads", "marshal.load",
}  # fmt: skip
REASONS = {
    ("base/reading.py", "os.open"): "the guarded open itself",
    ("base/reading.py", "open"): "of the guarded descriptor; a pipe that this process was given",
    ("base/files.py", "os.open"): "a folder, to sync it",
    ("base/locks.py", "os.open"): "a temporary file, to write it",
    ("base/streams.py", "os.open"): "/dev/null",
    ("base/system.py", "os.open"): "/proc: a descriptor that is open, once more; one of the first rank of the node",
    ("base/system.py", "read_bytes"): "/proc",
    ("base/system.py", "read_text"): "/proc",
    ("checkpoint/direct.py", "os.open"): "to write a new file",
    ("config/reading.py", "yaml.load"): "of a text, by a loader with limits",
    ("corpus/parquet.py", "pyarrow.parquet.ParquetFile"): "the library opens it; check_file comes before",
    ("corpus/quick_start.py", "zipfile.ZipFile"): "a wheel that pip has just fetched and checked",
    ("corpus/shuffle_partitions.py", "os.open"): "to write a temporary file",
    ("dataset/look/verify.py", "np.fromfile"): "a temporary file of this process",
    ("report/page.py", "read_text"): "style and script of the package itself",
    ("sampling/cache.py", "os.open"): "to write the file of a lock",
    (
        "train/output.py",
        "os.open",
    ): "the output folder; its lock: no link, a regular file",
    ("verify/nvidia.py", "read_text"): "/proc",
    ("verify/drill.py", "read_text"): "the same",
    ("verify/faults.py", "read_bytes"): "the same",
    ("verify/outcome.py", "np.load"): "of a file that the guarded open opened, without pickle",
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Calls by name: of a module's function with the module, of a method alone."""
    modules = {
        "os",
        "io",
        "json",
        "np",
        "torch",
        "gzip",
        "bz2",
        "lzma",
        "tarfile",
        "zipfile",
        "yaml",
        "pickle",
        "marshal",
    }
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if isinstance(node.func, ast.Attribute) and name.split(".")[0] not in modules | {"pyarrow"}:
            name = node.func.attr
        found.append((name, node))
    return found


def writes(name: str, call: ast.Call) -> bool:
    """Whether a call of ``open`` writes, or opens no file: a method without a mode."""
    method = isinstance(call.func, ast.Attribute)
    modes = [
        a.value for a in call.args[0 if method else 1 :] if isinstance(a, ast.Constant) and isinstance(a.value, str)
    ]
    if name != "open":
        return False
    if isinstance(call.args[1], ast.IfExp) if len(call.args) > 1 else False:
        return True
    return (method and not modes) or any(set(mode) & set("wxa+") for mode in modes[:1])


def test_nothing_is_read_around_the_guarded_open() -> None:
    found = set()
    for path in PROGRAMS:
        for name, call in calls(path):
            if name in READERS and not writes(name, call):
                found.add((path.relative_to(ROOT).as_posix().removeprefix("megatron_hammer/"), name))
    assert found == set(REASONS), "read by open_regular or read_regular (base/reading.py), or give a reason here"


def test_no_folder_of_a_model_runs_code() -> None:
    found = 0
    for path in [*PROGRAMS, *(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for name, call in calls(path):
            assert not (isinstance(call.func, ast.Name) and name in ("exec", "eval")), path
            if name == "from_pretrained":
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("trust_remote_code") == "False" and given.get("use_safetensors") == "True", path
                found += 1
    assert found >= 8


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for follow in (True, False):
        for name, why in (("endless", "device|link"), ("pipe", "pipe"), ("socket", "socket")):
            with pytest.raises(UnfitFile, match=why):
                open_regular(tmp_path / name, follow)
    server.close()
    assert read_regular(tmp_path / "link") == b"123" == read_regular(tmp_path / "file", 3, follow=False)
    with pytest.raises(UnfitFile, match="symbolic link"):
        read_regular(tmp_path / "link", follow=False)
    with pytest.raises(UnfitFile, match=r"3 bytes.* more than 2") as caught:
        read_regular(tmp_path / "file", 2)
    error = from_os_error(caught.value, "testing")
    assert isinstance(error, DataError) and error.code == "E399" and str(tmp_path / "file") in error.what
    for name in ("circle", "absent", "nul\0", ""):
        with pytest.raises(OSError):
            read_regular(str(tmp_path / name) if name else tmp_path)


def test_a_pipe_that_the_shell_made_is_an_input(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"text")
    os.close(writing)
    assert is_own_pipe(f"/dev/fd/{reading}") and not is_own_pipe(tmp_path)
    with open_input(f"/dev/fd/{reading}") as file:
        assert file.read() == b"text"
    os.close(reading)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        '{"a":' * 10_000,
        "[" + "[]," * 600_000 + "0]",
        "9" * 5_000,
        '{"a": -%s}' % ("9" * 251),
        "{",
        "\x00",
    ],
)
def test_a_json_bomb_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    with pytest.raises(ValueError):
        parse_json(text.encode())


def test_long_strings_are_a_value_error() -> None:
    """They cost a parser several times their bytes; a text of many values may be as long."""
    size = PLAIN_JSON_BYTES + 1_000
    for text in (
        '["%s"]' % ("x" * size),
        '["%s"]' % (r"\"," * (size // 3)),
        '["%s"]' % (r"\\" * size),
        "0." + "0" * size,
    ):
        for form in (text, text.encode()):
            with pytest.raises(ValueError, match="long strings"):
                parse_json(form)
    with pytest.raises(ValueError, match="UTF-8"):
        parse_json(('["%s"]' % ("x" * size)).encode("utf-16"))
    assert parse_json('["{}", {}]'.format("9" * 251, "9" * 250)) == ["9" * 251, int("9" * 250)]
    assert len(parse_json(b"[" + b'"sixteen letters.",' * (size // 18) + b"0]")) == size // 18 + 1


def test_what_stands_in_strings_has_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE_BYTES", 7)  # so that the ends of pieces fall anywhere
    draw = random.Random(1)
    for _ in range(300):
        strings = ["".join(draw.choices('\\",:[{ax', k=draw.randrange(9))) for _ in range(4)]
        value = {strings[0]: [strings[1], {strings[2]: [1, 2]}], "b" + strings[3]: []}
        weight = 2 * 3 + 3 * 2 + 3 + 3  # objects, arrays, colons, commas
        assert reading.weigh_outside_strings(json.dumps(value).encode()) == weight


def test_a_message_shows_the_ends_of_an_overlong_value() -> None:
    line = str(ConfigError(4, "a.b=" + "x" * 10**6 + "end", "must\x1b[2J be", "y" * 10**6))
    assert len(line) < 4_000 and line.startswith("error[E204]: a.b=xxx") and "end must\\x1b[2J be" in line
    assert "998,807 characters left out" in line


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    name = tmp_path / "a;$(touch x)\nb\x1b[31m"
    os.mkfifo(name)
    with pytest.raises(OSError) as caught:
        read_regular(name)
    line = str(from_os_error(caught.value, "testing"))
    assert isinstance(from_os_error(caught.value, "testing"), HammerError) and line.isprintable()
