"""What the backend "triton" of all operations needs: the package triton and a C compiler.

Triton comes with every torch for CUDA on Linux and makes GPU code without nvcc. But it compiles the small program that
launches a kernel with the machine's own C compiler, once for each machine and cache. So a container without gcc cannot
run it, which is found out before the first step.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_hammer.kernels.backend import Requirements

Result = TypeVar("Result")


def unavailable(device: torch.device) -> str:
    """Why Triton's kernels cannot be made here, or an empty string; does not import it."""
    return _missing()


def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as triton.runtime.build looks
    if compiler is None:
        return "triton finds no C compiler: apt-get install gcc, or set CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.exists() else f"triton needs Python's headers ({header}): apt-get install python3-dev"


def unsupported(required: Requirements) -> str:
    """Limit of its rows for layers: ``kernels.compile=layers`` would have to look into their launches."""
    return "is not for kernels.compile=layers" if required.compile == "layers" else ""


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of a CPU, where Triton's interpreter computes."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_its_gpu(launch: Callable[..., Result]) -> Callable[..., Result]:
    """``launch`` on the GPU of its first argument: Triton takes the current one, wherever the tensors lie."""

    @wraps(launch)
    def there(first: Tensor, *rest: Any, **named: Any) -> Result:
        with torch.cuda.device_of(first):
            return launch(first, *rest, **named)

    return there
