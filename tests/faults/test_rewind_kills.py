"""SIGKILL before each operation on files of a rewind: it has happened or not, and the run comes out the same.

In every run of the tests of one process; with ``HAMMER_FAULTS=night`` (minutes) of each of two ranks, too.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.sampling.ledger import LEDGER, read_ledger
from megatron_hammer.train import loop, rewind
from megatron_hammer.train.prepare import find_starting_point
from tests.faults.kills import KILLED, Job, die_before, killed_at
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
        ledger, start = read_ledger(output / LEDGER), find_starting_point(config_for(arguments))
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


LAYOUTS = {"tp2": ["parallel.tensor_model_parallel_size=2"], "dp2": []}
FINDINGS = {"spike": (100.0, REWIND), "nonfinite": (math.nan, ("train.on_nonfinite=rewind", *REWIND[2:]))}


def goes_back(factor: float, who: int, operation: int) -> Callable[[int], None]:
    """A patch of a rank: bad samples; and this rank dies when it goes back.

    Args:
        operation: before which one on files; 0: before it begins; -1: when it is over; -2: never.
    """

    open_contexts = list[Any]()  # one that nobody holds is closed again

    def patch(rank: int) -> None:
        open_contexts.append(bad_samples(factor=factor))
        open_contexts[-1].__enter__()
        if rank != who or operation == -2:
            return
        real = loop.go_back

        def go_back(*args: Any) -> Any:
            called_off = die_before(operation) if operation > 0 else lambda: None
            if operation == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args)
            if operation == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            called_off()
            return result

        loop.go_back = go_back

    return patch


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HAMMER_FAULTS"), reason="HAMMER_FAULTS=night runs it: minutes a layout")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kill_of_a_rank_around_a_rewind(data: Path, memory_folder: Path, layout: str, finding: str) -> None:
    """Rank 0 before each operation on files; the other one before and after. The same command comes out the same."""
    factor, settings = FINDINGS[finding]
    more = (*settings, *LAYOUTS[layout], "train.rewind_skip_steps_before=3", "log.interval_steps=100")

    numbers = count()

    def run(name: str, who: int, operation: int) -> int:
        arguments, folder = overrides(data, memory_folder / name, *more), memory_folder / f"job-{next(numbers)}"
        job = Job(2, folder, arguments, patch=goes_back(factor, who, operation))
        codes = job.wait()
        assert set(codes) == {0} or codes[who] == KILLED, job.said()
        return max(abs(code) for code in codes)

    assert run("peace", 0, -2) == 0
    peace = memory_folder / "peace"
    # after the bad step perhaps a second one: the limits of a history of four steps are narrow
    assert {one.finding for one in read_ledger(peace / LEDGER) or ()} == {finding}
    wrong, kills = [], 0
    operations = count(1)
    trials = [(0, 0), (0, -1), (1, 0), (1, -1)]
    while True:
        who, operation = trials.pop() if trials else (0, next(operations))
        name = f"{who}-{operation}"
        if run(name, who, operation) == 0:
            break  # there is no such operation any more
        kills += 1
        if run(name, 0, -2) != 0:
            wrong.append(f"{name} does not go on")
        output = memory_folder / name
        for what in (metrics, lambda path: checkpoint_bytes(path, 12), lambda path: read_ledger(path / LEDGER)):
            if what(output) != what(peace):
                wrong.append(f"{name} differs")
        shutil.rmtree(output)
    print(f"{layout}, {finding}: {kills} kills, {len(wrong)} wrong", flush=True)
    assert not wrong and kills > 12, wrong
