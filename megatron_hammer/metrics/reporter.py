"""Reports a run's figures: metrics.jsonl (every step, full precision), TensorBoard, trackers, lines on the terminal.

One JSON object a step. Floats are shortest exact decimals; what is not finite is null. MFU (model FLOPs utilisation)
is stated twice, by both counts of ``costs/flops.py``, which the caller hands over. Needs no torch.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_hammer.base.files import close_after, set_aside, writing
from megatron_hammer.base.progress import say
from megatron_hammer.base.terminal import View, can_redraw
from megatron_hammer.config import Config
from megatron_hammer.metrics.metrics_file import METRICS, MetricsFile, finite, split_key
from megatron_hammer.metrics.starts import STARTS, environment_of, note_start
from megatron_hammer.metrics.trackers import Trackers
from megatron_hammer.metrics.view import RunView

BOARD_BYTES = 100  # of a value among the events of TensorBoard, at least: what a full disk is said to lack
# TensorBoard shows groups by their names, and opens the first: that is the loss.
BOARD_GROUPS = {
    "grad_norm": "optimizer/",
    "lr": "optimizer/",
    "consumed_samples": "progress/",
    "consumed_tokens": "progress/",
    "skipped": "progress/",
    "tokens_per_second": "speed/",
    "mfu": "speed/",
    "mfu_causal": "speed/",
    "step_seconds": "speed/",
    "tflops_causal": "speed/",
    "memory_bytes": "speed/",
}
_EVENTS = "events.out.tfevents.*"


def board_folder(output: Path) -> Path:
    """Where a run's events for TensorBoard go, which calls a run by the folder below the one it is pointed at.

    ``OUT/tensorboard/NAME``, NAME being that of OUT: a run has its own name where TensorBoard is pointed at its folder.
    A run that goes on in a folder that was renamed keeps the name that it began with. Events of older versions, in
    ``OUT/tensorboard`` itself, are moved.
    """
    board = output / "tensorboard"
    if os.path.lexists(board) and not board.is_dir():
        say(f"{board} is no folder: kept as {set_aside(board).name}")
    events = sorted(board.glob(_EVENTS))
    begun = sorted({path.parent for path in board.glob(f"*/{_EVENTS}")})
    folder = begun[0] if len(begun) == 1 else board / output.resolve().name
    if events:
        folder.mkdir(parents=True, exist_ok=True)
    for path in events:
        path.rename(folder / path.name)
    return folder


class Reporter:
    """All outputs of rank 0. A context manager: closes them in any case."""

    def __init__(
        self,
        config: Config,
        first_step: int,
        flops: tuple[float, float],
        peak: float | None,
        devices: int,
        device_name: str = "cpu",
        memory: Callable[[], int] | None = None,
        heard: Callable[[Mapping[str, Any]], None] = lambda line: None,
        left: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> None:
        """Open them, and note the start.

        Args:
            first_step: the last that is done.
            peak: TFLOP/s of a device; None where it is not known.
            memory: asked at each step for the most bytes that this process has had.
            heard: called with each line that is written, whose numbers may be infinite or NaN, where the file has null.
            left: as for ``RunView``.
        """
        self.config, self.flops, self.devices, self.heard = config, flops, devices, heard
        self.peak = None if peak is None else peak * 1e12 * devices
        output = Path(config.train.output)
        self.file = MetricsFile(output / METRICS, first_step)
        self._last_step, self._memory = first_step, memory
        environment = environment_of(device_name, devices)
        self.board: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(board_folder(output)), purge_step=first_step + 1)
        self.view = View(sys.stderr) if can_redraw(sys.stderr) else None
        self._run_view = RunView(config.train.num_steps, first_step, left=left)
        self.trackers = Trackers(config, first_step > 0, environment, self.warn)
        try:
            note_start(output, first_step, environment, config)
        except OSError as error:  # which costs no run: the record is for reports
            self.warn(f"{output / STARTS} cannot be written ({error}): this start will not be in reports")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # one that cannot be closed keeps none of the others open
            stack.callback(self.trackers.close, failed=kind is not None)
            for output in (self.view, self.board, self.file):
                if output is not None:
                    stack.callback(close_after, output, error)

    def step(self, line: dict[str, Any], valid: Mapping[str, float | None]) -> None:
        """Record one step, with its evaluation if there was one."""
        rate = line["tokens_per_second"]
        for name, flops in zip(("mfu", "mfu_causal"), self.flops, strict=True):
            line[name] = None if self.peak is None else rate * flops / self.peak
        line["tflops_causal"] = rate * self.flops[1] / 1e12 / self.devices
        if self._memory is not None:
            line["memory_bytes"] = self._memory()
        line |= valid
        self._last_step = line["step"]
        self.file.write(line)
        self.trackers.log(finite(line))
        self._to_board(line)
        is_last = line["step"] == self.config.train.num_steps
        self._run_view.take(line)
        if self.view is not None:
            self.view.show(self._run_view.rows(), now=is_last)
        if valid or is_last or (line["step"] % self.config.log.interval_steps == 0 and not self._is_watched):
            self.say(_sentence(line, self.config.train.num_steps))
        self.heard(line)

    @property
    def _is_watched(self) -> bool:
        """Whether the view says to the reader of standard output what lines would."""
        return self.view is not None and sys.stdout.isatty()

    def saved(self, step: int) -> None:
        """A checkpoint has been committed."""
        self._run_view.saved(step)
        if self.view is not None:
            self.view.show(self._run_view.rows(), now=True)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """What ``train.evaluator`` found of a checkpoint, some steps later: TensorBoard has it at the checkpoint's
        step, trackers, which take steps in order only, at the present one with ``evaluation/step`` beside it."""
        values = {key: value for key, value in line.items() if key != "step"}
        self.trackers.log({"step": self._last_step, "evaluation/step": line["step"], **values})
        self._to_board(line)
        shown = ", ".join(
            f"{key.removeprefix('evaluation/')} {value:.4f}" for key, value in values.items() if value is not None
        )
        self.say(f"evaluation of step {line['step']}: {shown}")

    def _to_board(self, line: Mapping[str, Any]) -> None:
        """Show what is a finite number."""
        if self.board is None:
            return
        with writing(self.board.log_dir, BOARD_BYTES):
            for key, value in line.items():
                if isinstance(value, int | float) and key != "step" and math.isfinite(value):
                    self.board.add_scalar(BOARD_GROUPS.get(key, "") + key, value, line["step"])

    def sync(self) -> None:
        """Bring all lines to the disk: before a checkpoint is committed."""
        self.file.sync()
        if self.board is not None:
            with writing(self.board.log_dir, BOARD_BYTES):
                self.board.flush()

    def say(self, text: str) -> None:
        """One line for people, above the view where there is one."""
        if self.view is not None:
            self.view.above(text, sys.stdout)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A warning, on stderr; also from a tracker's thread."""
        if self.view is not None:
            self.view.above(text, sys.stderr)
        else:
            say(text)


def _perplexity(loss: float) -> str:
    """exp(loss), in four digits."""
    if math.isnan(loss):
        return "nan"
    return f"{math.exp(loss):,.4g}" if loss < 100 else "inf"


def _sentence(line: Mapping[str, Any], num_steps: int) -> str:
    parts = [
        f"step {line['step']}/{num_steps}",
        f"loss {line['loss']:.4f}",
        f"perplexity {_perplexity(line['loss'])}",
        f"grad norm {line['grad_norm']:.3f}",
        f"lr {line['lr']:.3e}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%} ({line['mfu_causal']:.1%} causal)")
    if line["skipped"]:
        parts.append("skipped")
    names = [name for kind, name, figure in map(split_key, line) if (kind, figure) == ("valid", "loss")]
    for name in names:
        loss, bits = line[f"valid/{name}/loss"], line[f"valid/{name}/bits_per_byte"]
        more = "" if bits is None else f", {bits:.3f} bits/byte"
        parts.append(f"{name} loss {loss:.4f}, perplexity {_perplexity(loss)}{more}")
    return " | ".join(parts)
