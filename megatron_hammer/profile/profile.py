"""Profile training steps: where their time goes, part by part, beside what each part would take at the limit.

::

    config -> model, optimizer, batches as training has them -> warm-up -> N steps, timed
           -> N steps under torch.profiler, with ranges -> trace.json.gz -> time by part (trace.py)
           -> 1 step with memory events -> memory by kind
    rates of the device (measured or given) -> limits of the parts (budget.py)
                                            => profile.json, profile.png (plots.py), a table

The ranges are those that the model and the optimizer offer (``kernels/ranges.py``); ``workload.py`` builds both with
ranges that can be recorded. ``trace.py`` says how an event is assigned to a part, and what counts as "gaps" and "other
operations". With ``kernels.compile=layers`` no range is inside a layer, which is compiled as it is in training: its
parts are told apart by the names of operations, and norm, RoPE and SwiGLU are one. What is recomputed counts for the
part that it belongs to.

On one process the profile shows a rank's work without communication. With several ranks (``run_rank``) each writes a
trace, and rank 0 the report: what it sends and receives, and how much of that overlaps with its computation. There are
no limits then, since they hold for one process. Under the profiler a step of small operations is slower; the time
without it is reported, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.files import replace_file
from megatron_hammer.base.language import Language, sayer
from megatron_hammer.base.progress import say
from megatron_hammer.base.system import processor_name, reset_peak, resident_bytes
from megatron_hammer.config import Config, KernelsConfig
from megatron_hammer.costs import budget
from megatron_hammer.costs.budget import Rates, StepShape, step_costs
from megatron_hammer.costs.comparison import peak_of_process
from megatron_hammer.costs.flops import flops_per_token
from megatron_hammer.kernels.fp8 import select_products
from megatron_hammer.kernels.libraries import te
from megatron_hammer.kernels.selection import COMPUTE_DTYPES, kernel_requirements, select_backends
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.parallel.placement import padded_vocab_size
from megatron_hammer.parallel.rendezvous import collective_timeout, end_process_group, start_process_group
from megatron_hammer.profile.plots import digits, draw_profile, flops_text, source_of, subtitle_of, title_of
from megatron_hammer.profile.trace import PREFIX, Measured, Traffic, memory_of_step, parts_of_trace, read_trace, traffic
from megatron_hammer.profile.workload import RecordedRanges, Workload, record_waits, wait
from megatron_hammer.train.begin import device_of_rank

WARM_UP_STEPS = 3  # the first compiles and fills caches, the second meets optimizer state for the first time
MEASURE_SECONDS = {"cpu": 0.5, "cuda": 0.2}  # for each of the two rates
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far beyond the last cache
QUIET_SECONDS = 5.0  # between two lines about steps
FUSED = (budget.NORM, budget.ROPE, budget.SWIGLU)  # one part where a compiler has made whole layers
SMALL_SHARE = 0.0005  # of the step: a part below it that has no limit either is left out
MIB = 2**20


@dataclass(frozen=True)
class ProfileOptions:
    """What is profiled, beside the config."""

    output: Path
    """Folder of the three results."""
    steps: int = 3
    """Steps under the profiler; as many are timed without it."""
    flops: float | None = None
    """Limit of matrix products, FLOP/s; None: measured."""
    bandwidth: float | None = None
    """Limit of copies, bytes/s read and written; None: measured."""
    ranks: int = 1
    """Processes that the step is divided over."""
    language: Language = "en"
    """Of the picture, where an installed font has it."""

    def check(self) -> None:
        """Raise ``ConfigError`` for a number that can be no such thing."""
        values = {"steps": self.steps, "peak-tflops": self.flops, "bandwidth": self.bandwidth, "nproc": self.ranks}
        units = {"peak-tflops": 1e12, "bandwidth": 1e9}
        for name, value in values.items():
            if value is not None and not 0 < value < float("inf"):
                what = f"--{name}={value / units.get(name, 1):g}"
                raise ConfigError(47, what, "must be positive", f"raise --{name} or leave it out")


def profile_step(config: Config, options: ProfileOptions, note: Callable[[str], None] = say) -> dict[str, Any]:
    """Profile steps of a config on this process's device; write and return what ``profile.json`` holds.

    Raises:
        ConfigError, DataError: as for a training run on one process.
    """
    options.check()
    config = for_profiling(config, options)
    return _profile(config, options, ParallelContext.single(device_of_rank(config, 0)), RecordedRanges(), note)


def run_rank(
    config: Config,
    rank: int,
    local_rank: int,
    world_size: int,
    store: Any,
    check_data: bool,
    status: StatusSlot,
    options: ProfileOptions,
) -> int:
    """Entry of a rank that the launcher starts: profile what this rank does; rank 0 writes the report and prints it.

    Args:
        config: as ``for_profiling`` gives it.
    """
    device, ranges = device_of_rank(config, local_rank), RecordedRanges()
    timeout = collective_timeout(config.parallel.timeout_seconds)
    start_process_group(store, rank, world_size, device, timeout, status)
    record_waits(status, ranges)
    ctx = build_parallel_context(config.grid(world_size), device, timeout, status)
    report = _profile(config, options, ctx, ranges, say if rank == 0 else lambda text: None)
    if rank == 0:
        print(profile_table(report), flush=True)
    with status.waits("the end of all ranks"):
        end_process_group()
    return 0


def _profile(
    config: Config, options: ProfileOptions, ctx: ParallelContext, ranges: RecordedRanges, note: Callable[[str], None]
) -> dict[str, Any]:
    progress, device = TimedNotes(note), ctx.device
    if config.kernels.cuda_graph:
        progress("kernels.cuda_graph is left out: a replay has no parts that a profile could name")
    te.check_here(config)
    options.output.mkdir(parents=True, exist_ok=True)
    before = resident_bytes()
    progress(f"building the model on {device.type}")
    workload = Workload(config, ctx, ranges)
    rates = None
    if options.ranks == 1:
        progress("measuring the device's rates")
        flops, bandwidth = options.flops or _product_rate(workload.config, device), options.bandwidth
        rates = Rates(flops, bandwidth or _copy_rate(device))
    progress("warming up")
    for i in range(WARM_UP_STEPS):
        progress.now_and_then(f"warm-up, step {i + 1} of {WARM_UP_STEPS}")
        workload.step()
        wait(device)
    progress(f"timing {options.steps} steps")
    _reset_peak(device)
    seconds = _timed(workload, options.steps, progress)
    peak = peak_of_process(device)
    progress(f"profiling {options.steps} steps of {seconds:.2f} s")
    with workload.ranges.recorded():
        measured, sent = _measured(workload, options, progress)
        progress.now_and_then("measuring memory")
        memory = _memory(workload, options, peak, before)
    report = _report(workload, options, rates, measured, sent, seconds, memory)
    if ctx.world.rank > 0:
        return report
    replace_file(options.output / "profile.json", (json.dumps(report, indent=1) + "\n").encode())
    draw_profile(report, options.output / "profile.png", options.language)
    traces = "trace.json.gz" if options.ranks == 1 else f"{_trace_name(ctx)} with those of the other ranks"
    progress(f"wrote {options.output}/profile.png, profile.json and {traces}")
    return report


class TimedNotes:
    """Lines for people, each with the seconds since the start."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note, self.started, self.last = note, time.monotonic(), 0.0

    def __call__(self, text: str) -> None:
        self.last = time.monotonic()
        self.note(f"[{self.last - self.started:5.1f} s] {text}")

    def now_and_then(self, text: str) -> None:
        """A line unless there was one in the last few seconds."""
        if time.monotonic() - self.last > QUIET_SECONDS:
            self(text)


def for_profiling(config: Config, options: ProfileOptions) -> Config:
    """The config of a run that has its first phase alone, with steps enough, of full size from the first on, and no
    checkpoint to resume from: the output is the profile's own folder.

    Raises:
        ConfigError: it needs more ranks than are profiled.
    """
    config, parallel = config.after_samples(0), config.parallel
    for name, remedy in (
        ("tensor_model_parallel_size", "parallel.sequence_parallel=false"),
        ("pipeline_model_parallel_size", "parallel.virtual_pipeline_stages=1"),
        ("context_parallel_size", ""),
    ):
        size = getattr(parallel, name)
        if size > options.ranks:
            rule = f"cannot be profiled on {options.ranks} process{'es' * (options.ranks > 1)}"
            cure = f"give --nproc {size} or a multiple of it, or add parallel.{name}=1 {remedy}".rstrip()
            raise ConfigError(48, f"parallel.{name}={size}", rule, cure)
    steps = max(config.train.num_steps, WARM_UP_STEPS + 2 * options.steps + 2)
    output = str(options.output / "run")
    train = dataclasses.replace(config.train, num_steps=steps, output=output, dry_run=False, batch_size_ramp=None)
    checkpoint = dataclasses.replace(config.checkpoint, init_from=None)
    data = dataclasses.replace(config.data, max_epochs=None)  # a limit for all phases together
    return dataclasses.replace(config, train=train, checkpoint=checkpoint, data=data)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _timed(workload: Workload, steps: int, progress: TimedNotes) -> float:
    """Seconds of a step, mean; the device is waited for at the end only, as in training."""
    start = time.perf_counter()
    for i in range(steps):
        workload.step()
        progress.now_and_then(f"timing, step {i + 1} of {steps}")
    wait(workload.ctx.device)
    return (time.perf_counter() - start) / steps


def _trace_name(ctx: ParallelContext) -> str:
    return "trace.json.gz" if ctx.world.size == 1 else f"trace-rank{ctx.world.rank}.json.gz"


def _measured(workload: Workload, options: ProfileOptions, progress: TimedNotes) -> tuple[Measured, dict[str, Traffic]]:
    """Time by part of the profiled steps, and what was communicated; their trace is left in the output folder."""
    device, path = workload.ctx.device, options.output / _trace_name(workload.ctx)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, record_shapes=True) as recorder:
        workload.step("warm-up", finish=True)  # the profiler's own start
        for i in range(options.steps):
            workload.step(finish=i == options.steps - 1)
            progress.now_and_then(f"profiling, step {i + 1} of {options.steps}")
    progress.now_and_then("reading the trace")
    staging = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        recorder.export_chrome_trace(str(staging))
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    trace = read_trace(path)
    casts = workload.config.kernels.fp8 != "off"
    return parts_of_trace(trace, device.type, casts), traffic(trace, device.type)


def _memory(workload: Workload, options: ProfileOptions, peak: int, before: int) -> dict[str, Any]:
    """Bytes by kind at the peak of a step.

    Weights, gradients and optimizer state are the optimizer's buffers. Activations are what a step has allocated when
    its head begins; temporary is what it allocates beyond. The rest is what the measured peak has besides: on a CPU
    the interpreter and its libraries stand on their own, as resident before the model was built.
    """
    device, path = workload.ctx.device, options.output / f".{os.getpid()}.memory.json"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    try:
        with profile(activities=activities, profile_memory=True) as recorder:
            workload.step(finish=True)
        recorder.export_chrome_trace(str(path))
        at_head, most = memory_of_step(read_trace(path), device.type)
    finally:
        path.unlink(missing_ok=True)
    stores, states = workload.optimizer.store.of_stages, workload.optimizer.rule.states
    kinds = {
        "weights": sum(_bytes(store.params) for store in stores),
        "gradients": sum(_bytes(store.grads) for store in stores),
        "optimizer state": sum(state.own_bytes for state in states),
        "activations": at_head,
        "temporary": most - at_head,
    }
    if device.type == "cpu":
        kinds["program, libraries"] = before
    kinds["the rest"] = max(0, peak - sum(kinds.values()))
    total = max(peak, sum(kinds.values()))
    return {
        "peak_mib": peak / MIB,
        "source": "resident, without the profiler" if device.type == "cpu" else "torch's allocator",
        "kinds": [{"name": n, "mib": size / MIB, "share": size / total} for n, size in kinds.items()],
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()


def _product_rate(config: Config, device: torch.device) -> float:
    """FLOP/s of the layer's largest product, gate and up: the best of the runs that fit into the time."""
    rows, dtype = config.train.micro_batch_size * config.data.seq_length, COMPUTE_DTYPES[config.train.precision]
    inputs, outputs = max(budget.layer_products(config.model), key=lambda sizes: sizes[0] * sizes[1])
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    product = torch.empty(rows, outputs, dtype=dtype, device=device)
    products, _ = select_products(KernelsConfig(), device, dtype)
    return 2 * rows * inputs * outputs / _best_seconds(lambda: products.fprop(x, weight, product), device)


def _copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy: the best of the runs that fit into the time."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Shortest time of a run; on a GPU a run is eight of them, so that their launch does not show."""
    repeats = 8 if device.type == "cuda" else 1
    for _ in range(3):
        run()
    best, until = float("inf"), time.perf_counter() + MEASURE_SECONDS[device.type]
    while best == float("inf") or time.perf_counter() < until:
        wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


# ---- what is said ----------------------------------------------------------------------------------------------------


def _report(
    workload: Workload,
    options: ProfileOptions,
    rates: Rates | None,
    measured: Measured,
    sent: Mapping[str, Traffic],
    seconds: float,
    memory: dict[str, Any],
) -> dict[str, Any]:
    """``profile.json``: plain values, times in milliseconds a step; limits are None where there are several ranks."""
    config, device = workload.config, workload.ctx.device
    costs = _costs(workload) if options.ranks == 1 else {}
    if config.kernels.compile == "layers":
        measured.merge(FUSED, budget.ELEMENTWISE)
    limits = {part: 1e3 * rates.seconds(cost) for part, cost in costs.items()} if rates else {}
    step_ms = measured.wall / options.steps / 1e3
    parts = [_part(part, measured, limits.get(part), options.steps, step_ms) for part in budget.PARTS]
    limit_ms, tokens = sum(limits.values()) if limits else None, config.train.global_batch_size * config.data.seq_length
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    kernels = {k: row.name for k, row in select_backends(config.kernels, kernel_requirements(config, device)).items()}
    needed, counted = sum(c.flops for c in costs.values()), sum(measured.flops.values()) / options.steps
    products = sum(costs[p].flops for p in (budget.LAYER_PRODUCTS, budget.HEAD_PRODUCTS) if p in costs)
    report = {
        "device": name,
        "processor": processor_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "precision": config.train.precision,
        "parameters": count_parameters(config.model),
        "micro_batch_size": config.train.micro_batch_size,
        "ranks": options.ranks,
        "micro_batches": config.grad_accum(options.ranks),
        "seq_length": config.data.seq_length,
        "data": "random tokens" if workload.loop is None else "data.train",
        "kernels": kernels | {name: getattr(config.kernels, name) for name in ("compile", "layers", "fp8")},
        "recompute": config.train.recompute,
        "steps": options.steps,
        "step_ms": step_ms,
        "step_ms_without_profiler": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "limit_ms": limit_ms,
        "rates": rates
        and {
            "tflops": rates.flops_per_second / 1e12,
            "gb_per_second": rates.bandwidth / 1e9,
            "measured": [n for n in ("flops", "bandwidth") if getattr(options, n) is None],
        },
        "communication": [
            {
                "name": name,
                "count": t.count / options.steps,
                "ms": t.time / options.steps / 1e3,
                "beside_ms": t.beside / options.steps / 1e3,
            }
            for name, t in sent.items()
        ],
        "flops_per_token": dict(zip(("full", "causal"), flops_per_token(config.model, config.data.seq_length))),
        "flops_needed": needed,
        "product_flops_needed": products,
        "product_flops_counted": counted,
        "padded_vocab_size": padded_vocab_size(config.model.vocab_size or 0, 1),
        "parts": [p for p in parts if p["limit_ms"] is not None or p["ms"] >= SMALL_SHARE * step_ms],
        "left_out_ms": sum(p["ms"] for p in parts if p["limit_ms"] is None and p["ms"] < SMALL_SHARE * step_ms),
        "memory": memory,
    }
    english = sayer("en")
    return report | {"title": title_of(report, english), "subtitle": subtitle_of(report, english)}


def _costs(workload: Workload) -> dict[str, budget.Cost]:
    """What each part needs at least, on one process."""
    fused = workload.ctx.device.type == "cuda"
    costs = step_costs(StepShape.of(workload.config, workload.attention_length, fused_accumulation=fused))
    if workload.config.kernels.compile == "layers":
        costs[budget.ELEMENTWISE] = sum((costs.pop(part) for part in FUSED), budget.Cost())
    return costs


def _part(part: str, measured: Measured, limit: float | None, steps: int, step_ms: float) -> dict[str, Any]:
    ms = measured.parts.get(part, 0.0) / steps / 1e3
    flops = measured.flops.get(part, 0.0) / steps
    return {
        "name": part,
        "ms": ms,
        "share": ms / step_ms,
        "limit_ms": limit,
        "of_limit": limit / ms if limit is not None and ms > 0 else None,
        "tflops": flops / ms / 1e9 if flops and ms else None,
        "operations": [[n, t / steps / 1e3] for n, t in measured.longest(part, 5)],
    }


def profile_table(report: Mapping[str, Any]) -> str:
    """The profile as text, for a terminal."""
    decimals = digits(report["step_ms"])
    lines = [report["title"], *report["subtitle"], source_of(report, sayer("en")), ""]
    lines.append(f"{'part':<24}{'ms':>11}{'share':>8}{'limit, ms':>12}{'of limit':>10}   mostly")
    of_limit = None if report["limit_ms"] is None else report["limit_ms"] / report["step_ms"]
    total = {"name": "step", "ms": report["step_ms"], "share": 1.0, "limit_ms": report["limit_ms"],
             "of_limit": of_limit, "tflops": None, "operations": []}  # fmt: skip
    for part in [*report["parts"], total]:
        limit = "" if part["limit_ms"] is None else f"{part['limit_ms']:,.{decimals}f}"
        of_limit = "" if part["of_limit"] is None else f"{part['of_limit']:.0%}"
        mostly = flops_text(part["tflops"]) + "; " if part["tflops"] else ""
        mostly += part["operations"][0][0].removeprefix(PREFIX)[:50] if part["operations"] else ""
        lines.append(f"{part['name']:<24}{part['ms']:>11,.{decimals}f}{part['share']:>8.1%}{limit:>12}{of_limit:>10}   "
                     f"{mostly}".rstrip())  # fmt: skip
    if report["communication"]:
        lines += ["", f"{'communication':<24}{'times':>11}{'ms':>12}{'beside other work':>21}"]
    for row in report["communication"]:
        beside = f"{row['beside_ms']:,.{decimals}f} ms, {row['beside_ms'] / max(row['ms'], 1e-9):.0%}"
        lines.append(f"{row['name']:<24}{row['count']:>11,.0f}{row['ms']:>12,.{decimals}f}{beside:>21}")
    if report["ranks"] == 1:
        ratio = report["product_flops_counted"] / report["product_flops_needed"]
        lines += ["", f"matrix products: {ratio:.3f} of the FLOPs needed were seen (vocabulary padding, recompute)"]
    memory = report["memory"]
    lines += ["", f"memory at the peak, {memory['peak_mib']:,.0f} MiB ({memory['source']}):"]
    lines += [f"{k['name']:<24}{k['mib']:>11,.1f} MiB{k['share']:>8.1%}" for k in memory["kinds"]]
    return "\n".join(lines)
