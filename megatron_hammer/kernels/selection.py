"""The choice of a backend for every operation, from what the config asks for and what this machine can run.

``TABLES`` holds the backends of every operation in the order of preference. "auto" takes the first that supports what
the run requires and can run here. A backend that the user named and that cannot be used is an error that says why:
nothing is replaced in silence. The choice that was made is printed by ``report.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, KernelsConfig
from megatron_hammer.kernels import adamw, attention, fp8, linear_cross_entropy, norm, rope, swiglu
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.backend import Backend, Requirements
from megatron_hammer.kernels.operations import Operations

TABLES: dict[str, Sequence[Backend]] = {  # setting in the group kernels -> backends
    "attention": attention.BACKENDS,
    "norm": norm.BACKENDS,
    "rope": rope.BACKENDS,
    "swiglu": swiglu.BACKENDS,
    "loss": linear_cross_entropy.BACKENDS,
    "adamw": adamw.BACKENDS,
}


COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``train.precision`` -> the type in which the model computes."""


def kernel_requirements(config: Config, device: torch.device) -> Requirements:
    """What this run asks of its kernels on each rank."""
    at = config.placement()
    return Requirements(
        device,
        COMPUTE_DTYPES[config.train.precision],
        config.data.attention_mask,
        heads=at.heads_local,
        groups=at.groups_local,
        head_size=config.model.head_size,
        deterministic=config.kernels.deterministic,
        compile=config.kernels.compile,
        context_parallel=config.parallel.context_parallel_size,
    )


def select(operation: str, name: str, backends: Sequence[Backend], required: Requirements) -> Backend:
    """The backend of this name, or for "auto" the first that can do what is required.

    Raises:
        ConfigError: the backend that the user named cannot do it, or none can.
    """
    if name != "auto":
        named = next(backend for backend in backends if backend.name == name)
        if reason := named.unusable(required):
            usable = [backend.name for backend in backends if not backend.unusable(required)]
            raise ConfigError(9, f"kernels.{operation}={name}", reason, f"use {' or '.join(['auto', *usable])}")
        return named
    reasons = []
    for backend in backends:
        if backend.by_name_only:
            continue
        reason = backend.unusable(required)
        if not reason and backend.preferred(required):
            return backend
        reasons.append(f"{backend.name} {reason or 'is taken by name only on this device'}")
    raise ConfigError(
        10, f"kernels.{operation}=auto", f"finds no backend: {', '.join(reasons)}", "change one of these settings"
    )


def select_backends(kernels: KernelsConfig, required: Requirements) -> dict[str, Backend]:
    """The backend of every operation that the run uses; none of them is loaded.

    Raises:
        ConfigError: no backend, or not the one that the user named, can do what is required.
    """
    return {
        operation: select(operation, getattr(kernels, operation), backends, required)
        for operation, backends in TABLES.items()
    }


def select_operations(kernels: KernelsConfig, required: Requirements | None = None) -> Operations:
    """The operations that the config asks for; compilation itself happens at their first call.

    Where equal bits are required on a GPU, torch's own switch for that is turned on, for the whole process.

    Raises:
        ConfigError: as ``select_backends``.
    """
    required = required or Requirements()
    device, chosen = required.device, select_backends(kernels, required)
    products = fp8.select_products(kernels, device, required.dtype)
    measuring = fp8.measuring(products[0])
    if required.deterministic and device.type == "cuda":  # a CPU's kernels are deterministic
        _be_deterministic()

    def load(operation: str) -> Any:
        if chosen[operation].name == "fused" and operation in measuring:
            return measuring[operation]
        function = chosen[operation].load(device)
        by_itself = kernels.compile == "operations" and chosen[operation].compiles
        return partial(torch.compile, dynamic=False)(function) if by_itself else function

    in_graph = kernels.compile == "layers" and required.mask == "document"
    return Operations(
        load("norm") if chosen["norm"].name in ("fused", "triton") else norm.with_gradient(load("norm")),
        load("rope"),
        load("swiglu"),
        attention.in_graph(chosen["attention"], device) if in_graph else chosen["attention"].load(device),
        linear_cross_entropy.with_chunks(chosen["loss"].load(device), kernels, device),
        *products,
    )


def select_optimizer_kernels(kernels: KernelsConfig, required: Requirements) -> OptimizerKernels:
    """What the optimizer computes with.

    Raises:
        ConfigError: as ``select_backends``.
    """
    loaded: OptimizerKernels = select("adamw", kernels.adamw, TABLES["adamw"], required).load(required.device)
    return loaded


def _be_deterministic() -> None:
    """Tell torch's own kernels to give equal bits from run to run, for the whole process: attention's backward above
    all, which otherwise adds in the order of arrival, in torch and in the libraries that read torch's switch.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses; read at its first use
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass a tensor
