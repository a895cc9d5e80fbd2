"""What a user pastes into a bug report: results of the self-test, versions, hardware and settings, and nothing private.

Of the machine the report says only what is listed here. Of a config it gives numbers and choices; texts and the keys of
mappings, which may be names and paths, are replaced by a word for what they are. Messages of failed parts go through
``Anonymiser``.
Needs no torch.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.files import replace_file
from megatron_hammer.base.progress import size_of
from megatron_hammer.base.reading import read_regular
from megatron_hammer.base.system import memory_bytes, processor_name, processor_text, usable_cores
from megatron_hammer.base.tables import markdown_table
from megatron_hammer.base.versions import installed_versions
from megatron_hammer.config import Config
from megatron_hammer.verify.anonymous import Anonymiser
from megatron_hammer.verify.golden import golden_config
from megatron_hammer.verify.selftest import PartResult, selftest_summary

HEADING = "# Self-test of megatron_hammer"
OPTIONAL = ("safetensors", "triton", "transformer-engine", "flash-attn", "liger-kernel", "nvidia-nccl-cu12",
            "nvidia-nccl-cu13", "protobuf", "pyarrow", "ray")  # fmt: skip
PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
TEXT, NAME = "(a text)", "(name {})"


def check_place(path: Path) -> None:
    """Raise before the work begins where the report cannot be written, or would replace something else.

    Raises:
        ConfigError: E201 another file is there.
        OSError: its folder cannot be written.
    """
    if path.is_dir() or (path.exists() and not read_regular(path).startswith(HEADING.encode())):
        raise ConfigError(
            1, f"--report {path}", "is there already, and is no report of the self-test", "name a new file"
        )
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".selftest-"):
        pass


def write_bug_report(path: Path, results: Sequence[PartResult], config: Config | None) -> None:
    """Write the report as Markdown, whole or not at all."""
    replace_file(path, bug_report_text(results, config).encode("utf-8"))


def bug_report_text(results: Sequence[PartResult], config: Config | None = None) -> str:
    """The whole text.

    Args:
        results: of the parts that were run.
        config: of the user's run, if it is to be in it.
    """
    private = Anonymiser()
    parts = []
    for result in results:
        word = f"FAILED ({result.exit_code})" if result.exit_code else result.word
        parts.append((result.name, word, f"{result.seconds:.1f}", private.text(result.found)))
    lines = [HEADING, "", selftest_summary(results), "", markdown_table(("part", "result", "seconds", "found"), parts)]
    for title, rows in (("Versions", versions()), ("Machine", machine(private))):
        lines += ["", f"## {title}", "", *(f"- {name}: {private.own(value)}" for name, value in rows)]
    configs = [("Config of the self-test", golden_config(Path("data"), Path("run")))]
    configs += [] if config is None else [("Config of the run", config)]
    for title, shown in configs:
        lines += ["", f"## {title}", "", "```yaml", *settings_lines(shown), "```"]
    for result in results:
        if result.exit_code:
            said = (private.text(line).replace("```", "'''") for line in result.output)
            lines += ["", f"## Output of {result.name}", "", "```", *said, "```"]
    return "\n".join(lines) + "\n"


# ---- versions and hardware -------------------------------------------------------------------------------------------


def versions() -> list[tuple[str, str]]:
    """Versions of Python and of the libraries that decide what is computed, where they are installed."""
    found = dict(installed_versions())
    for name in OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return [*found.items(), ("implementation", f"{platform.python_implementation()}, {platform.python_compiler()}")]


def machine(private: Anonymiser) -> list[tuple[str, str]]:
    """Operating system, processor, memory; and the doctor's rows on machine and environment."""
    from megatron_hammer.verify.doctor import examine

    libc = " ".join(platform.libc_ver()).strip()
    rows = [("system", f"{platform.system()} {platform.release()} {platform.machine()}{', ' * bool(libc)}{libc}")]
    rows += [("processor", _processor()), ("cores", _cores()), ("memory", _memory())]
    checks = (finding for finding in examine(None, 1, lambda text: None) if finding.status != "not applicable")
    return rows + [(finding.name, f"{finding.status}: {private.text(finding.found)}") for finding in checks]


def _processor() -> str:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", processor_text(), re.MULTILINE)
    present = set(flags[1].split()) if flags else set[str]()
    return ", ".join([processor_name(), *(flag for flag in PROCESSOR_FLAGS if flag in present)])


def _cores() -> str:
    return f"{usable_cores()} usable of {os.cpu_count()}"


def _memory() -> str:
    total, limit = memory_bytes()
    return size_of(total) if limit is None else f"{size_of(total)}, {size_of(limit)} for this container"


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_lines(config: Config) -> Iterator[str]:
    """Every setting that is not the default, as YAML, a group after the other."""
    for group in dataclasses.fields(config):
        chosen = getattr(config, group.name)
        hints = typing.get_type_hints(type(chosen))
        rows = [(f.name, getattr(chosen, f.name)) for f in dataclasses.fields(chosen)]
        default = {f.name: f.default for f in dataclasses.fields(chosen)}
        lines = [f"  {name}: {public(value, hints[name])}" for name, value in rows if value != default[name]]
        if lines:
            yield from (f"{group.name}:", *lines)


def public(value: Any, hint: Any) -> Any:
    """A value of a setting of this type, without its texts: of these only those that the type lists are left."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if value in _choices(hint) else TEXT
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return {f.name: public(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {NAME.format(number): public(each, hint) for number, each in enumerate(value.values(), start=1)}
    return [public(each, hint) for each in value]


def _choices(hint: Any) -> tuple[Any, ...]:
    """The texts that a type lists, however deep in it."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    inner = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else ()
    return tuple(choice for each in inner for choice in _choices(each))
