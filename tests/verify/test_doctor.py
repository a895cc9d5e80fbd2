"""The doctor names what would stop a run, goes on after a failure, and ends with the exit code that the run would."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_hammer.base.versions import installed_versions
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.train.prepare import Prepared
from megatron_hammer.verify import doctor, nvidia
from megatron_hammer.verify.doctor import CheckResult, checks_to_tree, doctor_exit_code, examine, format_findings

MODEL = {"hidden_size": 16, "ffn_hidden_size": 24, "num_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def config_of(folder: Path, **data: object) -> Config:
    tree = {"model": MODEL, "train": {"output": str(folder / "run")}, "data": {"seq_length": 16, **data}}
    return config_from_tree(tree)


def rows(config: Config | None) -> dict[str, CheckResult]:
    return {finding.name: finding for finding in examine(config, 1, lambda text: None)}


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_steps", lambda *rest: ("ok", "", ""))


def test_without_a_config_the_machine_alone() -> None:
    found = rows(None)
    assert found["ports"].status == "ok" and found["disk"].status == "not applicable"
    assert doctor_exit_code(list(found.values())) == 0 and "two dry steps" not in found
    assert json.loads(json.dumps(checks_to_tree(list(found.values()))))["exit_code"] == 0


def test_two_dry_steps_are_taken(tmp_path: Path) -> None:
    found = rows(config_of(tmp_path))
    assert found["two dry steps"].status == "ok" and "losses" in found["two dry steps"].found
    assert found["settings"].exit_code == 2 and "E207" in found["settings"].found  # no data.train: and it went on
    lines = format_findings(list(found.values()))
    assert lines[-1].startswith("1 failed") and any("-> name the prefix" in line for line in lines)


def test_a_damaged_dataset_fails_with_the_codes_of_data(tmp_path: Path, no_steps: None) -> None:
    prefix = tmp_path / "p"
    with IndexedWriter(prefix, 50) as writer:
        writer.add(np.arange(400, dtype=np.uint16) % 50, np.full(40, 10))
    config = config_of(tmp_path, train={str(prefix): 1})
    assert rows(config)["p"].status == "ok"
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[100] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    found = rows(config)
    assert found["p"].status == "failed" and found["p"].exit_code == 3 and found["resume"].found


def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path: Path, no_steps: None) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    found = rows(config_of(tmp_path))
    assert found["step-00000010"].exit_code == 4 == found["resume"].exit_code
    assert "all damaged" in found["resume"].found


def test_other_versions_than_the_checkpoints_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = installed_versions() | {"torch": "1.0"}
    monkeypatch.setattr(doctor, "find_checkpoints", lambda folder: [Path("step-00000010")])
    monkeypatch.setattr(doctor, "read_manifest", lambda path: SimpleNamespace(state={"versions": then}))
    status, found, _ = doctor._versions(config_of(tmp_path))
    assert status == "warning" and f"torch 1.0 -> {installed_versions()['torch']}" in found and "numpy" not in found
    then["torch"] = installed_versions()["torch"]
    assert doctor._versions(config_of(tmp_path))[0] == "ok"


def test_checkpoints_remember_the_versions(tmp_path: Path) -> None:
    prepared = Prepared(config_of(tmp_path), None, None, None, [], [])
    assert prepared.to_state()["versions"] == installed_versions()
    assert {"python", "torch", "numpy"} <= set(installed_versions())


def test_a_disk_too_small_for_the_planned_checkpoints(
    tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(f_bavail=1, f_frsize=4096, f_favail=10, f_files=10)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    found = rows(config_of(tmp_path))
    assert found["disk"].status == "failed" and found["disk"].exit_code == 6 and "4.10 KB" in found["disk"].found
    long = replace(found["disk"], name="zh.valid_text_document")
    lines = doctor.format_findings([found["disk"], long])
    assert "document  4.10 KB" in lines[3] and lines[1].index("4.10") == lines[3].index("4.10") == lines[2].index("->")


def test_a_loss_that_is_not_finite_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = SimpleNamespace(losses=[1.0, math.nan], norms=[1.0, 1.0])
    monkeypatch.setattr("megatron_hammer.verify.steps.take_steps", lambda *rest: outcome)
    found = rows(config_of(tmp_path))["two dry steps"]
    assert found.status == "failed" and found.exit_code == 9


def test_compiled_parts_and_backends_have_their_rows(tmp_path: Path, no_steps: None) -> None:
    found = rows(config_of(tmp_path))
    for part in ("index builder", "tokenizer", "CPU kernels", "file maps", "state digest"):
        assert f"{part} built" in found["compiled parts"].found or f"{part} missing" in found["compiled parts"].found
    assert re.match(r"on \w+: .*attention \w+", found["backends"].found), found["backends"].found


def test_a_backend_that_cannot_run_here_fails_as_the_run_would(tmp_path: Path, no_steps: None) -> None:
    config = config_of(tmp_path)
    config = replace(config, kernels=replace(config.kernels, attention="flash-attn-3"))
    if not torch.cuda.is_available():
        assert rows(config)["backends"].exit_code == 2


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        ("550.54.14", "12.4", None), ("525.60.13", "12.8", None), ("470.82.01", "12.1", "older than 525.60.13"),
        ("570.86.10", "13.0", "older than 580,"), ("580.65.06", "13.2", None),
        (None, "12.1", "no driver"), ("470.82.01", "99.0", None),
    ],
)  # fmt: skip
def test_a_driver_too_old_for_the_cuda_of_torch(driver: str | None, cuda: str, words: str | None) -> None:
    fault = nvidia.driver_fault(driver, cuda)
    assert fault is None if words is None else words in str(fault)


def test_driver_and_nccl_are_read_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n",
                 "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\n"):  # fmt: skip
        (tmp_path / "version").write_text(text)
        assert nvidia.driver_version(tmp_path / "version") == "550.54.14"
    assert nvidia.driver_version(tmp_path / "absent") is None
    monkeypatch.setattr(nvidia.metadata, "requires", lambda name: ["numpy", "nvidia-nccl-cu12==2.21.5; platform"])
    assert nvidia.nccl_fault((2, 21, 5)) is None and "2.21.5" in str(nvidia.nccl_fault((2, 18, 1)))
    monkeypatch.setattr(nvidia.metadata, "requires", lambda name: None)
    assert nvidia.nccl_fault((2, 18, 1)) is None


def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins: two GPUs, an old driver, another NCCL, none."""
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    stands = {"is_available": lambda: True, "device_count": lambda: 2, "get_device_name": lambda i: "H100"}
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 21, 5))
    monkeypatch.setattr(doctor, "driver_version", lambda: "550.54.14")
    monkeypatch.setattr(nvidia.metadata, "requires", lambda name: ["nvidia-nccl-cu12==2.21.5"])
    assert doctor._gpu() == ("ok", "2 x H100, driver 550.54.14, CUDA 12.4, NCCL 2.21.5", "")
    monkeypatch.setattr(doctor, "driver_version", lambda: None)  # as under WSL, whose driver is that of Windows
    assert doctor._gpu() == ("ok", "2 x H100, driver unknown, CUDA 12.4, NCCL 2.21.5", "")
    monkeypatch.setattr(nvidia.metadata, "requires", lambda name: ["nvidia-nccl-cu12==2.26.2"])
    assert doctor._gpu()[0] == "warning" and "2.26.2" in doctor._gpu()[1]
    monkeypatch.setattr(doctor, "driver_version", lambda: "470.82.01")
    assert "older than 525.60.13" in doctor._gpu()[1] and "newer driver" in doctor._gpu()[2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU: the driver 470.82.01 is older" in doctor._gpu()[1]
