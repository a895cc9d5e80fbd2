"""SIGKILL at every moment of a save, and of runs that save: what was committed stays, and a run comes out equal.

Three tiers. In every run of the tests: a small save, of the process that trains and of the one that writes for it, is
killed before each of its operations on files. ``HAMMER_FAULTS=night``: runs of four layouts in both modes, killed at
each phase of a step and of a save, on each rank, and 25 kills of everything at random moments in each of four layouts.
``HAMMER_FAULTS=release``: of the launcher and everything too, or of the launcher alone. They take seconds, minutes and
a quarter of an hour.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from megatron_hammer.base.files import staging_path
from megatron_hammer.checkpoint.folder import clean_up, find_checkpoints, step_name, step_of
from megatron_hammer.checkpoint.retention import Retention
from megatron_hammer.checkpoint.write import owned_views, save_checkpoint
from megatron_hammer.checkpoint.writer_process import Writer
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.verify import drill
from tests.checkpoint.layouts import FakeTokenizer, config_tree, random_logical, rank_shards, tiny_model
from tests.faults.kills import KILLED, Job, Launched, committed, killed_at
from tests.train.runs import overrides

TIER = os.environ.get("HAMMER_FAULTS", "")
MODEL = tiny_model(hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=33)
TREE = config_tree(MODEL)
KILLS = int(os.environ.get("HAMMER_KILLS", "25"))
LONG_SECONDS = 500.0
GONE_SECONDS = 5.0  # the aim for ranks whose launcher was killed
MOST = 400  # operations of one save: far above


def save(folder: Path, step: int) -> None:
    shards = rank_shards(MODEL, 0, 1, 1, random_logical(MODEL, step))
    save_checkpoint(folder, step, shards, model=MODEL, config_tree=TREE, state={"consumed_samples": step},
                    tokenizer=FakeTokenizer(), ctx=ParallelContext.single(), retention=Retention(3),
                    note=lambda line: None)  # fmt: skip


def write_beside(folder: Path, step: int) -> None:
    """What the process beside a rank does for one save, from the plan to the removal of what is old."""
    shards = rank_shards(MODEL, 0, 1, 1, random_logical(MODEL, step))
    slices, views = owned_views(shards)
    memory, rows = mmap.mmap(-1, 2**20), []
    for wanted, view in zip(slices, views, strict=True):
        at = memory.tell()
        size = memory.write(view.numpy().tobytes())
        rows.append([wanted.name, wanted.kind, wanted.rows, wanted.cols, wanted.shape, wanted.dtype, at, size])
    staging, target = staging_path(folder / step_name(step)), folder / step_name(step)
    layout = {"world": 1, "tp": 1, "dp": 1}
    clean_up(folder)
    staging.mkdir()
    writer, names = Writer(0, memory), {"staging": str(staging), "target": str(target)}
    for request in (
        {"do": "plan", "slices": rows, "tokenizer": {"tokenizer.model": "00"}, "fingerprint": "0" * 32},
        {"do": "write", **names},
        {"do": "commit", **names, "step": step, "config": TREE, "state": {"consumed_samples": step},
         "weights_dtype": "bfloat16", "layout": layout, "sync_first": []},
        {"do": "prune", "folder": str(folder), "newest": str(target),
         "retention": {"keep_last": 3, "keep_every_steps": None, "pinned_steps": ()}},
    ):  # fmt: skip
        writer.do(json.loads(json.dumps(request)))


@pytest.mark.parametrize("work, step", [(save, 40), (save, 30), (write_beside, 40)])  # 30: the same step again
def test_a_kill_before_any_operation_of_a_save(
    memory_folder: Path, work: Callable[[Path, int], None], step: int
) -> None:
    """The committed steps are those of before, or those and the new one, or what retention leaves of these."""
    folder = memory_folder / "checkpoints"
    for old in (10, 20, 30):
        save(folder, old)
    new, seen = sorted({10, 20, 30, step}), []
    for operation in count(1):
        assert operation < MOST
        code = killed_at(operation, partial(work, folder, step))
        found = [step_of(path) for path in find_checkpoints(folder)]
        assert code in (0, KILLED) and found in ([10, 20, 30], new, new[-3:]), (operation, code, found)
        clean_up(folder)
        assert committed(folder) == found, "all whole, and the next start takes nothing away"
        assert not [path.name for path in folder.iterdir() if ".tmp-" in path.name or ".old-" in path.name]
        seen.append(found)
        if code == 0:
            break
        for lost in {10, 20, 30} - set(found):
            save_apart(folder, lost)
    assert seen[0] == [10, 20, 30] and seen[-1] == new[-3:] and len(seen) > 15


def save_apart(folder: Path, step: int) -> None:
    """Bring back what retention has removed."""
    elsewhere = folder.parent / "elsewhere"
    save(elsewhere, step)
    os.rename(elsewhere / step_name(step), folder / step_name(step))


# ---- whole runs -----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "tp2-dp2": (4, ["parallel.tensor_model_parallel_size=2"]),
}
NIGHT = ("train.num_steps=8", "checkpoint.save_interval_steps=2", "train.eval_interval_steps=3",
         "checkpoint.keep_last=9", "train.drift_check_interval_steps=2")  # fmt: skip
IN_A_STEP = ("reading samples", "forward and backward", "evaluation", "reducing", "updating", "asking all ranks")
IN_A_SAVE = ("saving, drift", "saving, staging", "saving, slice 3", "saving, making", "saving, committing")
OF_FILES = ("stage", "write", "fsync", "manifest", "rename", "after-rename")


def trials(mode: str, ranks: int) -> Iterator[tuple[str, tuple[int, int, str] | None]]:
    """A fault of the environment, or the rank, step and phase at which a slot kills: each while step 4 is saved."""
    those = sorted({0, ranks - 1})
    if mode == "blocking":
        yield from (("", (rank, 4, phase)) for rank in those for phase in IN_A_SAVE)
        yield from ((f"{kind}@{phase},step=4", None) for kind in ("kill", "kill-all") for phase in OF_FILES)
    else:  # it is saved while training goes on to step 6
        steps = [(5, phase) for phase in IN_A_STEP if phase != "evaluation"] + [(6, "evaluation")]
        yield from (("", (rank, step, phase)) for rank in those for step, phase in steps)
        beside = [(phase, "" if phase == "stage" else ",part=background") for phase in (*OF_FILES, "prune")]
        for kind in ("kill", "kill-all"):
            yield from ((f"{kind}@{phase},step=4{part}", None) for phase, part in beside)
    yield from (("", (rank, 4, phase)) for rank in those for phase in IN_A_STEP if phase != "evaluation")


@pytest.mark.slow
@pytest.mark.skipif(TIER not in ("night", "release"), reason="HAMMER_FAULTS=night runs it: minutes")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("mode", ["blocking", "background"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kill_at_each_phase_of_a_step_and_of_a_save(data: Path, memory_folder: Path, layout: str, mode: str) -> None:
    """The committed set is old, or old and new; the same command then ends equal in bits to a run in peace."""
    ranks, settings = LAYOUTS[layout]
    peace, more = memory_folder / "peace", [*NIGHT, *settings, f"checkpoint.mode={mode}"]
    job = Job(ranks, memory_folder / "job", overrides(data, peace, *more))
    assert set(job.wait()) == {0}, job.said()
    wrong, done = [], 0
    for number, (fault, deadly) in enumerate(trials(mode, ranks)):
        output = memory_folder / f"{number}"
        arguments = overrides(data, output, *more)
        killed = Job(ranks, memory_folder / f"job-{number}", arguments, fault, deadly)
        codes = killed.wait()
        alone = fault.startswith("kill@") and "background" in fault  # its rank goes on, and saves otherwise
        found = committed(output / "checkpoints")
        early = mode == "background" and deadly is not None and deadly[1] == 4  # step 2 may be in flight
        good = found[-1:] == [8] if alone else found in (([], [2]) if early else ([2], [2, 4]))
        if not good or (set(codes) == {0}) is not alone:
            wrong.append(f"{fault or deadly}: exit codes {codes}, committed {found}: {killed.said()[-300:]}")
        again = Job(ranks, memory_folder / f"again-{number}", arguments)
        if set(again.wait()) != {0}:
            wrong.append(f"{fault or deadly}: does not go on: {again.said()[-300:]}")
        else:
            wrong += [f"{fault or deadly}: {text}" for text in drill.run_differences(peace, output)]
        shutil.rmtree(output)
        done += 1
    print(f"{layout}, {mode}: {done} kills, {len(wrong)} wrong", flush=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.skipif(TIER not in ("night", "release"), reason="HAMMER_FAULTS=night runs it: minutes")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_of_everything_at_random_moments(data: Path, memory_folder: Path, layout: str) -> None:
    """Background saves on: no bit and no committed step is lost, and the same command always goes on."""
    ranks, settings = LAYOUTS[layout]
    chance, peace, output = random.Random(layout), memory_folder / "peace", memory_folder / "killed"
    more = [*settings, "checkpoint.mode=background", f"train.num_steps={6 * KILLS}", "train.eval_interval_steps=7"]
    job = Job(ranks, memory_folder / "job", overrides(data, peace, *more))
    assert set(job.wait(LONG_SECONDS)) == {0}, job.said()
    kills, before, inside = 0, 0, 0
    while kills < KILLS:
        job = Job(ranks, memory_folder / f"job-{kills}", overrides(data, output, *more))
        newest = f"step-{before:08d}"
        target = lines_of(output) + chance.choice([0, 1, 2, 4, 8, 12])
        while job.is_running() and lines_of(output) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * (0.05 if target else 0.5))
        job.kill()
        if set(job.wait()) == {0}:
            break  # it has come to its end before
        kills += 1
        assert before == 0 or "resuming from" not in job.said() or newest in job.said(), job.said()
        inside += any((output / "checkpoints").glob("*.tmp-*"))
        found = committed(output / "checkpoints")
        assert max(found, default=0) >= before, f"kill {kills}: step {before} was committed, now there is {found}"
        before = max(found, default=0)
    job = Job(ranks, memory_folder / "last", overrides(data, output, *more))
    assert set(job.wait(LONG_SECONDS)) == {0}, job.said()
    print(f"{layout}: {kills} kills of everything, {inside} of them inside a save", flush=True)
    assert not list(drill.run_differences(peace, output)) and kills > KILLS // 2


def lines_of(output: Path) -> int:
    """Steps that a run has written down."""
    with contextlib.suppress(OSError):
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


@pytest.mark.slow
@pytest.mark.skipif(TIER != "release", reason="HAMMER_FAULTS=release runs it: minutes a layout")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_under_the_launcher(data: Path, memory_folder: Path, layout: str) -> None:
    """Of the launcher alone, whose ranks must go with it, or of everything, at random moments; background saves on.

    After half of the former the next run starts at once: refused while the ranks of before live, or they are gone.
    """
    ranks, settings = LAYOUTS[layout]
    chance, peace, output = random.Random(f"launched {layout}"), memory_folder / "peace", memory_folder / "killed"
    more = [*settings, "checkpoint.mode=background", f"train.num_steps={6 * KILLS}", "train.eval_interval_steps=7"]
    job = Launched(ranks, memory_folder / "said", overrides(data, peace, *more))
    assert job.wait(LONG_SECONDS) == 0, job.said()
    counts, before, dying = (
        dict.fromkeys(("launcher", "everything", "inside a save", "refused"), 0),
        0,
        list[Launched](),
    )
    while (kills := counts["launcher"] + counts["everything"]) < KILLS:
        job = Launched(ranks, memory_folder / f"said-{kills}", overrides(data, output, *more))
        target = lines_of(output) + chance.choice([0, 1, 2, 4, 8, 12])
        while job.is_running() and lines_of(output) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * (0.05 if target else 0.5))
        how = chance.choice(("launcher", "everything"))
        job.kill(everything=how == "everything")
        code, newest = job.wait(), f"step-{before:08d}"
        assert code in (KILLED, 0) or (code == 5 and dying), f"{code}: {job.said()}"
        if code == 0:
            break  # it has come to its end before
        counts["refused" if code == 5 else how] += 1
        inside = any((output / "checkpoints").glob("*.tmp-*"))
        counts["inside a save"] += inside and code != 5
        assert before == 0 or "resuming from" not in job.said() or newest in job.said(), job.said()
        dying.append(job)
        if how == "launcher" and chance.random() < 0.5:
            continue  # the next one starts at once
        assert all(other.is_gone(GONE_SECONDS) for other in dying), "ranks go with their launcher"
        dying.clear()
        found = committed(output / "checkpoints")
        assert max(found, default=0) >= before, f"kill {kills}: step {before} was committed, now there is {found}"
        before = max(found, default=0)
    assert all(other.is_gone(GONE_SECONDS) for other in dying), "ranks go with their launcher"
    job = Launched(ranks, memory_folder / "last", overrides(data, output, *more))
    assert job.wait(LONG_SECONDS) == 0, job.said()
    print(f"{layout}: kills {counts}", flush=True)
    assert not list(drill.run_differences(peace, output)) and kills > KILLS // 2
