"""A run starts from the newest checkpoint that is not damaged, says so, and computes what it would have from there.

A run of 3 steps with a checkpoint of each is copied and damaged; then it is trained to its 4th step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.checkpoint import one_pass
from megatron_hammer.checkpoint.manifest import read_manifest, write_manifest
from megatron_hammer.parallel.agreement import BeforeStart
from megatron_hammer.train.begin import Beginning, begin
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import run_rank
from tests.distributed import run_distributed
from tests.model.tiny import make_context
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides

STEPS = ("checkpoint.save_interval_steps=1", "checkpoint.keep_last=4", "schedule.style=constant", "data.valid=null")
FILE = "rank-00000.safetensors"


def go(data: Path, output: Path, *more: str, accepted: tuple[str, ...] = ()) -> int:
    """Train to the 4th step as the only rank."""
    return run_rank(config_for(overrides(data, output, *STEPS, "train.num_steps=4", *more)), 0, 0, 1, None,
                    accepted=accepted)  # fmt: skip


def step(output: Path, number: int) -> Path:
    return output / "checkpoints" / f"step-{number:08d}"


def flip(path: Path, byte: int | bytes) -> None:
    """Change one bit of a byte; negative numbers count from the end, bytes name what it is in the value of."""
    content = bytearray(path.read_bytes())
    content[content.index(byte) + len(byte) + 5 if isinstance(byte, bytes) else byte] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps."""
    output = tmp_path_factory.mktemp("begin") / "run"
    assert go(data, output, "train.num_steps=3") == 0
    return output


@pytest.fixture(scope="module")
def from_second(data: Path, done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, gone on from its second step by itself, to the 4th."""
    output = Path(shutil.copytree(done, tmp_path_factory.mktemp("second") / "run"))
    shutil.rmtree(step(output, 3))
    assert go(data, output) == 0
    return output


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def equals(output: Path, expected: Path) -> None:
    assert metrics(output) == metrics(expected)
    assert checkpoint_bytes(output, 4) == checkpoint_bytes(expected, 4)


def asides(folder: Path) -> list[str]:
    """Names of what was kept aside, without their random ends."""
    return sorted(p.name.rpartition("-")[0] for p in folder.iterdir() if ".aside-" in p.name)


@pytest.mark.parametrize(
    ("name", "byte", "named"),
    [(FILE, -5, rf"E411.*{FILE}: exp_avg_sq:model\.\S+.*has changed"),
     ("manifest.json", b'"samples_digest"', r"E404.*manifest\.json")],
    ids=["found while loading", "found before"],
)  # fmt: skip
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    data: Path,
    run: Path,
    from_second: Path,
    name: str,
    byte: int | bytes,
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip(step(run, 3) / name, byte)
    assert go(data, run) == 0
    told, noted = capsys.readouterr()
    kept = next((run / "checkpoints").glob("step-00000003.aside-*"))
    assert f"{step(run, 3)}, which is damaged, is kept as {kept.name}" in noted
    assert f"note: checkpoint {step(run, 3)} is damaged: error[E" in told and re.search(named, told), told
    assert "going on from step 2 costs 1 of the steps that were done, from 3 to 3" in told
    assert f"resuming from {step(run, 2)}" in told.splitlines()
    equals(run, from_second)
    assert asides(run) == ["metrics.jsonl.aside"]
    assert [line["step"] for line in metrics_of(next(run.glob("metrics.jsonl.aside-*")))] == [1, 2, 3]


def metrics_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _other_manifest(run: Path) -> None:
    shutil.copy(step(run, 2) / "manifest.json", step(run, 3) / "manifest.json")


def _manifest_of_another_run(run: Path) -> None:
    """With another seed, and as intact as its own: only its hashes are those of other bytes."""
    manifest = read_manifest(step(run, 3))
    slices = [
        dataclasses.replace(s, hash=s.hash[::-1] if manifest.tensors[s.tensor].kind != "weight" else s.hash)
        for s in manifest.files[0].slices
    ]
    (step(run, 3) / "manifest.json").unlink()
    files = (dataclasses.replace(manifest.files[0], slices=tuple(slices)),)
    config = manifest.config | {"train": manifest.config["train"] | {"seed": 4711}}
    write_manifest(dataclasses.replace(manifest, files=files, config=config))


def _swapped_step(run: Path) -> None:
    shutil.copy(step(run, 2) / FILE, step(run, 3) / FILE)


def _cut(run: Path) -> None:
    os.truncate(step(run, 3) / FILE, 1000)


def _hole(run: Path) -> None:
    with (step(run, 3) / FILE).open("r+b") as file:
        file.seek(40_000)
        file.write(bytes(4096))


def _linked_file(run: Path) -> None:
    (step(run, 3) / FILE).rename(run / "elsewhere")
    (step(run, 3) / FILE).symlink_to(run / "elsewhere")


def _linked_folder(run: Path) -> None:
    step(run, 3).rename(run / "moved")
    step(run, 3).symlink_to(run / "moved")


def _a_file_instead(run: Path) -> None:
    shutil.rmtree(step(run, 3))
    step(run, 3).write_text("not a folder")


@pytest.mark.parametrize(
    "damage",
    [
        _other_manifest,
        _manifest_of_another_run,
        _swapped_step,
        _cut,
        _hole,
        _linked_file,
        _linked_folder,
        _a_file_instead,
    ],
)  # fmt: skip
def test_whatever_the_damage_the_one_before_is_taken(data: Path, run: Path, damage, monkeypatch, capsys) -> None:
    """Nothing of the damaged one is lost: it is only renamed."""
    damage(run)
    monkeypatch.setattr("megatron_hammer.train.loop.TrainLoop.advance", lambda run, *how: run.first_step)
    assert go(data, run) == 3
    assert "E4" in capsys.readouterr().out
    assert asides(run / "checkpoints") == ["step-00000003.aside"] and not os.path.lexists(step(run, 3))
    if damage is _linked_folder:
        assert (run / "moved" / FILE).is_file(), "where a link leads nothing is touched"


@pytest.mark.parametrize("name", [FILE, "manifest.json"])
def test_no_fallback_where_it_is_forbidden(data: Path, run: Path, name: str) -> None:
    flip(step(run, 3) / name, 900)
    with pytest.raises(CheckpointError, match=rf"E419.*{name}.*costs 1 of the steps"):
        go(data, run, "checkpoint.fallback=false")
    assert asides(run) == asides(run / "checkpoints") == []


def test_all_damaged_is_an_error_and_a_fresh_start_is_asked_for_by_name(data: Path, run: Path, capsys) -> None:
    for number in (1, 2, 3):
        flip(step(run, number) / FILE, -1)
    with pytest.raises(CheckpointError, match=rf"E418.*3 checkpoints, all damaged.*{FILE}.*--accept fresh"):
        go(data, run)
    assert asides(run / "checkpoints") == ["step-00000002.aside", "step-00000003.aside"] or not asides(
        run / "checkpoints"
    )
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RefusedError, match=r"E586.*\.saved says.*--accept fresh"):
        go(data, run)
    assert len(metrics(run)) == 3, "nothing was emptied"
    (run / ".saved").unlink()
    with pytest.raises(RefusedError, match=r"E586.*metrics\.jsonl has steps up to 3"):
        go(data, run)
    capsys.readouterr()
    assert go(data, run, "train.num_steps=1", accepted=("fresh",)) == 0
    assert [line["step"] for line in metrics(run)] == [1] and asides(run) == ["metrics.jsonl.aside"]
    assert "metrics.jsonl as it was is kept as metrics.jsonl.aside-" in capsys.readouterr().err


def test_a_slow_digest_is_noted(data: Path, run: Path, monkeypatch) -> None:
    for backend in ("C++", "NumPy"):
        monkeypatch.setattr(one_pass, "BACKEND", backend)
        notes = prepare(config_for(overrides(data, run, *STEPS)), 1).notes
        assert any("digest of the state: NumPy" in note for note in notes) == (backend == "NumPy")


def test_step_folders_that_are_links_are_no_silent_new_start(data: Path, run: Path) -> None:
    for number in (1, 2, 3):
        step(run, number).rename(run / f"moved-{number}")
        step(run, number).symlink_to(run / f"moved-{number}")
    with pytest.raises(CheckpointError, match=r"E418.*is a symbolic link"):
        go(data, run)


@pytest.mark.parametrize("mistake", ["a moment", "the position in the data"])
def test_a_state_that_was_loaded_wrongly_trains_no_step(data: Path, run: Path, mistake: str, monkeypatch) -> None:
    """All bytes in the files are right, so the checkpoint is not to blame, and is left alone."""
    from megatron_hammer.train import loop

    load = loop.load_state

    def wrongly(prepared: Any, optimizer: Any, ctx: Any) -> Any:
        state, sums = load(prepared, optimizer, ctx)
        if mistake == "a moment":
            optimizer.shards()[-1].tensors["exp_avg"][:1] += 1
            return state, sums
        return dataclasses.replace(state, consumed_samples=state.consumed_samples + 8), sums

    monkeypatch.setattr(loop, "load_state", wrongly)
    with pytest.raises(CheckpointError, match=r"E417.*(exp_avg of .* not what was saved|is not the state)"):
        go(data, run)
    assert asides(run) == asides(run / "checkpoints") == [] and len(metrics(run)) == 3


@pytest.mark.parametrize(("what", "named"), [("sample_ids", "samples_digest"), ("learning_rate", "lr")])
def test_a_program_that_would_go_on_otherwise_is_refused(data: Path, run: Path, what, named, monkeypatch) -> None:
    """As a new version of a library might; a run whose settings have changed is judged by these."""
    from megatron_hammer.sampling.samples import TrainData
    from megatron_hammer.train import state

    ids, rate = TrainData.sample_ids, state.learning_rate
    if what == "sample_ids":
        monkeypatch.setattr(TrainData, "sample_ids", lambda self, first, count: ids(self, first, count)[::-1])
    else:
        monkeypatch.setattr(state, "learning_rate", lambda config, step: rate(config, step) * 2)
    shutil.rmtree(step(run, 3))
    manifest = read_manifest(step(run, 2))
    (step(run, 2) / "manifest.json").unlink()
    same_place = manifest.config | {"train": manifest.config["train"] | {"output": str(run)}}
    write_manifest(dataclasses.replace(manifest, config=same_place))
    with pytest.raises(RefusedError, match=rf"E588.*step 3: {named}=.* would have been"):
        go(data, run, "train.num_steps=3")


def _two_ranks(rank: int, data: Path, output: Path, place: Path) -> tuple[int, list[str]]:
    config = config_for(overrides(data, output, *STEPS, "train.num_steps=4"))
    with ExitStack() as held:
        beginning = Beginning(BeforeStart(dist.FileStore(str(place), 2), rank, 2), held, config, 0)
        prepared, told = beginning.agree(), list[str]()
        trained = begin(beginning, prepared, make_context(config), lambda other: told.extend(other.notes))
        assert trained is not None
        with trained.reporting():
            assert trained.advance(4, lambda: False) == 0
        return trained.first_step, told


def test_ranks_take_the_same_other_one(data: Path, run: Path, from_second: Path, tmp_path: Path) -> None:
    """One of two ranks alone reads the damaged tensor: both go on from the one before, with the bits of one rank."""
    flip(step(run, 3) / FILE, -1)
    (first, told), (second, silent) = run_distributed(2, _two_ranks, data, run, tmp_path / "store")
    assert first == second == 3
    assert sum("is damaged: error[E411]" in line for line in told) == 1 and not any("damaged" in s for s in silent)
    assert [line["samples_digest"] for line in metrics(run)] == [x["samples_digest"] for x in metrics(from_second)]
