"""The drill: what it plans, what it sees as different or left over; the whole of it stands behind ``slow``."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.config import to_yaml
from megatron_hammer.verify import drill, faults
from megatron_hammer.verify.faults import KILLS, OTHERS, DrilledRun
from tests.model.tiny import tiny_config
from tests.train.runs import ROOT, TINY, overrides, train_here, write_dataset


def test_every_fault_has_its_turn_and_none_comes_too_early() -> None:
    for seed in range(50):
        plan = drill.plan_faults(6, random.Random(seed))
        assert len(plan) == 10 and set(plan) == {*KILLS, *OTHERS}
        assert not plan[0].before_start
    assert drill.plan_faults(3, random.Random(1)) == drill.plan_faults(3, random.Random(1))


def test_the_small_config_keeps_what_is_drilled(tmp_path: Path) -> None:
    config = tiny_config(parallel__tensor_model_parallel_size=2, checkpoint__fallback=False, model__vocab_size=1001)
    small, left_out = drill.small_config(config, 4, tmp_path, 8)
    small.validate(4)
    assert small.parallel.tensor_model_parallel_size == 2 and not small.checkpoint.fallback and left_out == []
    assert (tmp_path / "train.idx").exists() and small.data.train == {str(tmp_path / "train"): 1.0}
    assert "fallback: false" in to_yaml(small)
    assert drill.smallest_world(config) == 2
    assert drill.smallest_world(tiny_config(parallel__tensor_model_parallel_size=4)) == 4


def test_a_difference_is_named(tmp_path: Path) -> None:
    data = tmp_path
    for seed, name in enumerate("abxy"):
        write_dataset(data / name, 20, seed)
    peace, drilled = tmp_path / "undisturbed", tmp_path / "drilled"
    train_here(0, overrides(data, peace, "train.num_steps=3"))
    shutil.copytree(peace, drilled)
    assert list(drill.run_differences(peace, drilled)) == []
    metrics = drilled / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[0]["tokens_per_second"] = 1.0
    lines[1]["loss"] += 1e-9
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(drill.run_differences(peace, drilled)) == ["step 2: loss of metrics.jsonl"]
    shutil.rmtree(drilled)
    train_here(0, overrides(data, drilled, "train.num_steps=3", "train.seed=9"))
    found = list(drill.run_differences(peace, drilled))
    assert any("slices of tensors" in text for text in found) and any("samples_digest" in text for text in found)


def test_a_flipped_bit_is_one_bit_of_the_newest(tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "rank-00000.safetensors").write_bytes(bytes(1000))
    (tmp_path / "checkpoints" / "step-00000011.tmp-1").mkdir()
    idle = subprocess.Popen(["true"], text=True)
    idle.wait()
    faults.flip_bit(DrilledRun(idle, tmp_path, random.Random(0)))
    ones = [sum(b.bit_count() for b in p.read_bytes()) for p in sorted(tmp_path.glob("checkpoints/*/*.safetensors"))]
    assert ones == [0, 1]


def test_a_process_that_outlives_its_launcher_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drill, "GONE_SECONDS", 0.2)
    launcher = subprocess.Popen(["sh", "-c", "sleep 60 & echo there; wait"], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "there\n"
    target = DrilledRun(launcher, tmp_path, random.Random(0))
    target.send([launcher.pid], faults.signal.SIGKILL)
    launcher.wait()
    (left,) = drill.outliving(target.seen - {launcher.pid})
    os.kill(left, faults.signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HAMMER_DRILL"), reason="set HAMMER_DRILL=1: minutes")
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, []),
        (2, []),
        (2, ["parallel.tensor_model_parallel_size=2"]),
        (4, ["parallel.tensor_model_parallel_size=2", "parallel.shard=gradients"]),
        (2, ["parallel.pipeline_model_parallel_size=2"]),
        (2, ["checkpoint.fallback=false"]),
        (2, ["checkpoint.mode=background"]),
    ],
)
def test_the_whole_drill(ranks: int, layout: list[str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "drill.py"), str(TINY), "model.vocab_size=301", *layout]
    done = subprocess.run([*command, "--nproc", str(ranks)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
