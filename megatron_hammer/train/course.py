"""Which samples the past steps of a run held, as its checkpoint and its metrics.jsonl say.

A checkpoint tells how many samples so many steps have consumed. Where all of them had the sizes that the config says,
that is everything; where the batch was made larger or smaller in mid-run, or the checkpoint came from elsewhere, the
lines of metrics.jsonl tell the steps before it one by one. Needs no torch.
"""

from __future__ import annotations

from array import array
from pathlib import Path

from megatron_hammer.base.reading import parse_json
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.config import Config
from megatron_hammer.config.phases import Course
from megatron_hammer.metrics.metrics_file import METRICS, read_lines
from megatron_hammer.train.changes import ACCEPTED

SIZES = ("train.global_batch_size", "train.batch_size_ramp")


def course_of(config: Config, newest: Manifest | None) -> Course:
    """The course of a run that goes on from a checkpoint, with this config; None: of one that begins."""
    if newest is None:
        return config.course()
    step, consumed = newest.step, newest.state["consumed_samples"]
    course = config.course(step, consumed)
    if course.is_even and not any(change["what"] in SIZES for change in newest.state.get(ACCEPTED, ())):
        return course
    return recorded(config, step, consumed)


def recorded(config: Config, step: int, consumed: int) -> Course:
    """The course of a run after a step, whose steps up to there are as the lines in its folder say."""
    try:
        lines = read_lines(Path(config.train.output) / METRICS).lines
    except OSError:  # which costs no run (metrics_file.py)
        lines = ()
    done, samples = array("q", [0]), array("q", [0])
    for number, line in lines:
        if number >= step:
            break
        count = parse_json(line).get("consumed_samples")
        if type(count) is int and samples[-1] < count < consumed:
            done.append(number)
            samples.append(count)
    if step > 0:
        done.append(step)
        samples.append(consumed)
    return Course(config.batch_sizes, config.train.num_steps, done, samples)
