"""SIGKILL before each operation on files of a rewind: it has happened or not, and the run comes out the same."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.sampling.ledger import LEDGER, read_ledger
from megatron_hammer.train import loop, rewind
from megatron_hammer.train.prepare import find_start
from tests.faults.kills import KILLED, killed_at
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides, train_here
from tests.train.test_rewind import REWIND, bad_samples

MOST = 100  # operations: far above


def test_a_kill_before_any_operation_of_a_rewind(data: Path, tmp_path: Path) -> None:
    """A wide window, which takes the newest checkpoint back. Each kind of folder that is left is gone on from."""
    output, caught = tmp_path / "run", list[Any]()
    more = (*REWIND, "train.rewind_skip_steps_before=3", "log.interval_steps=100")
    arguments = overrides(data, output, *more)

    def keep(*args: Any) -> Any:
        caught.extend(args)
        raise KeyboardInterrupt

    with bad_samples(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "go_back", keep)
        with pytest.raises(KeyboardInterrupt):
            train_here(0, arguments)
    shutil.copytree(output, tmp_path / "before")
    goes_on: dict[tuple[bool, ...], Path] = {}
    for operation in count(1):
        assert operation < MOST
        shutil.rmtree(output)
        shutil.copytree(tmp_path / "before", output)
        code = killed_at(operation, lambda: rewind.go_back(*caught))
        assert code in (0, KILLED)
        ledger, start = read_ledger(output / LEDGER), find_start(config_for(arguments))
        assert start.resume is not None and start.resume.step == (6 if ledger is None else 3)
        assert ledger is None or [(one.back_to_step, one.skipped) for one in ledger] == [(3, ((40, 72),))]
        kept = (output / "incidents" / "step-00000009.metrics.jsonl").exists()
        aside = any((output / "checkpoints").glob("step-00000006.aside-*"))
        assert (ledger is None or kept) and (ledger is not None or not aside), "in this order"
        goes_on.setdefault((kept, ledger is not None, aside), tmp_path / f"{operation}")
        if not goes_on[kept, ledger is not None, aside].exists():
            shutil.copytree(output, tmp_path / f"{operation}")
        if code == 0:
            break
    assert len(goes_on) == 4 and operation > 8
    results = []
    for left in goes_on.values():
        shutil.rmtree(output)
        shutil.copytree(left, output)
        with bad_samples():
            assert train_here(0, arguments) == 0
        results.append((metrics(output), checkpoint_bytes(output, 12), read_ledger(output / LEDGER)))
    assert all(result == results[0] for result in results)
