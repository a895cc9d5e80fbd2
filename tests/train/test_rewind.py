"""A run that goes back from a spike equals one that knew its ledger from the start, whatever stops it on the way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_hammer.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    RefusedError,
    from_exception,
)
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.config.phases import Course, Phase
from megatron_hammer.evaluation.checkpoint_process import evaluate_checkpoint
from megatron_hammer.sampling.ledger import LEDGER, read_ledger
from megatron_hammer.sampling.order import SampleId
from megatron_hammer.sampling.phases import Skips
from megatron_hammer.sampling.samples import TrainData, open_train_data
from megatron_hammer.train import health, loop, rewind
from megatron_hammer.train.prepare import Prepared, find_starting_point
from megatron_hammer.train.rewind import BadStep
from tests.distributed import run_distributed
from tests.model.tiny import tiny_config
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides, train_here, write_fim_tokenizer

REWIND = ("train.on_spike=rewind", "train.spike_z_score=4", "checkpoint.keep_last=9", "train.eval_interval_steps=12")
BAD_PLACE = 65  # in the order: read by step 9, of 8 samples each


@contextmanager
def bad_samples(
    places: tuple[int, ...] = (BAD_PLACE,),
    seen: list[int] | None = None,
    named: Collection[SampleId] = (),
    factor: float = 100.0,
) -> Iterator[None]:
    """Steps that read one of these places of the order, or a sample of these names, have a loss and a norm that are
    spikes; with nan, that are not finite."""

    def spoil(_: Any, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t * factor for t in output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "SMALLEST_HISTORY", 4)
        step_of, hooks = loop.TrainLoop._step, list[Any]()

        def step(run: loop.TrainLoop, number: int) -> Any:
            while hooks:
                hooks.pop().remove()
            first = run.state.consumed_samples
            pieces = run.data.order.skips.pieces(first, run.batch_sizes.at(first))
            names = run.data.sample_ids(first, run.batch_sizes.at(first)) if named else ()
            if any(one in named for one in names) or any(
                first <= place < first + count for first, count in pieces for place in places
            ):
                last = [m for name, m in run.stages[0].named_modules() if name.endswith("norm")][-1]
                hooks.append(last.register_forward_hook(spoil))
                if seen is not None:
                    seen.append(number)
            return step_of(run, number)

        patch.setattr(loop.TrainLoop, "_step", step)
        yield


def _same(one: Path, other: Path, step: int = 12) -> None:
    assert metrics(one) == metrics(other)
    assert checkpoint_bytes(one, step) == checkpoint_bytes(other, step)
    digests = [read_manifest(p / "checkpoints" / f"step-{step:08d}").state_digest for p in (one, other)]
    assert digests[0] == digests[1] and digests[0] is not None


@pytest.fixture(scope="module")
def rewound(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that has gone back from its step 9, whose window is steps 8 and 9, to step 6."""
    output = tmp_path_factory.mktemp("rewound") / "run"
    seen: list[int] = []
    with bad_samples(seen=seen):
        assert train_here(0, overrides(data, output, *REWIND)) == 0
    assert seen == [9]
    return output


def test_a_run_with_the_ledger_of_one_that_went_back_is_the_same(data: Path, tmp_path: Path, rewound: Path) -> None:
    lines = [json.loads(line) for line in (rewound / LEDGER).read_text().splitlines()]
    assert lines == [{"rewind": 1, "step": 9, "finding": "spike", "back_to_step": 6, "skipped_samples": [[56, 72]]}]
    assert [line["step"] for line in metrics(rewound)] == list(range(1, 13))
    kept = (rewound / "incidents" / "step-00000009.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [7, 8, 9], "metrics of the steps taken back"
    assert json.loads((rewound / "incidents" / "step-00000009.json").read_text())["action"] == "rewind"
    states = [read_manifest(path).state for path in sorted((rewound / "checkpoints").glob("step-*"))]
    assert [state.get("rewinds") for state in states] == [None, None, lines, lines]
    again = tmp_path / "again"
    assert train_here(0, overrides(data, again, *REWIND, f"train.replay={rewound}")) == 0
    _same(rewound, again)


def test_killed_before_in_and_after_a_rewind(
    data: Path, tmp_path: Path, rewound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And numbers that are read one step late, as on a GPU, change nothing."""
    monkeypatch.setitem(loop.READ_LAG_STEPS, "cpu", 1)
    output, killed = tmp_path / "run", list[str]()

    def dies(name: str, before: bool) -> Any:
        real = getattr(rewind, name)

        def call(*args: Any) -> Any:
            if before or real(*args) is None:
                killed.append(name)
                raise KeyboardInterrupt

        return call

    with bad_samples():
        for name, before in (("replace_file", True), ("replace_file", False), ("settle", True)):
            with monkeypatch.context() as patch:
                patch.setattr(rewind, name, dies(name, before))
                with pytest.raises(KeyboardInterrupt):
                    train_here(0, overrides(data, output, *REWIND))
            if name == "settle":
                assert read_ledger(output / LEDGER) == read_ledger(rewound / LEDGER)
            else:
                (output / LEDGER).unlink(missing_ok=True)
        assert train_here(0, overrides(data, output, *REWIND)) == 0
    assert killed == ["replace_file", "replace_file", "settle"]
    _same(rewound, output)
    (output / LEDGER).unlink()  # a checkpoint brings its ledger with it
    shutil.rmtree(output / "checkpoints" / "step-00000012")
    assert train_here(0, overrides(data, output, *REWIND)) == 0
    _same(rewound, output)


def test_a_wide_window_takes_checkpoints_back_and_a_start_passes_over_them(data: Path, tmp_path: Path) -> None:
    output, more = tmp_path / "run", (*REWIND, "train.rewind_skip_steps_before=3", "train.rewind_skip_steps_after=1")
    with bad_samples(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewind, "set_aside", lambda path: path)  # killed before that
        patch.setattr(rewind, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_here(0, overrides(data, output, *more))
    (line,) = read_ledger(output / LEDGER) or ()
    assert (line.back_to_step, line.skipped) == (3, ((40, 80),))
    start = find_starting_point(config_for(overrides(data, output, *more)))
    assert start.resume is not None and start.resume.step == 3 and not start.damaged
    assert [found.step for found in start.taken_back] == [6]
    with bad_samples():
        assert train_here(0, overrides(data, output, *more)) == 0
        again = tmp_path / "again"
        assert train_here(0, overrides(data, again, *more, f"train.replay={output / LEDGER}")) == 0
    _same(output, again)


def test_a_run_without_a_checkpoint_begins_anew_and_spikes_that_go_on_end_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--accept fresh`` is about what the start found in the folder: a rewind to the beginning has a ledger there."""
    output, more = tmp_path / "run", (*REWIND, "checkpoint.save_interval_steps=12", "train.max_rewinds=2")
    fresh, build = list[bool](), loop.TrainLoop.__init__

    def built(run: loop.TrainLoop, prepared: Prepared, *args: Any, **kwargs: Any) -> None:
        fresh.append(prepared.is_fresh)
        build(run, prepared, *args, **kwargs)

    with bad_samples((BAD_PLACE, 66)), monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "__init__", built)
        assert train_here(0, overrides(data, output, *more, "--accept=fresh")) == 0
    assert fresh == [True, False]
    assert [(one.back_to_step, one.skipped) for one in read_ledger(output / LEDGER) or ()] == [(0, ((56, 72),))]
    assert (output / "incidents" / "step-00000009.metrics.jsonl").read_text().count("\n") == 9
    with bad_samples(tuple(range(64, 200))), pytest.raises(NonFiniteError) as caught:
        train_here(0, overrides(data, tmp_path / "stop", *more))
    assert (caught.value.code, caught.value.exit_code) == ("E905", 9)
    assert "once more, after 2 rewinds to step 0" in str(caught.value)
    found = read_ledger(tmp_path / "stop" / LEDGER) or ()
    assert [one.skipped for one in found] == [((56, 72),), ((48, 56), (72, 80))]
    assert len(list((tmp_path / "stop" / "incidents").glob("*.json"))) == 3, "each is kept"


def test_ledgers_that_do_not_belong_here(data: Path, tmp_path: Path, rewound: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(rewound, output)
    config = config_for(overrides(data, output, *REWIND))
    good = (output / LEDGER).read_text()
    other = good.replace("[[56, 72]]", "[[56, 64]]")
    (output / LEDGER).write_text(other)
    with pytest.raises(RefusedError, match=r"E589.*other rewinds"):
        find_starting_point(config)
    (output / LEDGER).write_text(good + '{"rewind": 2')  # torn: no line
    assert len(find_starting_point(config).rewinds) == 1
    for wrong in ("[]", good.replace('"spike"', '"x"'), good.replace("9", "-9"), good * 2, good.replace("72", "1e9"),
                  good.replace("[[56, 72]]", "[]"), good.replace("[[56, 72]]", "[[72, 56]]"), "\0" * 9):  # fmt: skip
        (output / LEDGER).write_text(wrong + "\n")
        with pytest.raises(CheckpointError, match=r"E436.*ledger\.jsonl:[12] is not a line"):
            find_starting_point(config)
    with pytest.raises(ConfigError, match=r"E223\]: train.replay=.*is not there"):
        find_starting_point(config_for(overrides(data, tmp_path / "new", f"train.replay={tmp_path / 'none'}")))
    with pytest.raises(ConfigError, match=r"E223\]: train.on_spike=rewind is not for data.order=megatron"):
        config_for(overrides(data, tmp_path / "new", *REWIND, "data.order=megatron")).validate(1)


def test_an_output_below_a_file_is_no_matter_of_its_ledger(data: Path, tmp_path: Path) -> None:
    """But of the path: exit code 6, not that of a bad checkpoint."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as refused:
        train_here(0, overrides(data, tmp_path / "file" / "run"))
    error = from_exception(refused.value, "training")
    assert error is not None and error.code == "E601" and "a part of it is a file" in str(error)


def _fails_on_one(rank: int, arguments: list[str]) -> str:
    lost = DataError(30, "a.idx", "is missing", "bring it back")
    with bad_samples(), pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(rewind, "settle", lambda *_: (_ for _ in ()).throw(lost))
        with pytest.raises(DataError) as caught:
            train_here(rank, arguments)
    return str(caught.value)


def test_a_rank_that_cannot_go_on_from_there_ends_all(data: Path, tmp_path: Path) -> None:
    found = run_distributed(2, _fails_on_one, overrides(data, tmp_path / "run", *REWIND))
    assert len(set(found)) == 1 and "a.idx is missing" in found[0]


def test_through_phases_a_ramp_and_fill_in_the_middle(data: Path, tmp_path: Path) -> None:
    """Steps of 4, 6 and 8 samples: 9 goes back to 6, and 7 reads what it has read, for the window begins with 8. Then a
    longer context, whose checkpoint is evaluated as the run itself does it."""
    write_fim_tokenizer(tmp_path / "tokenizer")
    a, b, output = f"{data}/a", f"{data}/b", tmp_path / "run"
    more = (*REWIND, "data.train=null", f"tokenizer.path={tmp_path}/tokenizer", f"data.fim={{{a}: {{}}}}",
            f"data.phases=[{{steps: 10, train: {{{a}: 2, {b}: 1}}}}, {{train: {{{a}: 1, {b}: 3}}, seq_length: 64}}]",
            "train.batch_size_ramp={start: 4, increment: 2, samples: 36}")  # fmt: skip
    with bad_samples((40,)):
        assert train_here(0, overrides(data, output, *more)) == 0
    (line,) = read_ledger(output / LEDGER) or ()
    assert (line.step, line.back_to_step, line.skipped) == (9, 6, ((32, 46),))
    lines = metrics(output)
    assert [line["consumed_samples"] for line in lines] == [4, 8, 12, 16, 20, 26, 32, 38, 46, 54, 62, 70]
    assert lines[-1]["consumed_tokens"] == 54 * 32 + 16 * 64
    kept = (output / "incidents" / "step-00000009.metrics.jsonl").read_text().splitlines()
    before = {line["step"]: line["samples_digest"] for line in map(json.loads, kept)}
    now = {line["step"]: line["samples_digest"] for line in lines}
    assert before[7] == now[7] and before[8] != now[8]
    again = tmp_path / "again"
    assert train_here(0, overrides(data, again, *more, f"train.replay={output}")) == 0
    _same(output, again)
    task = {"checkpoint": str(output / "checkpoints" / "step-00000012"), "sets": {"x": f"{data}/x"}, "samples": 10,
            "device": "cpu", "threads": 1}  # fmt: skip
    found = evaluate_checkpoint(task)
    assert found["evaluation/x/loss"] == lines[-1]["valid/x/loss"]
    assert found["evaluation/x/bits_per_byte"] == pytest.approx(lines[-1]["valid/x/bits_per_byte"])


def test_what_is_left_out_over_phases_does_not_come_again(data: Path) -> None:
    """Windows within a phase, over its end, and in a phase before that of the last one: none of their samples is read
    from there on, and those of which nothing was left out keep their place."""
    a, b, x, total = str(data / "a"), str(data / "b"), str(data / "x"), 160
    shares = {a: 2.0, b: 1.0}, {b: 1.0}, {a: 1.0, x: 3.0}
    ends = ((0, 36), (36, 60), (60, None))
    phases = [Phase(f"{i}", *at, train, "share", 32, 1.0, None) for i, (at, train) in enumerate(zip(ends, shares))]
    for windows in ((40, 44), (32, 40), (50, 70), (30, 33), (30, 62), (8, 12)), ((140, 143), (4, 6)):
        now, unwanted = TrainData(phases, 32, 7), set[SampleId]()
        for start, end in windows:
            before = now.sample_ids(0, start)
            unwanted |= set(now.sample_ids(start, end - start))
            found = rewind.left_out(start, end, total, now)
            now = now.with_skips(Skips(tuple(sorted((*now.order.skips.ranges, *found)))))
            assert not unwanted & set(now.sample_ids(start, total - start)), (start, end)
            assert now.sample_ids(0, start) == before
    assert rewind.left_out(2, 4, total, TrainData(phases, 32, 7)) == ((2, 4),)


def test_a_run_whose_batches_became_smaller_ends_where_they_end() -> None:
    """Not at num_steps times the present one, which may lie behind the bad step."""
    config = tiny_config(train__num_steps=20, train__global_batch_size=4)
    assert config.course(0, 0).num_samples == config.course().num_samples == 80
    assert config.course(15, 15 * 16).num_samples == 15 * 16 + 5 * 4
    assert config.course(20, 320).num_samples == config.course(21, 320).num_samples == 320


def test_a_window_ends_where_samples_have_another_length(data: Path, tmp_path: Path) -> None:
    """Phases of samples [0, 64), [64, 80), [80, 96) and [96, ...), of 32, 32, 64 and 32 tokens."""
    mixes = ", ".join(f"{{{at}train: {{{data}/a: 1}}, seq_length: {length}}}" for at, length in
                      (("samples: 64, ", 32), ("samples: 16, ", 32), ("samples: 16, ", 64), ("", 32)))  # fmt: skip
    config = config_for(overrides(data, tmp_path, *REWIND, "data.train=null", f"data.phases=[{mixes}]",
                                  "train.rewind_skip_steps_after=2", "train.num_steps=20"))  # fmt: skip
    bad = [BadStep(1 + first // 8, "spike", first, "") for first in (56, 64, 72, 80, 88, 96)]
    courses = [config.course(step.step - 1, step.first_sample) for step in bad]
    windows = [rewind._window(step, config, course, 0) for step, course in zip(bad, courses, strict=True)]
    assert windows == [(48, 80), (56, 80), (64, 80), (80, 96), (80, 96), (96, 120)]
    assert rewind._window(bad[0], config, courses[0], 56) == (56, 80)
    larger = Course(config.batch_sizes, 20, (0, 1, 2, 3), (0, 16, 32, 56))  # the steps before it had 16 and 24 samples
    assert rewind._window(BadStep(4, "spike", 56, ""), config, larger, 0) == (32, 80)


def test_a_step_that_is_not_finite_over_the_end_of_a_phase(data: Path, tmp_path: Path) -> None:
    """The bad sample is one of the second phase, whose first samples step 9 reads; and limits begin anew with it."""
    output = tmp_path / "run"
    more = ("train.on_nonfinite=rewind", "checkpoint.keep_last=9", "train.eval_interval_steps=12", "data.train=null",
            f"data.phases=[{{samples: 68, train: {{{data}/a: 1}}}}, {{train: {{{data}/b: 1}}}}]")  # fmt: skip
    named, seen = open_train_data(config_for(overrides(data, output, *more))).sample_ids(69, 1), list[int]()
    with bad_samples((), seen, named, math.nan):
        assert train_here(0, overrides(data, output, *more)) == 0
    assert seen == [9], "once"
    lines = [json.loads(line) for line in (output / LEDGER).read_text().splitlines()]
    assert [(line["finding"], line["skipped_samples"]) for line in lines] == [("nonfinite", [[56, 68], [80, 84]])]
    assert json.loads((output / "incidents" / "step-00000009.json").read_text())["action"] == "rewind"
    again = tmp_path / "again"
    assert train_here(0, overrides(data, again, *more, f"train.replay={output}")) == 0
    _same(output, again)
    assert read_manifest(output / "checkpoints" / "step-00000012").state["health"]["since"] == 9


def _ranks(rank: int, arguments: list[str], replayed: list[str]) -> None:
    with bad_samples():
        assert train_here(rank, arguments) == 0
        assert train_here(rank, replayed) == 0


def test_in_a_pipeline(data: Path, tmp_path: Path) -> None:
    more = (*REWIND, "parallel.pipeline_model_parallel_size=2", "train.rewind_skip_steps_before=0")
    one, other = tmp_path / "one", tmp_path / "other"
    run_distributed(2, _ranks, overrides(data, one, *more), overrides(data, other, *more, f"train.replay={one}"))
    assert [rewound.skipped for rewound in read_ledger(one / LEDGER) or ()] == [((64, 72),)]
    _same(one, other)


def test_on_four_ranks(data: Path, tmp_path: Path) -> None:
    """TP 2 x DP 2 with sharded weights: all ranks go back together; the incident names ranks and documents."""
    more = (*REWIND, "parallel.tensor_model_parallel_size=2", "parallel.shard=weights", "train.micro_batch_size=2",
            "train.rewind_skip_steps_before=0")  # fmt: skip
    one, other = tmp_path / "one", tmp_path / "other"
    run_distributed(4, _ranks, overrides(data, one, *more), overrides(data, other, *more, f"train.replay={one}"))
    assert [rewound.skipped for rewound in read_ledger(one / LEDGER) or ()] == [((64, 72),)]
    _same(one, other)
    assert (one / "incidents" / "step-00000009.json").is_file()
