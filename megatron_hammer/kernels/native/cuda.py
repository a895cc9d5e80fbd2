"""Our fused operations on a GPU: the compiled kernels (``csrc/kernels``) as ``torch.ops.hammer_cuda``.

``_cuda.so`` is a library of torch operations on torch's stable C++ ABI, not a Python module. It is there where setup.py
found nvcc and a torch for CUDA, and is loaded when ``unavailable`` is first called. Its operations check their
arguments, write into tensors that the caller has made, run on the current stream and never wait for the device.
"""

from __future__ import annotations

import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
LIBRARY = Path(__file__).with_name("_cuda.so")
OPERATIONS = (
    "add_rms_norm_forward",
    "add_rms_norm_backward",
    "rope_forward",
    "rope_backward",
    "swiglu_forward",
    "swiglu_backward",
    "adamw",
    "add_square_sum",
    "amax",
    "cast_fp8",
)


@cache
def _load(path: Path) -> str:
    """Load the library; why that failed, or an empty string."""
    if not path.exists():
        return f"{path.name} was not built: it takes nvcc, a torch for CUDA and pip install --no-build-isolation"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    absent = [name for name in OPERATIONS if not hasattr(torch.ops.hammer_cuda, name)]
    return f"{path.name} is older than this package (no {', '.join(absent)}): reinstall" if absent else ""


@cache
def unavailable(device: torch.device) -> str:
    """Why the compiled CUDA kernels cannot run on this device, or an empty string."""
    if why := _load(LIBRARY):
        return why
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:  # one launch: whether this driver and this GPU can run what was compiled
        torch.ops.hammer_cuda.amax(torch.ones(1, device=device), torch.empty((), device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return f"{reason}, on {torch.cuda.get_device_name(device)}{_remedy(reason, device)}"
    return ""


def _remedy(reason: str, device: torch.device) -> str:
    """What to do about CUDA's own words, where another build helps: not where a GPU has no memory left, say."""
    if "driver version" in reason:  # the runtime in the library is that of the nvcc which built it
        return f"; reinstall with the nvcc of CUDA {torch.version.cuda}, which this torch is for"
    major, minor = torch.cuda.get_device_capability(device)
    of_another_gpu = "kernel image" in reason or "PTX" in reason
    return f"; reinstall with HAMMER_CUDA_ARCHS={major}{minor}" if of_another_gpu else ""


def how_to_build() -> str:
    """The command that builds the library for this interpreter and its torch."""
    python, root = shlex.quote(sys.executable), Path(__file__).parents[3]
    place = shlex.quote(str(root)) if (root / "setup.py").exists() else "A_CLONE_OF_THE_REPOSITORY"
    return (
        f"{python} -m pip install 'setuptools>=68,<82' wheel 'pybind11>=2.12' && "
        f"{python} -m pip install --no-build-isolation --no-deps --force-reinstall --editable {place}"
    )


def library() -> Any:
    """The namespace of the operations; only where ``unavailable`` says nothing."""
    return torch.ops.hammer_cuda
