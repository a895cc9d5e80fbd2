"""Checks machine, environment, data and checkpoints before a run for whatever would stop or harm it.

``tools/doctor.py`` prints the results. A check gives one row: ok, warning, failed or not applicable, with what was
found and what to do. A check that raises one of our errors has failed; the doctor goes on. Nothing is written but a
probe in the output's file system, and nothing of a run is changed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.base.errors import HammerError, from_exception
from megatron_hammer.base.progress import size_of
from megatron_hammer.base.system import IS_LINUX
from megatron_hammer.base.versions import installed_versions
from megatron_hammer.checkpoint.folder import find_checkpoints
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.space import checkpoint_bytes
from megatron_hammer.config import Config
from megatron_hammer.dataset.look.verify import verify_dataset
from megatron_hammer.train.past_sources import past_sources
from megatron_hammer.train.prepare import VERSIONS, checkpoints_folder, find_starting_point, look_at_inputs, settle
from megatron_hammer.verify.nvidia import driver_fault, driver_version, nccl_fault

Status = Literal["ok", "warning", "failed", "not applicable"]
FEW_FILES, FEW_PROCESSES = 1024, 512  # below: loaders, stores and libraries of a rank may not find enough
SHARED_BYTES = 64 * 2**20  # what Docker gives by default; NCCL and data workers want more
SMALL_VOCABULARY = 1024  # of a dry step
EARLIEST = time.mktime((2025, 1, 1, 0, 0, 0, 0, 0, 0))  # a clock before it is wrong


@dataclass(frozen=True)
class CheckResult:
    """What a check found: one row of the report."""

    group: str
    name: str
    status: Status
    found: str
    remedy: str = ""
    exit_code: int = 0
    """Of the error that a run would end with; 0 unless ``failed``."""


_CODES = {"disk": 6, "two dry steps": 9}
"""Exit codes of the checks that judge by themselves and raise no error."""
Verdict = tuple[Status, str, str]  # status, what was found, what to do
Check = tuple[str, str, Callable[[], Verdict]]


def examine(config: Config | None, world_size: int, note: Callable[[str], None]) -> Iterator[CheckResult]:
    """All checks in order, each as a row when it is done.

    Args:
        config: of the run; None: only the machine and the environment are looked at.
        world_size: ranks of the run.
        note: called with a line on what is being done, where it may take long.
    """
    for group, name, check in _checks(config, world_size, note):
        try:
            status, found, remedy = check()
            yield CheckResult(group, name, status, found, remedy, _CODES[name] if status == "failed" else 0)
        except Exception as error:
            known = from_exception(error, f"the check of {name}")
            if known is None:
                raise
            yield CheckResult(group, name, "failed", f"[{known.code}] {known.what} {known.rule}", known.remedy,
                          known.exit_code)  # fmt: skip


def doctor_exit_code(findings: Sequence[CheckResult]) -> int:
    """The exit code of the first failure, as the run would end with it; 0 where nothing failed."""
    return next((finding.exit_code for finding in findings if finding.status == "failed"), 0)


def format_findings(findings: Sequence[CheckResult]) -> list[str]:
    """The rows as lines, each with its remedy below where there is one, and a verdict."""
    lines, group = [], ""
    width = max([16, *(len(finding.name) for finding in findings)]) + 2
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines.append(group)
        lines.append(f"  {finding.status:15}{finding.name:{width}}{' '.join(finding.found.split())}")
        if finding.remedy and finding.status in ("warning", "failed"):
            lines.append(f"{'':{17 + width}}-> {finding.remedy}")
    count = {status: sum(f.status == status for f in findings) for status in ("failed", "warning")}
    warnings = "warning" if count["warning"] == 1 else "warnings"
    lines.append(f"{count['failed']} failed, {count['warning']} {warnings} of {len(findings)} checks")
    return lines


def checks_to_tree(findings: Sequence[CheckResult]) -> dict[str, Any]:
    """The rows as JSON values."""
    return {"exit_code": doctor_exit_code(findings), "checks": [asdict(finding) for finding in findings]}


def _checks(config: Config | None, world_size: int, note: Callable[[str], None]) -> list[Check]:
    none: Verdict = ("not applicable", "no config was given", "")
    checks: list[Check] = [
        ("machine", "ports", _ports),
        ("machine", "limits", _limits),
        ("machine", "shared memory", _shared_memory),
        ("machine", "clock", _clock),
        ("machine", "GPU", _gpu),
        ("machine", "disk", lambda: none if config is None else _disk(config)),
        ("environment", "compiled parts", _compiled),
        ("environment", "backends", lambda: none if config is None else _backends(config)),
        ("environment", "versions", lambda: none if config is None else _versions(config)),
        ("data", "settings", lambda: none if config is None else _settings(config, world_size)),
    ]
    if config is None:
        return checks
    prefixes = dict.fromkeys([*config.data.train_prefixes, *(config.data.valid or {}).values()])
    checks += [("data", Path(prefix).name, partial(_dataset, config, prefix)) for prefix in prefixes]
    with contextlib.suppress(OSError):
        folders = find_checkpoints(checkpoints_folder(config))
        checks += [("checkpoints", folder.name, partial(_checkpoint, folder)) for folder in folders]
    checks.append(("checkpoints", "resume", lambda: _resume(config, world_size)))
    checks.append(("steps", "two dry steps", lambda: _steps(config, world_size, note)))
    return checks


# ---- the machine ----------------------------------------------------------------------------------------------------


def _ports() -> Verdict:
    """Whether ranks can meet: a socket on loopback that takes a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5):
            pass
        return "ok", f"loopback takes connections (tried port {server.getsockname()[1]})", ""


def _limits() -> Verdict:
    files, processes = (resource.getrlimit(which) for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    shown = [("open files", files[1], "ulimit -n"), ("processes", processes[0], "ulimit -u")]
    found = ", ".join(f"{name} {'unlimited' if limit < 0 else f'{limit:,}'}" for name, limit, _ in shown)
    for (_, limit, command), least in zip(shown, (FEW_FILES, FEW_PROCESSES), strict=True):
        if 0 <= limit < least:
            return "warning", found, f"raise {command} to {least:,} or more"
    if size >= 0:
        return "warning", f"{found}, file size {size_of(size)}", "raise ulimit -f: a checkpoint may be larger"
    return "ok", found, ""


def _shared_memory() -> Verdict:
    if not IS_LINUX:
        return "not applicable", "for several ranks, which Linux alone runs", ""
    if not os.path.isdir("/dev/shm"):
        return "warning", "/dev/shm is not there", "mount a tmpfs there: NCCL and heartbeats use it"
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    if free <= SHARED_BYTES:
        return "warning", f"{size_of(free)} free in /dev/shm", "give the container more: docker run --shm-size=8g"
    return "ok", f"{size_of(free)} free in /dev/shm", ""


def _clock() -> Verdict:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < EARLIEST:
        return "warning", shown, "set the clock: names and times of runs come from it"
    return "ok", shown, ""


def _gpu() -> Verdict:
    import torch

    if torch.version.cuda is None:
        return "not applicable", f"torch {torch.__version__} is built for CPUs", ""
    driver = driver_version()
    fault = driver_fault(driver, torch.version.cuda)
    if not torch.cuda.is_available():
        found = f"torch is built for CUDA {torch.version.cuda}, but sees no GPU{f': {fault}' if fault else ''}"
        return "warning", found, "see nvidia-smi: the driver must be there and new enough for this CUDA"
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    found = f"{torch.cuda.device_count()} x {names}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    nccl: tuple[int, ...] = ()
    with contextlib.suppress(RuntimeError, AttributeError):  # a build without it
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    if not nccl:
        return "warning", f"{found}, no NCCL", "use a build of torch with NCCL for several GPUs"
    found += f", NCCL {'.'.join(map(str, nccl))}"
    if driver is not None and fault is not None:  # a driver outside of a container or of WSL has no file here
        return "warning", f"{found}; {fault}", "install a newer driver, or a torch that is built for an older CUDA"
    if (other := nccl_fault(nccl)) is not None:
        return "warning", f"{found}; {other}", "take other libraries of NCCL out of LD_LIBRARY_PATH and LD_PRELOAD"
    return "ok", found, ""


def _disk(config: Config) -> Verdict:
    """Space and inodes against the checkpoints that are kept and the one that is written beside them."""
    from megatron_hammer.tokenizer.load import load_tokenizer, with_vocab_size

    place = Path(config.train.output).absolute()
    while not place.exists():
        place = place.parent
    with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-"):  # can it be written at all
        status = os.statvfs(place)
    free, inodes = status.f_bavail * status.f_frsize, status.f_favail
    found = f"{size_of(free)} and {inodes:,} inodes free in {place}"
    with contextlib.suppress(HammerError):  # what is wrong with the tokenizer is said where data are looked at
        if config.model.vocab_size is None and config.tokenizer.path is not None:
            config = with_vocab_size(config, load_tokenizer(config.tokenizer.path))
    if config.model.vocab_size is None:
        return "ok", f"{found}; what checkpoints need is not known without a tokenizer", ""
    kept = len(find_checkpoints(checkpoints_folder(config)))
    each = checkpoint_bytes(config.model, dict.fromkeys(STATE_KINDS, 4), config.optimizer.style)  # all in fp32
    needed = each * max(config.checkpoint.keep_last + 1 - kept, 1)
    planned = f"{config.checkpoint.keep_last} checkpoints of {size_of(each)} and one in the making"
    found += f"; {planned}: {size_of(needed)} more"
    if free < needed:
        return "failed", found, "free space there, lower checkpoint.keep_last, or set train.output to another disk"
    if status.f_files and inodes < 1000:
        return "warning", found, "remove small files there: a checkpoint has a file for each rank"
    return "ok", found, ""


# ---- the environment ------------------------------------------------------------------------------------------------


def _compiled() -> Verdict:
    from megatron_hammer.base import mapping
    from megatron_hammer.checkpoint import one_pass
    from megatron_hammer.kernels.native import cpu, cuda
    from megatron_hammer.sampling import index_builder
    from megatron_hammer.tokenizer import encode

    parts = {
        "index builder": index_builder.BACKEND == "C++",
        "tokenizer": encode.COMPILED is not None,
        "CPU kernels": cpu.COMPILED is not None,
        "file maps": mapping.BACKEND == "C++",
        "state digest": one_pass.BACKEND == "C++",
    }
    found = ", ".join(f"{name} {'built' if built else 'missing'}" for name, built in parts.items())
    found += f", CUDA kernels {'built' if cuda.LIBRARY.exists() else 'not built'}"
    if not all(parts.values()):
        return "warning", found, "build them: pip install -e . (Python code does their work, slower)"
    return "ok", found, ""


def _backends(config: Config) -> Verdict:
    """What will run each operation on this machine, and what was asked for by name and cannot."""
    import torch

    from megatron_hammer.kernels.report import missing_kernels
    from megatron_hammer.kernels.selection import kernel_requirements, select_backends

    required = kernel_requirements(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = select_backends(config.kernels, required)
    found = f"on {required.device.type}: " + ", ".join(f"{name} {backend.name}" for name, backend in chosen.items())
    if warning := missing_kernels(config.kernels, required):
        return "warning", found, " ".join(warning.split())
    return "ok", found, ""


def _versions(config: Config) -> Verdict:
    """Installed versions against those that the newest checkpoint was written with."""
    here = installed_versions()
    shown = ", ".join(f"{name} {version}" for name, version in here.items())
    folders = find_checkpoints(checkpoints_folder(config))
    then = read_manifest(folders[-1]).state.get(VERSIONS) if folders else None
    if not isinstance(then, dict):
        return "ok", f"{shown}; no checkpoint says with what it was made", ""
    changed = [
        f"{name} {then.get(name, 'absent')} -> {here.get(name, 'absent')}"
        for name in sorted({*then, *here})
        if then.get(name) != here.get(name)
    ]
    if changed:
        found = f"changed since {folders[-1].name}: {', '.join(changed)}"
        return "warning", found, "losses may differ from here on: install the versions of before, or know of the change"
    return "ok", f"as in {folders[-1].name}: {shown}", ""


# ---- data, checkpoints, steps ---------------------------------------------------------------------------------------


def _settings(config: Config, world_size: int) -> Verdict:
    inputs = look_at_inputs(config, world_size)
    found = f"config, tokenizer and datasets fit each other on {world_size} rank{'s' if world_size > 1 else ''}"
    notes = inputs.notes + inputs.data_notes
    return ("warning", "; ".join(notes), "see whether this is meant") if notes else ("ok", found, "")


def _dataset(config: Config, prefix: str) -> Verdict:
    from megatron_hammer.tokenizer.load import load_tokenizer

    if prefix in past_sources(config):
        return "not applicable", "not there; only phases that are past draw from it", ""
    tokenizer = None if config.tokenizer.path is None else load_tokenizer(config.tokenizer.path)
    report = verify_dataset(prefix, tokenizer)
    report.raise_if_unsound()
    return "ok", f"{report.facts['tokens']:,} tokens in {report.facts['documents']:,} documents, all hashes right", ""


def _checkpoint(folder: Path) -> Verdict:
    manifest = read_manifest(folder)
    verify_checkpoint(manifest)
    return "ok", f"step {manifest.step}: every byte is as it was saved", ""


def _resume(config: Config, world_size: int) -> Verdict:
    """What a start of this run would go on from, and why."""
    start = find_starting_point(config)
    passed = "".join(f"; {d.path.name} is passed over: {d.reason}" for d in start.damaged)
    if start.resume is None:
        source = "new weights" if start.init_from is None else f"the weights of {start.init_from.folder}"
        return ("warning" if passed else "ok"), f"no checkpoint of this run: it would start from {source}{passed}", ""
    settle(look_at_inputs(config, world_size, check_data=False), start)
    found = f"would go on from {start.resume.folder.name}, the newest that is intact"
    if passed:
        return "warning", f"{found}{passed}", f"it costs {start.damaged[0].step - start.resume.step} steps"
    return "ok", found, ""


def _steps(config: Config, world_size: int, note: Callable[[str], None]) -> Verdict:
    """Two steps of the config, made small, on one process in fp32."""
    import math

    import torch

    from megatron_hammer.parallel.context import ParallelContext
    from megatron_hammer.verify.shrink import alone, shrink
    from megatron_hammer.verify.steps import take_steps

    note("two dry steps of a small model")
    if config.model.vocab_size is None:  # that of a tokenizer, which has a row of its own
        config = replace(config, model=replace(config.model, vocab_size=SMALL_VOCABULARY))
    small, _ = shrink(config, world_size)
    outcome = take_steps(alone(small), ParallelContext.single(), torch.float32)
    found = f"losses {', '.join(f'{loss:.4f}' for loss in outcome.losses)} (the config made small, one process, fp32)"
    if not all(map(math.isfinite, outcome.losses + outcome.norms)):
        return "failed", found, "look at optimizer.lr and model.init_std"
    return "ok", found, ""
