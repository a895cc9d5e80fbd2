"""What every part of the GPU suite measures with: the machine, times, peak memory, clocks, and what may go wrong."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from shapes import HAMMERLLM, TOY, Shape
from sides import p99
from torch import Tensor

from megatron_hammer.base.errors import ConfigError

CANNOT_RUN = (9, 10, 12, 13)  # ConfigError: this machine lacks what a kernel, Transformer Engine or fp8 needs
Result = dict[str, Any]
Item = Callable[[], Result]
Span = tuple[float, float]
"""Begin and end, in seconds of ``time.perf_counter``."""

VERSIONS = (
    "torch", "triton", "transformers", "accelerate", "liger-kernel", "cut-cross-entropy", "megatron-core", "torchtitan",
    "transformer-engine", "apex", "flash-attn", "flash-attn-4",
)  # fmt: skip
# Cycles for which the GPU is kept busy before a timed region, about 1 ms: the host has queued the whole region by the
# time it starts, so that launch gaps of small kernels do not count.
HEAD_START_CYCLES = 2_000_000
# Read before a timed region: more than any second-level cache, so that what was made just before is in memory, as the
# ideal bytes have it. Reading leaves nothing to be written back within the region.
COLD_BYTES = 256 * 2**20


class Missing(Exception):
    """A contestant that cannot run here, and why."""


@dataclass(frozen=True)
class Bench:
    """The machine and the size."""

    device: torch.device
    small: bool
    """Toy shapes: the suite itself is tried, nothing is measured."""
    known: Mapping[str, Result] = field(default_factory=dict)
    """Entries of the same part that were measured before."""
    packages: str = ""
    """Folder with a folder for each peer whose packages nobody else shall see."""
    limit_seconds: float = math.inf
    """After which an entry is taken to hang, and its process is ended."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> Shape:
        return TOY if self.small else HAMMERLLM

    @property
    def name(self) -> str:
        """Of the device; toy results never get into the files of real ones."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else "cpu"
        return f"{name} toy" if self.small else name

    def random(self, *size: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal random numbers: never zeros, on which a GPU runs 13 % faster."""
        return torch.randn(size, device=self.device, dtype=torch.float32).mul_(scale).to(dtype)

    def tokens(self, *size: int, vocabulary: int) -> Tensor:
        """As frequent as in text: that of rank r as 1 / (r + 2.7), Zipf's law as Mandelbrot shifted it.

        The exponent and the shift are those of English words (Piantadosi 2014, doi 10.3758/s13423-014-0585-6). Of
        16,384 tokens some 480 are the commonest one in a vocabulary of 32,000; uniform tokens would hide what copies
        of one token cost (``kernels/embedding.py``). A token's rank is its id, as of a trained tokenizer roughly.
        """
        frequencies = 1 / (torch.arange(1, vocabulary + 1, device=self.device) + 2.7)
        return torch.multinomial(frequencies, math.prod(size), replacement=True).view(size)

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def add_packages_of(self, peer: str) -> None:
        """Let this process import what came for one peer alone."""
        if self.packages:
            sys.path.append(f"{self.packages}/{peer}")

    def give_back_memory(self) -> bool:
        """What nobody holds any more; whether the device still works, as after an illegal access it does not."""
        gc.collect()
        try:
            self.synchronise()
            if self.cuda:
                torch.cuda.empty_cache()
            return bool(torch.ones(3, device=self.device).sum().item() == 3)
        except RuntimeError:
            return False

    def repeats(self, full: int) -> int:
        return 2 if self.small else full


@cache
def _cold(device: torch.device) -> Tensor:
    return torch.zeros(COLD_BYTES, dtype=torch.uint8, device=device)


class _Marks:
    """Points in time: events on a GPU's stream, the clock on a CPU."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.points = bench, list[Any]()

    def __call__(self) -> None:
        if not self.bench.cuda:
            self.points.append(time.perf_counter())
            return
        if not self.points:
            _cold(self.bench.device).max()
            torch.cuda._sleep(HEAD_START_CYCLES)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.points.append(event)

    def intervals(self) -> list[float]:
        """Seconds between them; waits for the device."""
        self.bench.synchronise()
        return [a.elapsed_time(b) / 1e3 if self.bench.cuda else b - a for a, b in pairwise(self.points)]


def marked_times(
    bench: Bench, run: Callable[[Callable[[], None]], None], repeats: int, warm_up: int = 3
) -> list[list[float]]:
    """Seconds between the marks that ``run(mark)`` sets: for each interval its times over all repeats.

    The first mark starts the clock: what comes before it does not count.
    """
    rounds = []
    for i in range(warm_up + repeats):
        marks = _Marks(bench)
        run(marks)
        intervals = marks.intervals()
        if i >= warm_up:
            rounds.append(intervals)
    return [list(times) for times in zip(*rounds)]


def times(bench: Bench, run: Callable[[], Any], repeats: int, warm_up: int = 3) -> list[float]:
    """Seconds of each call."""

    def marked(mark: Callable[[], None]) -> None:
        mark()
        run()
        mark()

    return marked_times(bench, marked, repeats, warm_up)[0]


def forward_and_backward(
    bench: Bench, leaves: Sequence[Tensor], run: Callable[..., Any], gradients: Sequence[Tensor], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of ``run(*copies of leaves)`` and of its backward from these gradients of its outputs.

    An operation may write over its inputs, so each call gets copies, made before the clock starts. A leaf that needs no
    gradient is passed as it is.
    """
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def run_once(mark: Callable[[], None]) -> None:
        copies = [leaf.clone() if leaf.requires_grad else leaf for leaf in leaves]
        mark()
        outputs = run(*copies)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        mark()
        torch.autograd.grad([o for o in outputs if o.requires_grad], wanted, gradients, allow_unused=True)
        mark()

    forward, backward = marked_times(bench, run_once, repeats)
    return forward, backward


def summary(seconds: Sequence[float], what: str = "") -> Result:
    """Median and p99, in milliseconds; ``what`` goes before the names."""
    return {f"{what}ms": 1e3 * statistics.median(seconds), f"{what}ms_p99": 1e3 * p99(seconds)}


@contextmanager
def peak_memory(bench: Bench, result: Result, key: str = "peak_extra_gib") -> Iterator[None]:
    """Put into ``result`` by how much the block's peak exceeds what is allocated at its start; None on a CPU."""
    result[key] = None
    if not bench.cuda:
        yield
        return
    bench.synchronise()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    yield
    bench.synchronise()
    result[key] = (torch.cuda.max_memory_allocated(bench.device) - before) / 2**30


class Clocks:
    """Clock, power and temperature of the GPU while a block runs, read by a thread; nothing where nobody says them."""

    NAMES = ("sm_mhz", "watts", "celsius")
    EVERY_SECONDS = 0.2

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rows: list[tuple[float, tuple[float, ...]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Clocks:
        if self.bench.cuda:
            self._thread.start()
        return self

    def _read(self) -> None:
        device = self.bench.device
        while not self._over.wait(self.EVERY_SECONDS):
            try:
                milliwatts = torch.cuda.power_draw(device)
                row = (torch.cuda.clock_rate(device), milliwatts / 1e3, torch.cuda.temperature(device))
            except Exception:  # no nvidia-ml-py, or a driver that does not say
                return
            self.rows.append((time.perf_counter(), row))

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.bench.cuda:
            self._thread.join()

    def medians(self, span: Span) -> Result:
        """Over what was read between these times."""
        rows = [row for at, row in self.rows if span[0] <= at <= span[1]]
        return {name: statistics.median(column) for name, column in zip(self.NAMES, zip(*rows))}


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error, or what a library makes of it."""
    told = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "alloc_failed" in told


def attempt(item: Item) -> Result:
    """Run an item; what goes wrong is its result: a line in the report, not the end of the suite."""
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        try:
            result = item()
        except Missing as error:
            result = {"missing": str(error)}
        except ConfigError as error:
            result = {"missing" if error.number in CANNOT_RUN else "error": str(error)}
        except Exception as error:
            what = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            frames = traceback.extract_tb(error.__traceback__)[-6:]
            result = {
                "error": " ".join(what.split())[:600],
                "where": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
                # SDPA says there why none of its kernels could run
                "warnings": list(dict.fromkeys(" ".join(str(w.message).split())[:300] for w in warned))[-6:],
            }
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def needed(package: str) -> None:
    """Import a peer's package.

    Raises:
        Missing: it cannot be imported, in the interpreter's own words.
    """
    try:
        with warnings.catch_warnings():  # of its own that it is old or lacks something: no reason to fail
            warnings.simplefilter("ignore")
            __import__(package)
    except Exception as error:  # ImportError, RuntimeError, OSError: all have been seen
        raise Missing(f"not installed ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None


def versions() -> Mapping[str, str]:
    """Of the packages that matter, as far as they are here."""
    found = {}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"], found["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return found
