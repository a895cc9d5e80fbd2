"""Test-wide settings: one thread a process (two cores are shared by up to eight ranks), no network."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import multiprocessing.process
import multiprocessing.util
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take a minute or more alone, the longest first. tests/run.sh gives each of two processes the next file:
# a long one among the last would leave the other process with nothing to do.
LONGEST = (
    "test_readme.py",
    "verify/test_grid.py",
    "test_benchmarks.py",
    "train/test_run.py",
    "test_tokenizer_and_data_pages.py",
    "supervise/test_start.py",
    "model/test_compile.py",
    "kernels/test_cuda_sources.py",
    "model/test_parallel.py",
    "tokenizer/test_convert.py",
    "tokenizer/lab/test_verify.py",
    "model/test_layers_te.py",
    "model/test_recompute.py",
    "test_reproduce.py",
    "test_tokenizer_job.py",
)

# Under nohup, or in the background of a script, a process is born with these ignored, and so would be what tests start.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


_OF_PARENTS: list[object] = []
"""What a child has forgotten, and keeps: objects of libraries that have threads end a forked child as they go."""


def _forget_what_the_parent_began() -> None:
    """In a child of a test process: the pool of workers, temporary folders, locks and clusters are the parent's.

    A child that leaves as a program does runs its exit functions. With the parent's among them it would end the
    parent's workers and remove their folder, and the parent's next call would wait for nobody.
    """
    _OF_PARENTS.extend((weakref.finalize._registry, multiprocessing.process._children))  # type: ignore[attr-defined]
    weakref.finalize._registry = {}  # type: ignore[attr-defined]
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    exits: list[Callable[[], object]] = []

    def register(function: Callable[..., object], *arguments: Any, **named: Any) -> Callable[..., object]:
        exits.append(partial(function, *arguments, **named))
        return function

    def unregister(function: Callable[..., object]) -> None:
        exits[:] = [known for known in exits if known.func != function]  # type: ignore[attr-defined]

    def run_exit_functions() -> None:
        while exits:
            exits.pop()()
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]

    atexit.register, atexit.unregister = register, unregister  # type: ignore[assignment]
    atexit._run_exitfuncs = run_exit_functions


os.register_at_fork(after_in_child=_forget_what_the_parent_began)


@pytest.fixture(scope="session")
def adapter() -> ModuleType:
    """``tests/adapter_megatron.py``, loaded by path as an outside program would."""
    place = Path(__file__).parent / "adapter_megatron.py"
    spec = importlib.util.spec_from_file_location("adapter_megatron", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, the others in their order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What collection leaves stays: half a million objects, which each run in this process would have searched."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
