"""The set of operations that a model is built with, and the choice of a backend for each.

The model receives an ``Operations`` and never asks which implementation it holds; the plain torch functions in it by
default are the reference for every faster version. ``TABLES`` has the rows of every operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from textwrap import wrap
from typing import Any

import torch

from megatron_hammer.config import ATTENTION_MASKS, KernelsConfig
from megatron_hammer.kernels import adamw, attention, fp8, linear_cross_entropy, norm, rope, swiglu
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.attention import AttentionFunction
from megatron_hammer.kernels.attention_graph import in_graph
from megatron_hammer.kernels.linear import Products
from megatron_hammer.kernels.linear_cross_entropy import LossKernels
from megatron_hammer.kernels.norm import AddRMSNorm
from megatron_hammer.kernels.rope import Rope
from megatron_hammer.kernels.swiglu import SwiGLU
from megatron_hammer.kernels.table import Backend, Demand, select

TABLES: dict[str, Sequence[Backend]] = {  # setting in the group kernels -> rows
    "attention": attention.ROWS,
    "norm": norm.ROWS,
    "rope": rope.ROWS,
    "swiglu": swiglu.ROWS,
    "loss": linear_cross_entropy.ROWS,
    "adamw": adamw.ROWS,
}


@dataclass(frozen=True)
class Operations:
    """The functions a model is built with; each has the signature of its reference."""

    add_rms_norm: AddRMSNorm = norm.add_rms_norm
    rope: Rope = rope.rope
    swiglu: SwiGLU = swiglu.swiglu
    attention: AttentionFunction = attention.whole_samples
    loss: LossKernels = field(default_factory=LossKernels)
    products: Products = field(default_factory=Products)
    head_products: Products = field(default_factory=Products)


def select_backends(kernels: KernelsConfig, demand: Demand) -> dict[str, Backend]:
    """The row of every table that the run uses; loads none of them.

    Raises:
        ConfigError: no backend, or not the one that the user named, can do what is asked for.
    """
    return {
        operation: select(operation, getattr(kernels, operation), rows, demand) for operation, rows in TABLES.items()
    }


def kernels_table(kernels: KernelsConfig, demand: Demand) -> str:
    """What runs each operation, what else could, and why the others made for this device cannot: for people.

    Raises:
        ConfigError: as ``select_backends``.
    """
    precision = str(demand.dtype).removeprefix("torch.")
    title = f"kernels for {precision} on {demand.device.type}, data.attention_mask={demand.mask}:"
    rows, notes = [("kernels.", "runs", "could run", "cannot run here")], list[str]()
    for operation, chosen in select_backends(kernels, demand).items():
        if operation == "norm" and kernels.layers == "te":
            rows.append((operation, "te (kernels.layers)", "", ""))
            continue
        able, reasons = list[str](), dict[str, list[str]]()
        for row in TABLES[operation]:
            if row is chosen or demand.device.type not in row.devices:
                continue
            if not (obstacle := row.obstacle(demand)):
                able.append(row.name)
            elif operation != "attention" or demand.mask in ATTENTION_MASKS[row.name]:  # else it was never meant
                reasons.setdefault(_short(obstacle, notes), []).append(row.name)
        compiled = " (compiled)" if _is_compiled(kernels, operation, chosen, demand.mask) else ""
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        rows.append((operation, chosen.name + compiled, ", ".join(able), why))
    if kernels.fp8 != "off":
        rows.append(("fp8", kernels.fp8 + (", head too" if kernels.fp8_head else ""), "", ""))
    below = (line for i, note in enumerate(notes, 1) for line in wrap(f"[{i}] {note}", 98))
    return "\n".join([title, *(line for row in rows for line in _lines(row)), *(f"  {line}" for line in below)])


_WIDTHS = (10, 19, 22, 42)  # of the table's columns: 98 with what lies between


def _lines(row: tuple[str, ...]) -> Iterator[str]:
    """A row of the table, each cell wrapped in its column."""
    cells = (wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, _WIDTHS, strict=True))
    for parts in zip_longest(*cells, fillvalue=""):
        yield " " + "".join(f" {part:<{width}}" for part, width in zip(parts, _WIDTHS, strict=True)).rstrip()


def _short(obstacle: str, notes: list[str]) -> str:
    """The gist of an obstacle, so that backends with the same one share a line; a long one becomes a note below."""
    reason = obstacle.removeprefix("cannot run here (").removesuffix(")") if "cannot run" in obstacle else obstacle
    if reason.endswith("is not installed"):
        return "not installed"
    if len(reason) <= _WIDTHS[-1]:
        return reason
    if reason not in notes:
        notes.append(reason)
    return f"see [{notes.index(reason) + 1}]"


def _is_compiled(kernels: KernelsConfig, operation: str, chosen: Backend, mask: str) -> bool:
    """By itself, or as part of its layer."""
    if kernels.compile == "operations":
        return chosen.compiles
    inside = ("norm", "rope", "swiglu") if mask == "document" else ("attention", "norm", "rope", "swiglu")
    return kernels.compile == "layers" and operation in inside


def _be_deterministic() -> None:
    """Tell torch's own kernels to give equal bits from run to run, for the whole process: attention's backward above
    all, which adds in the order of arrival unless told otherwise, in torch and in the libraries that ask torch for it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses; read at its first use
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass a tensor


def select_operations(kernels: KernelsConfig, demand: Demand | None = None) -> Operations:
    """The operations that the config asks for; compilation itself happens at their first call.

    Where equal bits are asked for on a GPU, torch is told so, for the whole process.

    Raises:
        ConfigError: as ``select_backends``.
    """
    demand = demand or Demand()
    chosen = select_backends(kernels, demand)
    products = fp8.select_products(kernels, demand.device)
    measuring, alone = fp8.measuring(products[0]), kernels.compile == "operations"
    attention_row, opaque = chosen["attention"], kernels.compile == "layers" and demand.mask == "document"
    if demand.deterministic and demand.device.type == "cuda":  # a CPU's kernels are
        _be_deterministic()

    def fused(operation: str) -> Any:
        if chosen[operation].name == "fused" and operation in measuring:
            return measuring[operation]
        function = chosen[operation].load(demand.device)
        return partial(torch.compile, dynamic=False)(function) if alone and chosen[operation].compiles else function

    return Operations(
        fused("norm"),
        fused("rope"),
        fused("swiglu"),
        in_graph(attention_row, demand.device) if opaque else attention_row.load(demand.device),
        linear_cross_entropy.with_chunks(chosen["loss"].load(demand.device), kernels, demand.device),
        *products,
    )


def select_optimizer_kernels(kernels: KernelsConfig, demand: Demand) -> OptimizerKernels:
    """What the optimizer computes with.

    Raises:
        ConfigError: as ``select_backends``.
    """
    return select("adamw", kernels.adamw, TABLES["adamw"], demand).load(demand.device)  # type: ignore[no-any-return]
