"""Branches: a child run of its own mix and descent, the parent untouched; the examples that make and use one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.config import Config, config_to_tree, load_config
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.sampling.samples import open_train_data
from megatron_hammer.train.branch import make_branch
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.training import train
from tests.model.tiny import make_context
from tests.train.runs import ROOT, begin_run, config_for, metrics, overrides, train_here, write_dataset


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on {a: 2, b: 1} with checkpoints of steps 3 and 4, and a third source c."""
    folder = tmp_path_factory.mktemp("branch")
    begin_run(folder)
    write_dataset(folder / "data" / "c", 30, seed=9)
    return folder


def bytes_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_ctime_ns) for path in files}


def names(config: Config, count: int) -> list[tuple[str, int, int]]:
    data = open_train_data(config)
    return [(data.fingerprints[source], epoch, window) for source, epoch, window in data.sample_ids(0, count)]


def as_arguments(config: Config) -> list[str]:
    """Every setting of a config as an override."""
    groups = config_to_tree(config).items()
    return [f"{group}.{name}={json.dumps(value)}" for group, fields in groups for name, value in fields.items()]


def test_a_branch_anneals_on_its_own_mix_and_leaves_the_parent(parent: Path, tmp_path: Path) -> None:
    before = bytes_of(parent / "run")
    mix = f"data.train={{{parent}/data/a: 1, {parent}/data/c: 3}}"
    branch = make_branch(parent / "run", 3, tmp_path / "child", [mix, "train.eval_samples=1"], tokens=8 * 32 * 2 + 1)
    config = load_config(tmp_path / "child" / "branch.yaml")
    assert config == branch.config and config.train.num_steps == 6, "the third step holds the last token of the budget"
    assert "--accept optimizer.lr" in (tmp_path / "child" / "branch.sh").read_text()
    prepared = prepare(config, 1, accepted=branch.accepted)
    rates = [learning_rate(prepared.config, step) for step in range(3, 7)]
    assert rates[0] == pytest.approx(metrics(parent / "run")[2]["lr"]) and rates[-1] == pytest.approx(3e-4)
    assert rates[0] - rates[1] == pytest.approx(rates[1] - rates[2])
    ids = names(prepared.config, 48)
    assert ids[:24] == names(config_for(overrides(parent / "data", parent / "unused")), 24)
    assert len(set(ids)) == len(ids), "a window was read twice"
    assert train_here(0, [*as_arguments(config), *(f"--accept={name}" for name in branch.accepted)]) == 0
    assert [line["step"] for line in metrics(tmp_path / "child")] == [1, 2, 3, 4, 5, 6]
    assert metrics(tmp_path / "child")[:3] == metrics(parent / "run")[:3] and bytes_of(parent / "run") == before


def test_a_longer_context_is_a_further_phase(parent: Path, tmp_path: Path) -> None:
    branch = make_branch(parent / "run", 4, tmp_path / "long", ["data.seq_length=64", "model.rope_theta=5e5"], 4096)
    first, second = branch.config.phases
    assert (first.end, first.seq_length, first.rope_theta) == (32, 32, 10_000)
    assert (second.seq_length, second.rope_theta) == (64, 500_000) and branch.config.train.num_steps == 4 + 8
    prepared = prepare(branch.config, 1, accepted=branch.accepted)
    assert prepared.resume is not None and prepared.resume.step == 4
    alone = shutil.copytree(prepared.resume.folder, tmp_path / "of" / "alone")
    assert make_branch(alone, None, tmp_path / "of" / "child", [], 900).config.train.num_steps == 8


def test_what_cannot_be_a_branch_is_refused(parent: Path, tmp_path: Path) -> None:
    run, new = parent / "run", tmp_path / "x"
    for call in (lambda: make_branch(run, 4, parent), lambda: make_branch(run, 4, new, [], 0),
                 lambda: make_branch(run, 4, new, ["train.num_steps=3"]), lambda: make_branch(run, 4, run / "x"),
                 lambda: make_branch(run, 4, new, [f"train.output={tmp_path}/y"], 900)):  # fmt: skip
        with pytest.raises(ConfigError, match="E201"):
            call()
    with pytest.raises(CheckpointError, match=r"E414.*model.num_layers=3 must be \d+ as in the checkpoint"):
        make_branch(run, 4, new, ["model.num_layers=3"])
    with pytest.raises(ConfigError, match=r"E204.*min_lr=1.0 must not exceed optimizer.lr"):
        make_branch(run, 4, new, ["optimizer.min_lr=1"], 900)
    with pytest.raises(CheckpointError, match=r"E412.*muon has other moments than adamw.*checkpoint.init_from="):
        make_branch(run, 4, new, ["optimizer.style=muon"])
    assert not new.exists()


def test_the_example_makes_a_branch_once_and_trains_it(parent: Path, tmp_path: Path) -> None:
    """With an interpreter that runs the tool and writes down how training is called; which is then done here, as it
    was called, to the end of the budget, and once more, when there is nothing left to do."""
    stub = tmp_path / "python"
    noted = f'[ "$1" = -m ] && echo "$@" >> {tmp_path}/calls && exit 0'
    stub.write_text(f'#!/bin/sh\n{noted}\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "examples/anneal.sh"), str(parent / "run"), "4", str(tmp_path / "new"), "1e3",
               f"{{{parent}/data/c: 1}}", "train.seed=1234"]  # fmt: skip
    for turn in range(2):
        subprocess.run(command, check=True, env=os.environ | {"PYTHON": str(stub), "PYTHONPATH": str(ROOT)})
        calls = (tmp_path / "calls").read_text().splitlines()
        assert len(calls) == turn + 1 and calls[0] == calls[turn] and f"{tmp_path}/new/branch.yaml" in calls[0]
        *options, file = calls[turn].split()
        assert options[:4] == ["-m", "megatron_hammer.launch", "--nproc", "1"] and set(options[4::2]) == {"--accept"}
        prepared = prepare(load_config(file), 1, accepted=options[5::2])
        assert prepared.is_finished is (turn == 1)
        assert turn or train(prepared, make_context(prepared.config)) == 0
    lines = metrics(tmp_path / "new")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8] and lines[-1]["lr"] == pytest.approx(3e-4)
    assert lines[-1]["source/c/tokens"] == 4 * 256 and lines[3] == metrics(parent / "run")[3]
    assert subprocess.run(command[:4], capture_output=True, check=False).returncode == 2


def test_the_recipe_of_a_longer_context_is_valid() -> None:
    config = load_config(ROOT / "examples/recipes/4k_to_32k.yaml", ["model.vocab_size=105789"])
    config.validate(8)
    config.check_phase_ends()
    lengths = [(phase.seq_length, phase.rope_theta) for phase in config.phases]
    assert lengths == [(4096, 10_000), (4096, 10_000), (32768, 1_000_000)]
    assert 95e9 <= config.phases[2].first * 4096 < 95.002e9 and 99e9 < config.num_tokens < 101e9


def test_the_recipe_of_a_longer_context_runs(parent: Path, tmp_path: Path) -> None:
    """At toy size, with a 128th of the lengths: three mixes, then eight times the context, in one run."""
    small = ["model.vocab_size=301", "model.hidden_size=16", "model.ffn_hidden_size=32", "model.num_layers=2",
             "model.num_attention_heads=4", "model.num_query_groups=2", "model.max_position_embeddings=256",
             "data.seq_length=32", "train.global_batch_size=4", "train.num_steps=14", "schedule.warmup_steps=2",
             "schedule.anneal_steps=4", "log.tensorboard=false", f"train.output={tmp_path}/run"]  # fmt: skip
    config = load_config(ROOT / "examples/recipes/4k_to_32k.yaml", small)
    places = {"data/zh": "a", "data/en": "b", "data/code": "c", "data/books": "x"}
    mixes = tuple(
        dataclasses.replace(
            mix,
            train={f"{parent}/data/{places[prefix]}": weight for prefix, weight in mix.train.items()},
            tokens=None if mix.tokens is None else round(mix.tokens / 85e9 * 1280),
            seq_length=None if mix.seq_length is None else mix.seq_length // 128,
        )
        for mix in config.data.mixes
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, phases=mixes))
    prepared = prepare(config, 1)
    assert train(prepared, make_context(config)) == 0
    lines = metrics(tmp_path / "run")
    sizes = [after["consumed_tokens"] - before["consumed_tokens"] for before, after in itertools.pairwise(lines)]
    assert lines[0]["consumed_tokens"] == 128 and sizes == [128] * 11 + [1024] * 2
    assert all(math.isfinite(line["loss"]) for line in lines) and lines[-1]["lr"] == pytest.approx(5e-5)
