"""The loop itself: when it reads what a step found."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.train import loop
from megatron_hammer.train.late_numbers import LateNumbers
from megatron_hammer.train.step import StepReport
from tests.distributed import run_distributed
from tests.train.runs import ROOT, checkpoint_bytes, metrics, overrides, train_here, write_fim_tokenizer


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reading_a_step_later_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What a GPU's loop does, on a CPU: each step is read when the next has been launched (but for those that save or
    evaluate), and every line and every byte of the checkpoints is the same; in fp16 with steps that are skipped.
    """
    outputs, waiting = (tmp_path / "at once", tmp_path / "later"), set[int]()
    read = loop.TrainLoop._read

    def noted(run: loop.TrainLoop, lag: int, *more: object) -> bool:
        stopped = read(run, lag, *more)
        waiting.add(len(run.pending))
        return stopped

    monkeypatch.setattr(loop.TrainLoop, "_read", noted)
    for lag, output in enumerate(outputs):
        monkeypatch.setitem(loop.READ_LAG_STEPS, "cpu", lag)
        waiting.clear()
        scaling = ("optimizer.initial_loss_scale=4194304", "optimizer.loss_scale_window=2")
        more = (f"train.precision={precision}", *scaling, "checkpoint.keep_last=4")
        assert train_here(0, overrides(data, output, *more)) == 0
        assert waiting == {0, lag}
    at_once, later = (metrics(output) for output in outputs)
    assert at_once == later and len(later) == 12
    assert any(line["skipped"] for line in later) == (precision == "fp16")
    for step in (3, 6, 9, 12):
        written = checkpoint_bytes(outputs[0], step)
        assert written and written == checkpoint_bytes(outputs[1], step)
        one, other = (read_manifest(o / "checkpoints" / f"step-{step:08d}") for o in outputs)
        assert one.state == other.state and one.state["consumed_samples"] == 8 * step


def test_a_step_is_not_read_behind_the_next_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU reads a tensor when all is done that its stream was given before. So what was on the device is gone here
    when the next step has been launched, and only what was copied before that is left."""

    class Copies(LateNumbers):
        def __init__(self, tensors: Sequence[Tensor], *more: Any) -> None:
            super().__init__([tensor.clone() for tensor in tensors], *more)

    step = loop.TrainLoop._step

    def next_step(run: loop.TrainLoop, number: int) -> StepReport:
        report = step(run, number)
        for before in run.pending:
            for tensor in (before.report.loss, before.report.grad_norm, before.report.by_source):
                tensor.fill_(torch.nan)
            for check in (before.report.drift, before.report.corruption):
                assert check is not None
                check.found.fill_(True)
        return report

    monkeypatch.setitem(loop.READ_LAG_STEPS, "cpu", 1)
    monkeypatch.setattr(loop.TrainLoop, "_step", next_step)
    monkeypatch.setattr(loop, "LateNumbers", Copies)
    more = ("checkpoint.save_interval_steps=null", "data.valid=null", "train.num_steps=4",
            "train.drift_check_interval_steps=1", "train.sdc_check_interval_steps=1")  # fmt: skip
    assert train_here(0, overrides(data, tmp_path / "run", *more)) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and all(math.isfinite(line["loss"] + line["grad_norm"]) for line in lines)


def test_numbers_are_copied_behind_their_step_and_nothing_else_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for a GPU's tensors and streams: begun when it is made, beside the step's stream, which waits for
    nothing; and one event is waited for."""
    calls = list[str]()
    beside: Any = SimpleNamespace(device="cuda:3", wait_stream=lambda other: calls.append(f"behind {other}"))

    def record(stream: Any) -> None:
        calls.append("recorded" if stream is beside else "elsewhere")

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        calls.append("beside" if stream is beside else "elsewhere")
        yield
        calls.append("back")

    event = SimpleNamespace(record=record, synchronize=lambda: calls.append("waited for"))
    stand_ins = {"Event": lambda blocking: event, "current_stream": lambda device: f"step on {device}", "stream": on}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def to(place: str, non_blocking: bool) -> Tensor:
        calls.append(f"{place}, {non_blocking}")
        return torch.ones(())

    number = SimpleNamespace(to=to, record_stream=lambda stream: calls.append("kept" if stream is beside else "lost"))
    numbers: Any = [number, number]
    late = LateNumbers(numbers, SimpleNamespace(wait=lambda: calls.append("the sum over ranks")), beside)
    copied = ["kept", "kept", "cpu, True", "cpu, True", "recorded"]
    assert calls == ["behind step on cuda:3", "beside", "the sum over ranks", *copied, "back"]
    calls.clear()
    assert [float(x) for x in late.wait()] == [1.0, 1.0] and calls == ["waited for"]


def test_the_next_step_does_not_wait_for_a_sum_over_all_ranks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes behind the messages that bring the new weights together, which the next forward is there to hide."""
    calls, step = list[str](), loop.TrainLoop._step

    def summed(words: Tensor, group: Any, async_op: bool = False) -> Any:
        calls.append("sum begun")
        return SimpleNamespace(wait=lambda: calls.append("waited for"))

    def next_step(run: loop.TrainLoop, number: int) -> StepReport:
        calls.append("step")
        return step(run, number)

    monkeypatch.setitem(loop.READ_LAG_STEPS, "cpu", 1)
    monkeypatch.setattr(loop.TrainLoop, "_step", next_step)
    monkeypatch.setattr(loop, "all_reduce", summed)
    more = ("checkpoint.save_interval_steps=null", "data.valid=null", "train.num_steps=3")
    assert train_here(0, overrides(data, tmp_path / "run", *more)) == 0
    begun = ["step", "sum begun"]
    assert calls == [*begun, *begun, "waited for", *begun, "waited for", "waited for"]


def test_a_run_with_fill_in_the_middle_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Cuts and forms are those of the sample, whenever it is read: stopped after 2 of 4 steps, and never stopped."""
    write_fim_tokenizer(tmp_path / "tokenizer")
    fim = f"data.fim={{{data}/a: {{rate: 0.9}}}}"
    more = (f"tokenizer.path={tmp_path}/tokenizer", "checkpoint.save_interval_steps=2", "schedule.decay_steps=4",
            "data.valid=null")  # fmt: skip
    for name, steps, what in (
        ("whole", 4, fim),
        ("stopped", 2, fim),
        ("stopped", 4, fim),
        ("plain", 2, "data.fim=null"),
    ):
        assert train_here(0, overrides(data, tmp_path / name, *more, f"train.num_steps={steps}", what)) == 0
    whole = metrics(tmp_path / "whole")
    assert len(whole) == 4 and whole == metrics(tmp_path / "stopped")
    assert checkpoint_bytes(tmp_path / "whole", 4) == checkpoint_bytes(tmp_path / "stopped", 4)
    plain = metrics(tmp_path / "plain")
    assert all(line["loss"] != other["loss"] for line, other in zip(whole[:2], plain, strict=True)), "it was at work"


PACKAGE = str(ROOT / "megatron_hammer") + os.sep


def _unnoted_reads(rank: int, arguments: list[str]) -> set[str]:
    """The functions that read a tensor on the host while no slot of this rank says that it waits."""
    slots, found = list[StatusSlot](), set[str]()
    made = StatusSlot.__init__

    def make(self: StatusSlot, *args: Any) -> None:
        made(self, *args)
        slots.append(self)

    def watched(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(tensor: torch.Tensor) -> Any:
            code = sys._getframe(1).f_code
            if code.co_filename.startswith(PACKAGE) and not any(slot.is_waiting for slot in slots):
                found.add(f"{Path(code.co_filename).stem}.{code.co_name}")
            return read(tensor)

        return reading

    def wait(numbers: LateNumbers, real: Any = LateNumbers.wait) -> list[torch.Tensor]:
        if not any(slot.is_waiting for slot in slots):
            found.add("LateNumbers.wait")
        return real(numbers)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatusSlot, "__init__", make)
        patch.setattr(LateNumbers, "wait", wait)
        for name in ("tolist", "item", "cpu", "__float__", "__int__", "__bool__", "__index__"):
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
        assert train_here(rank, arguments) == 0
    return found


def test_whoever_reads_what_ranks_have_sent_notes_that_it_waits(data: Path, tmp_path: Path) -> None:
    """NCCL returns when a collective has been launched, so the host waits for the others where it reads the result: a
    rank that said nothing of it would be named beside, or in place of, the one that hangs (``parallel/observe.py``)."""
    more = ("train.num_steps=2", "train.drift_check_interval_steps=1", "train.sdc_check_interval_steps=1",
            "train.eval_samples=2", "checkpoint.mode=background")  # fmt: skip
    on_the_host = {"loop._read", "loop.<listcomp>"}  # copies that have been waited for
    of_this_rank = {"cpu.adamw", "write.chunks_of", "optimizer.scalar_state", "optimizer.<dictcomp>"} | on_the_host
    for found in run_distributed(2, _unnoted_reads, overrides(data, tmp_path / "run", *more)):
        assert {"write.chunks_of"} < found <= of_this_rank
