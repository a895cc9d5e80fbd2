"""Our own compiled kernels as rows of the tables: C++ on a CPU (``cpu.py``), CUDA on a GPU (``cuda.py``).

Both libraries have functions of the same names and arguments: ``add_rms_norm_forward`` and ``_backward``,
``rope_forward`` and ``_backward``, ``swiglu_forward`` and ``_backward``, ``adamw`` and ``add_square_sum``. ``fused.py``
makes operations of them. They are the first choice wherever they can run.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_hammer.kernels.table import HALVES, Demand

DTYPES = {"cpu": frozenset({torch.float32, torch.bfloat16}), "cuda": HALVES | {torch.float32}}


def missing(device: torch.device) -> str:
    """Why the compiled kernels cannot run on this device, or an empty string; for all rows named "fused"."""
    from megatron_hammer.kernels.native import cpu, cuda  # which know the types of the tables

    return (cpu if device.type == "cpu" else cuda).missing(device)


def library(device: torch.device) -> Any:
    """What holds the functions; only where nothing is missing."""
    from megatron_hammer.kernels.native import cpu, cuda

    return (cpu if device.type == "cpu" else cuda).library()


def limits(demand: Demand) -> str:
    """For all rows named "fused": the types of each device, and nothing that a compiler should see through."""
    if demand.dtype not in DTYPES.get(demand.device.type, ()):
        return f"does not compute in {str(demand.dtype).removeprefix('torch.')} on {demand.device.type}"
    return "is not for kernels.compile=layers" if demand.compile == "layers" else ""
