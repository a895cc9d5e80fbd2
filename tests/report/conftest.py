"""A run's folder with all that a report reads, and with what a report must not be broken by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.config import config_to_tree, load_config
from tests.train.runs import TINY

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"
STEPS = 200


def lines_of(steps: int, shift: float = 0.0) -> list[dict[str, Any]]:
    """metrics.jsonl of a run with two sources, a validation set, a skipped step."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 2.0 + shift + 8 * math.exp(-step / 40)
        lines.append({"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "skipped": step == 61,
                      "consumed_samples": 8 * step, "consumed_tokens": 256 * step, "tokens_per_second": 1000.0 + step,
                      "samples_digest": "ab", "mfu": None, "mfu_causal": None, "memory_bytes": 2**31,
                      "source/zh/loss": loss, "source/zh/tokens": 200 * step, f"source/{HOSTILE}/loss": loss + 1,
                      f"source/{HOSTILE}/tokens": 56 * step})  # fmt: skip
        if step % 50 == 0:
            lines[-1] |= {"valid/金融/loss": loss + 0.1, "valid/金融/bits_per_byte": loss / 3}
    return lines


def write_run(folder: Path, shift: float = 0.0) -> Path:
    """The folder, as a run that was killed in mid-line has left it."""
    (folder / "incidents").mkdir(parents=True)
    lines = [json.dumps(line, ensure_ascii=False) for line in lines_of(STEPS, shift)]
    lines[100:100] = ['{"step": 99999999, "loss": 1}', "\x00\x00", "[]", '{"step": true}', "{" * 9000]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 201, "lo')
    (folder / "evaluations.jsonl").write_text('{"step": 50, "evaluation/ceval/acc": 0.3}\n{half')
    texts = [{"step": step, "prompt": HOSTILE, "text": f"今天 {step} {HOSTILE}"} for step in (50, 100)]
    (folder / "generations.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts) + '{"step": 1}\n')
    rank = {"rank": 3, "module": f"layers.4 {HOSTILE}", "gradients": []}
    found = {"step": 61, "finding": "spike", "action": "skip", "loss": 9.5, "grad_norm": None, "ranks": [rank],
             "samples": [{"pieces": [{"file": "web/part-17.jsonl"}]}]}  # fmt: skip
    (folder / "incidents" / "step-00000061.json").write_text(json.dumps(found))
    (folder / "incidents" / "step-00000090.json").write_text('{"half')
    rewind = {"rewind": 1, "step": 30, "finding": "spike", "back_to_step": 20, "skipped_samples": [[160, 176]]}
    (folder / "ledger.jsonl").write_text(json.dumps(rewind) + "\n")
    mixes = "data.phases=[{steps: 120, train: {/d/zh: 3, /d/en: 1}}, {train: {/d/zh: 1}}]"
    config = load_config(TINY, [mixes, "model.vocab_size=301", "train.num_steps=400", "train.global_batch_size=8",
                                "data.seq_length=32", f"optimizer.lr={1e-3 + shift}",
                                f"train.output={folder}"])  # fmt: skip
    environment = {"host": f"node {HOSTILE}", "device": "cpu", "ranks": 8, "versions": {"torch": "2.13"}}
    start = {"step": 0, "time": "2026-11-30T01:00:00+00:00", "environment": environment,
             "config": config_to_tree(config)}  # fmt: skip
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(start | {"step": 150}) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "运行 <一> &")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "other", 0.5)
