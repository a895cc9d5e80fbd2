"""Named ranges, with which the model and the optimizer mark which part of a step runs, for a profiler.

A ``RangeOf`` is a function from a name to a context manager. Models and optimizers are built with one and enter it
around their parts (a range, as in NVTX); the default does nothing. ``profile/`` builds them with torch's
``record_function``. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

RangeOf = Callable[[str], AbstractContextManager[Any]]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

NORM = "norm, residual"
ROPE = "RoPE"
SWIGLU = "SwiGLU"
ATTENTION = "attention"
EMBEDDING = "embedding"
LINEAR = "linear"
"""A linear layer of the decoder."""
HEAD = "head"
"""Output head and loss."""
GRADIENT = "weight gradient"
"""Computing and summing the gradient of one weight."""
OPTIMIZER = "optimizer, clipping"

no_range: RangeOf = nullcontext
"""The range where nothing is profiled."""


def within(range_of: RangeOf, name: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function``, each call in the range of this name."""
    if range_of is no_range:
        return function

    @wraps(function)
    def ranged(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with range_of(name):
            return function(*args, **kwargs)

    return ranged
