"""Phases in whole runs: what was consumed stays, what is to come may change, and a run goes on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.checkpoint.manifest import saved_model
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.sampling.plan import format_run_plan
from megatron_hammer.sampling.samples import open_train_data
from megatron_hammer.train import prepare as prepare_module
from megatron_hammer.train.prepare import Prepared, in_progress, prepare
from megatron_hammer.train.run import describe_dry_run
from tests.distributed import run_distributed
from tests.train.runs import (
    accepted_by,
    begin_run,
    checkpoint_bytes,
    config_for,
    metrics,
    overrides,
    train_here,
    write_dataset,
)

CONSUMED = 32  # 4 steps of 8 samples, 2/3 from a and 1/3 from b


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on {a: 2, b: 1} that has done 4 of 12 steps, and a third source c."""
    folder = tmp_path_factory.mktemp("past")
    begin_run(folder)
    write_dataset(folder / "data" / "c", 30, seed=9)
    return folder


def prepared_with(folder: Path, *more: str) -> Prepared:
    arguments = overrides(folder / "data", folder / "run", *more)
    return prepare(config_for(arguments), 1, accepted=accepted_by(arguments))


def names(prepared: Prepared, count: int) -> list[tuple[str, int, int]]:
    """The first samples of a run, by the content of their sources."""
    data = open_train_data(prepared.config)
    return [(data.fingerprints[s], epoch, window) for s, epoch, window in data.sample_ids(0, count)]


def check_read_once(prepared: Prepared, count: int) -> None:
    found = names(prepared, count)
    assert len(set(found)) == len(found), "a window was read twice"


def phases(folder: Path, *lines: str) -> tuple[str, str]:
    data = folder / "data"
    return "data.train=null", f"data.phases=[{', '.join(lines)}]".replace("@", f"{data}/")


FIRST = "{samples: 32, train: {@a: 2, @b: 1}}"


@pytest.mark.parametrize("mix", ["{@a: 1, @b: 1, @c: 1}", "{@a: 1}", "{@a: 1, @b: 3}", "{@c: 1}"])
def test_another_mix_is_refused_with_the_phases_to_paste_and_taken_as_one_where_accepted(
    trained: Path, mix: str
) -> None:
    """As the public reports have it: a source added, dropped, 1:1 to 1:3. Both ways give the same samples."""
    change = f"data.train={mix}".replace("@", f"{trained}/data/")
    with pytest.raises(RefusedError) as caught:
        prepared_with(trained, change)
    block = "data.phases: [{train: {" in str(caught.value) and "samples: 32" in str(caught.value)
    assert block and "--accept data" in str(caught.value)
    taken = prepared_with(trained, change, "--accept=data.train")
    assert taken.accepted_changes and any("goes on where it stands at sample 32" in note for note in taken.notes)
    pasted = caught.value.remedy.split("write data.phases: ")[1]
    written = prepared_with(trained, "data.train=null", f"data.phases={pasted}")
    assert written.accepted_changes == () and written.new_samples
    before = names(prepared_with(trained), CONSUMED)
    for prepared in (taken, written):
        assert names(prepared, 90)[:CONSUMED] == before
        check_read_once(prepared, 90)
    assert names(taken, 90) == names(written, 90)


def test_a_source_is_looked_at_once_where_the_past_is_carried_on(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        prepare_module, "IndexedDataset", lambda prefix: opened.append(Path(prefix).name) or IndexedDataset(prefix)
    )
    taken = prepared_with(trained, f"data.train={{{trained}/data/a: 1}}", "--accept=data.train")
    assert len(taken.config.data.phases or ()) == 2 and sorted(opened) == ["a", "b", "x", "y"]


def test_a_consumed_phase_that_changes_is_refused_with_both(trained: Path) -> None:
    for first in ("{samples: 31, train: {@a: 2, @b: 1}}", "{samples: 32, train: {@a: 1, @b: 1}}",
                  "{samples: 32, train: {@a: 2, @c: 1}}",
                  "{samples: 32, seq_length: 16, train: {@a: 2, @b: 1}}"):  # fmt: skip
        with pytest.raises(RefusedError, match="E580.*of seq_length") as caught:  # noqa: RUF043
            prepared_with(trained, *phases(trained, first, "{train: {@b: 1}}"), "--accept=data", "--accept=data.train")
        assert "(was samples 0 to 32 from {" in str(caught.value) and "0.666667" in str(caught.value)
        assert "write these as they were" in str(caught.value)


def test_a_run_of_one_phase_with_its_own_seq_length_gets_another(trained: Path, tmp_path: Path) -> None:
    """Its past is of that length, not of data.seq_length."""
    only, second = "train: {@a: 1}, seq_length: 16", "{train: {@b: 1}}"
    run = overrides(trained / "data", tmp_path / "run", *phases(trained, f"{{{only}}}"), "train.num_steps=2")
    assert train_here(0, run) == 0
    shutil.copytree(trained / "data", tmp_path / "data")
    assert prepared_with(tmp_path, *phases(trained, f"{{samples: 16, {only}}}", second)).new_samples
    with pytest.raises(RefusedError, match=r"E580.*of seq_length 32 \(was samples 0 to .* of seq_length 16\)"):
        prepared_with(tmp_path, *phases(trained, "{samples: 16, train: {@a: 1}}", second))


def test_what_is_to_come_may_change_freely(trained: Path) -> None:
    """Also the length of the phase that is under way, and paths and order of its sources."""
    for coming in ("{train: {@c: 1}}", "{tokens: 640, train: {@c: 1}}, {train: {@a: 1, @b: 1}}"):
        for first in (FIRST, "{steps: 4, train: {@b: 1, @a: 2}}", "{tokens: 1024, train: {@a: 4, @b: 2}}",
                      "{samples: 40, train: {@a: 2, @b: 1}}"):  # fmt: skip
            prepared = prepared_with(trained, *phases(trained, first, coming))
            assert prepared.accepted_changes == ()
            assert names(prepared, 90)[:CONSUMED] == names(prepared_with(trained), CONSUMED)
            check_read_once(prepared, 90)


def test_the_plan_counts_what_was_read(trained: Path) -> None:
    """Epochs over all phases, what has been read so far, and max_epochs of them."""
    more = phases(trained, FIRST, "{train: {@a: 1}}")
    plan = prepared_with(trained, *more).plan
    assert plan is not None
    a = next(source for source in plan.totals if source.prefix.endswith("/a"))
    assert a.drawn == pytest.approx(32 * (32 * 2 / 3 + 64), abs=32)
    text = format_run_plan(plan)
    assert [line.split()[5] for line in text.splitlines() if "data.phases[0]" in line] == ["a"], "its short name"
    assert str(trained) not in text and "in epochs: a " in text
    assert "data.phases[0]" in text and "1 to 4" in text and "5 to 12" in text and "read so far, at sample 32" in text
    with pytest.raises(ConfigError, match="epochs over all phases") as caught:
        prepared_with(trained, *more, f"data.max_epochs={a.epochs * 0.99}")
    assert caught.value.number == 93 and prepared_with(trained, *more, f"data.max_epochs={a.epochs * 1.01}").plan
    assert json.dumps(plan.describe())


def test_a_longer_context_is_not_forgotten_in_a_phase_of_shorter_samples() -> None:
    lengths = ("[{samples: 8, train: {x: 1}, seq_length: 64}, {samples: 8, train: {x: 1}}, "
               "{train: {x: 1}, rope_theta: 500000}]")  # fmt: skip
    config = config_for(["model.vocab_size=301", f"data.phases={lengths}", "data.seq_length=32"])
    longest = [config.after_samples(count).described_model.max_position_embeddings for count in (0, 8, 9, 16, 17)]
    assert longest == [64, 64, 64, 64, 32], "with another RoPE a model begins anew"


def test_the_plan_of_a_run_whose_batch_has_changed_counts_what_will_be_read(trained: Path) -> None:
    """4 of 12 steps of 8 samples are behind it: the limit, the table and the forecast count the others as they are."""
    for size, samples in ((16, 32 + 8 * 16), (4, 32 + 8 * 4)):
        more = (f"train.global_batch_size={size}", "--accept=train.global_batch_size")
        plan = prepared_with(trained, *more).plan
        assert plan is not None and plan.tokens == 32 * samples and plan.consumed == 32
        text = format_run_plan(plan)
        assert f"plan of 12 steps, {32 * samples:,} tokens" in text and "1 to 12" in text
        a = max(plan.totals, key=lambda source: source.epochs)
        assert prepared_with(trained, *more, f"data.max_epochs={a.epochs * 1.01}").plan
        with pytest.raises(ConfigError, match=rf"{a.drawn:,} tokens drawn"):
            prepared_with(trained, *more, f"data.max_epochs={a.epochs * 0.99}")
        config = config_for(overrides(trained / "data", trained / "run", more[0], "train.dry_run=true"))
        told = describe_dry_run(prepare(config, 1), 1)
        assert f"time: {32 * (samples - 32):,} of {32 * samples:,} tokens" in told and text.splitlines()[0] in told
        three = [*more, *phases(trained, FIRST, "{samples: 32, train: {@a: 1}}", "{train: {@b: 1}}")]
        coming = prepared_with(trained, *three).plan
        assert coming is not None and coming.phases[1].steps == (5, 4 + 32 // size)
        assert coming.phases[2].steps == (5 + 32 // size, 12) and coming.phases[0].steps == (1, 4)
    # A config that names the new mix alone is looked at as the run goes on: behind what has been drawn.
    mixed = overrides(trained / "data", trained / "run", f"data.train={{{trained}/data/c: 1}}", more[0])
    there, course = in_progress(config_for(mixed))
    assert [phase.first for phase in there.phases] == [0, 32] and course.num_samples == 32 + 8 * 4
    assert "read so far, at sample 32" in describe_dry_run(prepare(config_for([*mixed, "train.dry_run=true"]), 1), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.order=megatron", "data.order=megatron cannot have data.phases"),
        ("data.train=x", "cannot stand beside data.phases"),
        ("data.phases=[{train: {x: 1}}, {train: {y: 1}}]", "must be one length"),
        ("data.phases=[{train: {x: 1}, samples: 2, steps: 3}, {train: {y: 1}}]", "samples and steps"),
        ("data.phases=[{train: {x: 0}}]", "data.phases[0].train[x]=0.0 must be a positive number"),
        ("data.phases=[{trian: {x: 1}}]", "did you mean data.phases[0].train?"),
        ("data.phases=[]", "is empty"),
        ("data.phases=[{train: {x: 1}, steps: 1}, {train: {x: 1}, seq_length: 7}]", "data.phases[1]: "),
    ],
)
def test_phases_that_cannot_be_are_refused_by_name(change: str, said: str) -> None:
    arguments = ["model.vocab_size=301", "data.phases=[{train: {x: 1}}]", change]
    if "seq_length: 7" in change:
        arguments += ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    with pytest.raises(ConfigError) as caught:
        config_for(arguments).validate(2)
    assert said in str(caught.value)


def test_a_source_with_fill_in_the_middle_need_not_be_in_every_phase() -> None:
    phases = "data.phases=[{train: {x: 1, y: 1}, steps: 1}, {train: {y: 1}, seq_length: 64}]"
    config = config_for(["model.vocab_size=301", "data.train=null", phases, "data.fim={x: {}}"])
    config.validate(1)
    assert [config.in_phase(phase).data.fim == config.data.fim for phase in config.phases] == [True, False]


def test_a_ramp_of_the_batch_size_is_a_function_of_consumed_samples(trained: Path, tmp_path: Path) -> None:
    """4, 4, 6, 6, 8, 8, 8: one that stops and goes on is the same to the bit, with Muon, and has the samples of any
    other."""
    ramp = "train.batch_size_ramp={start: 4, increment: 2, samples: 16}"
    fixed = (ramp, "train.eval_samples=2", "schedule.decay_steps=7", "checkpoint.save_interval_steps=4",
             "optimizer.style=muon")  # fmt: skip

    def at(folder: str, steps: int) -> list[str]:
        return overrides(trained / "data", tmp_path / folder, *fixed, f"train.num_steps={steps}")

    for folder, steps in (("whole", 7), ("parts", 4), ("parts", 7)):
        assert train_here(0, at(folder, steps)) == 0
    lines = metrics(tmp_path / "whole")
    consumed = [line["consumed_samples"] for line in lines]
    assert consumed == [4, 8, 14, 20, 28, 36, 44] and lines[-1]["consumed_tokens"] == 44 * 32
    assert checkpoint_bytes(tmp_path / "parts", 7) == checkpoint_bytes(tmp_path / "whole", 7)
    prepared = prepare(config_for(at("new", 7)), 1)
    assert names(prepared, 44) == names(prepared_with(trained), 44)
    assert prepared.plan is not None and "1 to 7" in format_run_plan(prepared.plan) and prepared.plan.tokens == 44 * 32
    said = "from 4 to 8 samples, which step 5 is the first to have"
    assert said in format_run_plan(prepared.plan) and "warm-up of 2 steps ends at sample 8" in prepared.plan.ramp


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.batch_size_ramp={start: 4, increment: 3, samples: 16}", "must lead to train.global_batch_size=8"),
        ("train.batch_size_ramp={start: 8, increment: 1, samples: 16}", "must lead to train.global_batch_size=8"),
        ("train.batch_size_ramp={start: 4, increment: 2, samples: 0}", "train.batch_size_ramp.samples=0"),
        ("train.batch_size_ramp={start: 5, increment: 3, samples: 9}", "5 samples a step must be a multiple of"),
        ("train.deterministic_reduction=tree", "is not for train.batch_size_ramp"),
    ],
)
def test_ramps_that_cannot_be_are_refused(change: str, said: str) -> None:
    ramp = "train.batch_size_ramp={start: 4, increment: 2, samples: 16}"
    config = config_for(["model.vocab_size=301", "train.global_batch_size=8", "train.micro_batch_size=2", ramp, change])
    with pytest.raises(ConfigError) as caught:
        config.validate(1)
    assert said in str(caught.value)


def test_a_run_through_phases_goes_on_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    """Another mix, then a longer context with another RoPE: N + N steps of Muon are 2N, in every byte; the checkpoint
    is a model of the RoPE that it was trained with."""
    more = phases(trained, "{steps: 2, train: {@a: 2, @b: 1}}", "{steps: 1, train: {@a: 1, @c: 1}}",
                  "{train: {@a: 1}, seq_length: 64, rope_theta: 50000}")  # fmt: skip
    fixed = ("schedule.decay_steps=5", "train.eval_samples=2", "optimizer.style=muon", *more)

    def at(folder: str, steps: int) -> list[str]:
        return overrides(trained / "data", tmp_path / folder, *fixed, f"train.num_steps={steps}")

    assert train_here(0, at("whole", 5)) == 0
    assert train_here(0, at("parts", 3)) == 0
    newest = newest_checkpoint(tmp_path / "parts")
    assert newest is not None and saved_model(newest).rope_theta == 10_000
    shutil.rmtree(tmp_path / "parts" / "tensorboard", ignore_errors=True)
    assert train_here(0, at("parts", 5)) == 0
    assert metrics(tmp_path / "parts")[-1]["samples_digest"] == metrics(tmp_path / "whole")[-1]["samples_digest"]
    assert checkpoint_bytes(tmp_path / "parts", 5) == checkpoint_bytes(tmp_path / "whole", 5)
    newest = newest_checkpoint(tmp_path / "parts")
    assert newest is not None and saved_model(newest).rope_theta == 50_000
    assert saved_model(newest).max_position_embeddings == 64
    assert [line["consumed_tokens"] for line in metrics(tmp_path / "whole")] == [256, 512, 768, 1280, 1792]


def test_ranks_share_the_samples_of_phases(trained: Path, tmp_path: Path) -> None:
    """Two data-parallel ranks that gather each other's weights, through another mix and another length, have the
    samples of one process; they evaluate a single micro-batch, which one of them computes for the other's sake."""
    more = phases(trained, "{steps: 1, train: {@a: 2, @b: 1}}", "{train: {@a: 1, @c: 1}, seq_length: 64}")
    fixed = ("train.eval_samples=2", "train.eval_interval_steps=3", "train.num_steps=3", *more)
    one, two = (overrides(trained / "data", tmp_path / name, *fixed) for name in ("one", "two"))
    assert train_here(0, one) == 0
    assert run_distributed(2, train_here, [*two, "parallel.shard=weights"]) == [0, 0]
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["samples_digest"] == theirs["samples_digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert metrics(tmp_path / "two")[-1]["valid/x/loss"] == pytest.approx(metrics(tmp_path / "one")[-1]["valid/x/loss"])


def test_sources_of_past_phases_may_go(trained: Path, tmp_path: Path) -> None:
    """Their files are gone: the run goes on to the same bytes, counts and names; nobody reads what is past."""
    shutil.copytree(trained / "data", tmp_path / "data")
    more = phases(tmp_path, "{steps: 2, train: {@a: 2, @b: 1}}", "{train: {@a: 1, @c: 1}}")
    fixed = ("schedule.decay_steps=4", "train.eval_samples=2", "checkpoint.save_interval_steps=1",
             "checkpoint.keep_last=4")  # fmt: skip

    def at(folder: str, steps: int, *other: str) -> list[str]:
        return overrides(tmp_path / "data", tmp_path / folder, *fixed, *(other or more), f"train.num_steps={steps}")

    assert train_here(0, at("whole", 4)) == 0
    assert train_here(0, at("parts", 2)) == 0
    before = prepare(config_for(at("parts", 4)), 1)
    named = names(before, 32)
    (tmp_path / "data" / "b.bin").unlink()
    after = prepare(config_for(at("parts", 4)), 1)
    assert any(f"{tmp_path}/data/b is not there; only phases that are past" in note for note in after.notes)
    assert before.plan is not None and after.plan is not None
    assert format_run_plan(after.plan) == format_run_plan(before.plan) and after.accepted_changes == ()
    data = open_train_data(after.config, absent=after.absent)
    assert [(data.fingerprints[s], epoch, window) for s, epoch, window in data.sample_ids(0, 32)] == named
    past = next(i for i in range(16) if data.names[data.sample_id(i).source] == "b")
    for look in (data.tokens, data.locate, lambda i: data.read(i, 1)):
        with pytest.raises(DataError, match=r"E330.*b\.bin is not there.*the rest of the run does without"):
            look(past)
    assert train_here(0, at("parts", 4)) == 0
    assert metrics(tmp_path / "parts")[-1]["samples_digest"] == metrics(tmp_path / "whole")[-1]["samples_digest"]
    assert checkpoint_bytes(tmp_path / "parts", 4) == checkpoint_bytes(tmp_path / "whole", 4)
    # From a checkpoint that is not as far, and for a new run, it is still needed.
    for folder, step in (("parts", 1), ("new", 0)):
        for later in range(step + 1, 5):
            shutil.rmtree(tmp_path / folder / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
        with pytest.raises(DataError, match=r"E330.*b.bin is missing"):
            prepare(config_for(at(folder, 4)), 1)


def test_another_mix_does_not_need_the_sources_of_the_old_one(trained: Path, tmp_path: Path) -> None:
    """``data.train`` alone, accepted: what was drawn before is carried on as a phase, whose files are gone."""
    shutil.copytree(trained, tmp_path / "all")
    folder = tmp_path / "all"
    arguments = overrides(
        trained / "data", folder / "run", f"data.train={{{trained}/data/c: 1}}", "--accept=data.train"
    )
    expected = prepare(config_for(arguments), 1, accepted=accepted_by(arguments))
    for name in "ab":
        (trained / "data" / f"{name}.idx").rename(folder / f"{name}.idx")
    try:
        taken = prepare(config_for(arguments), 1, accepted=accepted_by(arguments))
    finally:
        for name in "ab":
            (folder / f"{name}.idx").rename(trained / "data" / f"{name}.idx")
    assert sorted(Path(prefix).name for prefix in taken.absent) == ["a", "b"]
    assert taken.config == expected.config and taken.identity == expected.identity and taken.plan == expected.plan
