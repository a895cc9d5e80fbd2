"""Our compiled kernels of a device, as the backend "fused" of the tables: C++ on a CPU, CUDA on a GPU.

Both libraries (``cpu.py`` and ``cuda.py``) have functions of the same names and arguments: ``add_rms_norm_forward`` and
``_backward``, ``rope_forward`` and ``_backward``, ``swiglu_forward`` and ``_backward``, ``adamw`` and
``add_square_sum``. ``autograd.py`` makes operations of them. They are the first choice wherever they can run.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.native import cpu, cuda

DTYPES = {"cpu": cpu.DTYPES, "cuda": cuda.DTYPES}


def unavailable(device: torch.device) -> str:
    """Why the compiled kernels cannot run on this device, or an empty string; for every backend named "fused"."""
    return cpu.unavailable(device) if device.type == "cpu" else cuda.unavailable(device)


def library(device: torch.device) -> Any:
    """What holds the compiled functions; only where ``unavailable`` says nothing."""
    return cpu.library() if device.type == "cpu" else cuda.library()


def unsupported(required: Requirements) -> str:
    """For every backend named "fused": the dtypes of each device, and nothing that a compiler should look into."""
    if required.dtype not in DTYPES.get(required.device.type, ()):
        return f"does not compute in {str(required.dtype).removeprefix('torch.')} on {required.device.type}"
    return "is not for kernels.compile=layers" if required.compile == "layers" else ""
