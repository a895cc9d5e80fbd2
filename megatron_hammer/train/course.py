"""Which samples the steps of a run hold that has been under way: as its checkpoint and its metrics.jsonl say.

A checkpoint tells how many samples so many steps have consumed. Where all of them had the sizes that the config says,
that is everything; where the batch was made larger or smaller in mid-run, or the checkpoint came from elsewhere, the
lines of metrics.jsonl tell the steps before it one by one. Needs no torch.
"""

from __future__ import annotations

from array import array

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
    course = config.course(newest.step, newest.state["consumed_samples"])
    if course.is_even and not any(change["what"] in SIZES for change in newest.state.get(ACCEPTED, ())):
        return course
    try:
        lines = read_lines(newest.folder.parent.parent / METRICS).lines
    except OSError:  # which costs no run (metrics_file.py)
        lines = ()
    done, consumed = array("q", [0]), array("q", [0])
    for step, line in lines:
        if step >= newest.step:
            break
        samples = parse_json(line).get("consumed_samples")
        if type(samples) is int and consumed[-1] < samples < course.consumed[-1]:
            done.append(step)
            consumed.append(samples)
    done.append(newest.step)
    consumed.append(course.consumed[-1])
    return Course(course.batches, course.num_steps, done, consumed)
