"""Computes the time of each part of a step from a chrome trace: which event belongs to which part. Needs no torch.

``profile.py`` runs the steps with ranges around what the model and the optimizer call. A range is an event whose name
starts with ``hammer/``. Every other event of a host thread takes the part of the event around it, and so::

    hammer/step
      hammer/linear                      ->  layer products      what a linear layer calls
        _Linear  (sequence number 17)
          aten::mm
      ...
      evaluate_function: _LinearBackward (sequence number 17)    autograd names the forward operation, so the part is
        aten::mm                         ->  layer products      that of _Linear above
        hammer/weight gradient
          aten::mm                       ->  layer products
          aten::add_                     ->  gradient accumulation

An operation with a sequence number in forward made the autograd node of that number; the last such operation counts,
as in torch's own links. A layer compiled as a whole shows only "Torch-Compiled Region": matrix products and attention
are recognised by name in it, and the rest is one part.

Time on a CPU is the main thread's: each instant belongs to the innermost event, Python between the operations of a part
to the part, instants outside all events to "gaps". Time on a GPU is the device's: a kernel has the part of the host
event that launched it; where several run at once the instant belongs to the last started, and to communication only
where nothing else runs; instants without any kernel are "gaps". So in both the parts sum to the whole. What has no part
is "other operations".
"""

from __future__ import annotations

import gzip
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.reading import open_regular, parse_json
from megatron_hammer.costs.budget import (
    ATTENTION,
    CASTS,
    COMMUNICATION,
    ELEMENTWISE,
    GAPS,
    GRADIENTS,
    HEAD_PRODUCTS,
    LAYER_PRODUCTS,
    LOSS,
    OTHER,
)
from megatron_hammer.kernels.ranges import GRADIENT, HEAD, LINEAR, NORM

# Of the names of ranges; the rest is one of ``kernels/ranges.py`` or one of these. In the range of a linear layer all
# is layer products (in fp8 all but the products are casts), in that of the head products and loss are told apart by
# name, and in that of a gradient what is no product is gradient accumulation.
PREFIX = "hammer/"
STEP = "step"
LAYER = "layer"
"""A whole compiled layer: its parts are told apart by the names of operations."""

HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
FACTORS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::bmm": (0, 1),
    "aten::_scaled_mm": (0, 1),
}
"""Matrix products that compute themselves, and which inputs are their factors."""
ATTENTION_WORDS = ("scaled_dot_product", "flash_attention", "efficient_attention", "_flash_attn", "varlen_attn")
COMMUNICATION_WORDS = ("c10d::", "nccl", "record_param_comms")
UNDER_WAY = "gloo:"
"""Begins the names of gloo's messages from start to end: they lie in whatever thread, over what it does meanwhile."""


@dataclass(frozen=True)
class EventPlace:
    """Where in the step an event lies."""

    range: str | None = None
    product: bool = False
    """In a matrix product."""
    gradient: bool = False
    """In the computation of a weight's gradient."""
    operation: bool = False
    """In an event that is not a range."""

    def part(self, casts: bool) -> str:
        """The part that the time of such an event counts for."""
        kind = self.range
        if kind is None or kind == STEP:
            return OTHER if self.operation else GAPS
        if kind in (LINEAR, HEAD, LAYER) and self.product:
            return HEAD_PRODUCTS if kind == HEAD else LAYER_PRODUCTS
        if kind in (LINEAR, HEAD, LAYER, NORM) and self.gradient:
            return GRADIENTS
        if kind == LINEAR:
            return CASTS if casts and self.operation else LAYER_PRODUCTS
        return {HEAD: LOSS, LAYER: ELEMENTWISE}.get(kind, kind)


@dataclass
class Measured:
    """Time of the parts of some steps, in microseconds; sums to ``wall``."""

    wall: float
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of the matrix products whose shapes the trace tells, padding included."""
    operations: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    """Of each part: microseconds by the name of the innermost operation or kernel."""

    def add(self, part: str, name: str, time: float) -> None:
        """Count a stretch of time."""
        self.parts[part] += time
        self.operations[part][name] += time

    def longest(self, part: str, count: int) -> list[tuple[str, float]]:
        """The operations of a part that took longest: (name, microseconds)."""
        return sorted(self.operations[part].items(), key=lambda item: -item[1])[:count]

    def merge(self, parts: Sequence[str], into: str) -> None:
        """Count some parts as one."""
        for part in parts:
            for name, time in self.operations.pop(part, {}).items():
                self.add(into, name, time)
            self.parts.pop(part, None)


@dataclass(frozen=True)
class Event:
    """One complete event of the trace; times in microseconds."""

    name: str
    category: str
    thread: Any
    start: float
    stop: float
    args: Mapping[str, Any]


MAX_TRACE_BYTES = 2**31
"""Of its text: a profile of some steps has a hundredth."""


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a chrome trace, plain or .gz, in the order of their start."""
    with open_regular(path) as file:
        content = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        text = content.read(MAX_TRACE_BYTES + 1)
    if len(text) > MAX_TRACE_BYTES:
        raise DataError(99, str(path), f"has more than {MAX_TRACE_BYTES:,} bytes", "record fewer steps")
    events: list[dict[str, Any]] = parse_json(text, len(text))["traceEvents"]
    return sorted((e for e in events if "ts" in e), key=lambda e: (e["ts"], -e.get("dur", 0)))


def _events_and_steps(trace: Sequence[Mapping[str, Any]]) -> tuple[list[Event], list[Event]]:
    """All complete events of host and device, and those of them that are whole steps."""
    events = [
        Event(e["name"], e["cat"], e.get("tid"), e["ts"], e["ts"] + e.get("dur", 0), e.get("args") or {})
        for e in trace
        if e.get("ph") == "X" and e.get("cat") in HOST | DEVICE
    ]
    steps = [e for e in events if e.name == PREFIX + STEP]
    assert steps, "the trace holds no range of a step"
    return events, steps


def parts_of_trace(trace: Sequence[Mapping[str, Any]], device: str, casts: bool = False) -> Measured:
    """The parts of all steps in a trace (as ``read_trace`` gives it) together.

    Args:
        device: "cpu" or "cuda", whose time it is.
        casts: what a linear layer does beside its products are fp8 casts.
    """
    events, steps = _events_and_steps(trace)
    window = steps[0].start, steps[-1].stop
    nested = (e for e in events if e.category in HOST and not e.name.startswith(UNDER_WAY))
    host = list(_places(nested, steps[0].thread))
    measured = Measured(window[1] - window[0])
    if device == "cpu":
        main = [(e, place) for e, place in host if e.thread == steps[0].thread]
        for name, place, time in _innermost(main, window):
            measured.add(place.part(casts), name, time)
    else:
        launched = {e.args["correlation"]: p for e, p in host if e.args.get("correlation") and e.category != "cpu_op"}
        kernels = [(e, _device_place(e, launched)) for e in events if e.category in DEVICE]
        for name, place, time in _running(kernels, window):
            measured.add(place.part(casts), name, time)
    for event, place in host:
        if event.name in FACTORS and window[0] <= event.start < window[1]:
            measured.flops[place.part(casts)] += _product_flops(event)
    return measured


@dataclass(frozen=True)
class Traffic:
    """Communication of one kind in some steps."""

    count: int
    time: float
    """Microseconds in which it was under way; that of several at once counts for each."""
    beside: float
    """Of these, microseconds in which something else was done: a CPU's main thread did not wait for other ranks, a GPU
    ran another kernel."""


def traffic(trace: Sequence[Mapping[str, Any]], device: str) -> dict[str, Traffic]:
    """What was sent and received in the steps of a trace, by the name of the collective, the longest first.

    On a CPU these are gloo's messages from start to end, on a GPU NCCL's kernels.
    """
    events, steps = _events_and_steps(trace)
    start, stop, main = steps[0].start, steps[-1].stop, steps[0].thread
    if device == "cpu":
        sent = [e for e in events if e.name.startswith(UNDER_WAY)]
        waits = _union((e.start, e.stop) for e in events if e.thread == main and e.name == PREFIX + COMMUNICATION)
        busy = [(one[1], other[0]) for one, other in pairwise([(start, start), *waits, (stop, stop)])]
    else:
        kernels = [e for e in events if e.category in DEVICE]
        sent = [e for e in kernels if any(word in e.name for word in COMMUNICATION_WORDS)]
        busy = _union((e.start, e.stop) for e in kernels if not any(word in e.name for word in COMMUNICATION_WORDS))
    found: dict[str, list[Event]] = defaultdict(list)
    for event in sent:
        if start <= event.start < stop:
            found[event.name.removeprefix(UNDER_WAY)].append(event)
    rows = {
        name: Traffic(
            len(calls),
            sum(e.stop - e.start for e in calls),
            sum(_shared(e, busy) for e in calls),
        )
        for name, calls in found.items()
    }
    return dict(sorted(rows.items(), key=lambda item: -item[1].time))


def _shared(event: Event, intervals: Sequence[tuple[float, float]]) -> float:
    """How long an event lasts within some intervals, which are in their order and apart."""
    shared = 0.0
    for start, stop in intervals[bisect_right(intervals, event.start, key=lambda interval: interval[1]) :]:
        if start >= event.stop:
            break
        shared += min(event.stop, stop) - max(event.start, start)
    return shared


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same instants as intervals that do not touch, in their order."""
    joined: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


def _places(events: Iterable[Event], forward_thread: Any) -> Iterator[tuple[Event, EventPlace]]:
    """Each host event with its place; events come in the order of their start.

    Sequence numbers are those of one thread, the one in which forward runs: a GPU's backward has another.
    """
    stacks: dict[Any, list[tuple[float, EventPlace]]] = defaultdict(list)
    made: dict[int, EventPlace] = {}  # sequence number -> place of the operation that made the node
    for event in events:
        stack = stacks[event.thread]
        while stack and stack[-1][0] <= event.start:
            stack.pop()
        place = _place_in(stack[-1][1] if stack else EventPlace(), event, made)
        stack.append((event.stop, place))
        if event.thread == forward_thread and _makes_a_node(event):
            made[event.args["Sequence number"]] = place
        yield event, place


def _makes_a_node(event: Event) -> bool:
    return "Sequence number" in event.args and not event.args.get("Fwd thread id")


def _place_in(around: EventPlace, event: Event, made: Mapping[int, EventPlace]) -> EventPlace:
    name = event.name
    if name.startswith(PREFIX):
        kind = name.removeprefix(PREFIX)
        return replace(around, gradient=True) if kind == GRADIENT else EventPlace(kind)
    place = replace(around, operation=True)
    if any(word in name for word in COMMUNICATION_WORDS):
        return replace(place, range=COMMUNICATION)
    if "AccumulateGrad" in name:
        return replace(place, range=GRADIENTS)
    if event.args.get("Fwd thread id"):  # a node of backward
        origin = made.get(event.args.get("Sequence number", -1))
        return place if origin is None else replace(origin, product=False, operation=True)
    if name.startswith("Torch-Compiled Region") and place.range in (None, STEP):
        place = replace(place, range=LAYER)
    if place.range == LAYER and any(word in name for word in ATTENTION_WORDS):
        place = replace(place, range=ATTENTION)
    if name in FACTORS:
        place = replace(place, product=True)
    return place


def _innermost(
    events: Sequence[tuple[Event, EventPlace]], window: tuple[float, float]
) -> Iterator[tuple[str, EventPlace, float]]:
    """Cut the window into stretches of one thread's innermost event: (its name, its place, microseconds)."""
    clock, stack = window[0], list[tuple[float, str, EventPlace]]()
    outside = (window[1], "", EventPlace())

    def advance(to: float) -> Iterator[tuple[str, EventPlace, float]]:
        nonlocal clock
        to = min(max(to, clock), window[1])
        if to > clock:
            _, name, place = stack[-1] if stack else outside
            yield name, place, to - clock
        clock = to

    for event, place in events:
        while stack and stack[-1][0] <= event.start:
            yield from advance(stack[-1][0])
            stack.pop()
        yield from advance(event.start)
        stack.append((event.stop, event.name, place))
    while stack:
        yield from advance(stack[-1][0])
        stack.pop()
    yield from advance(window[1])


def _device_place(kernel: Event, launched: Mapping[Any, EventPlace]) -> EventPlace:
    place = launched.get(kernel.args.get("correlation"), EventPlace())
    if any(word in kernel.name for word in COMMUNICATION_WORDS):
        return replace(place, range=COMMUNICATION)
    return replace(place, operation=True)


def _running(
    kernels: Sequence[tuple[Event, EventPlace]], window: tuple[float, float]
) -> Iterator[tuple[str, EventPlace, float]]:
    """Cut the window into stretches of the kernel that counts: (its name, its place, microseconds)."""
    edges = sorted({*window, *(t for k, _ in kernels for t in (k.start, k.stop) if window[0] < t < window[1])})
    active: list[tuple[Event, EventPlace]] = []
    following = 0
    for start, stop in pairwise(edges):
        while following < len(kernels) and kernels[following][0].start <= start:
            active.append(kernels[following])
            following += 1
        active = [(k, p) for k, p in active if k.stop > start]
        computing = [(k, p) for k, p in active if p.range != COMMUNICATION] or active
        if computing:
            kernel, place = computing[-1]
            yield kernel.name, place, stop - start
        else:
            yield "", EventPlace(), stop - start


def _product_flops(event: Event) -> float:
    """2 m n k of a matrix product, from the shapes in the trace; 0 where it has none."""
    shapes = event.args.get("Input Dims") or []
    first, second = FACTORS[event.name]
    if len(shapes) <= second or len(shapes[first]) < 2 or len(shapes[second]) < 2:
        return 0.0
    flops: float = 2 * shapes[second][-1]
    for size in shapes[first]:
        flops *= size
    return flops


def memory_of_step(trace: Sequence[Mapping[str, Any]], device: str) -> tuple[int, int]:
    """Bytes allocated beyond what a step began with, from a trace with memory events: (at the head, at the peak).

    At the head of the model all that the layers keep for backward exists: the largest of the micro-batches counts.
    """
    kind = {"cpu": 0, "cuda": 1}[device]
    steps = [e for e in trace if e["name"] == PREFIX + STEP and e.get("cat") == "user_annotation"]
    start, stop = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    level = at_head = peak = 0
    for event in trace:
        if not start <= event["ts"] <= stop:
            continue
        if event["name"] == "[memory]" and event["args"].get("Device Type") == kind:
            level += event["args"]["Bytes"]
            peak = max(peak, level)
        elif event["name"] == PREFIX + HEAD and event.get("cat") == "user_annotation":
            at_head = max(at_head, level)
    return at_head, peak
