"""The table of kernels that rank 0 prints at start: which backend runs each operation, and why the others do not."""

from __future__ import annotations

from textwrap import wrap

from megatron_hammer.base.tables import align_wrapped
from megatron_hammer.config import ATTENTION_MASKS, KernelsConfig
from megatron_hammer.kernels.backend import Backend, Requirements
from megatron_hammer.kernels.native import cuda
from megatron_hammer.kernels.selection import TABLES, select_backends

WIDTHS = (10, 19, 22, 42)  # of the table's columns: 98 with what lies between


OURS = ("norm", "rope", "swiglu", "adamw")  # operations that our CUDA kernels compute


def missing_kernels(kernels: KernelsConfig, required: Requirements) -> str:
    """A warning where a run on a GPU would have taken our CUDA kernels had they been there, with the command that
    mends it; else an empty string.

    Raises:
        ConfigError: as ``select_backends``.
    """
    why = cuda.unavailable(required.device) if required.device.type == "cuda" else ""
    if not why:
        return ""
    chosen, instead = select_backends(kernels, required), dict[str, list[str]]()
    for operation in OURS:
        ours = next(row for row in TABLES[operation] if row.name == "fused")
        elsewhere = operation == "norm" and kernels.layers == "te"
        if getattr(kernels, operation) == "auto" and not (ours.unsupported(required) or elsewhere):
            instead.setdefault(chosen[operation].name, []).append(operation)
    if not instead:
        return ""
    what = " and ".join(f"{name} for {', '.join(operations)}" for name, operations in instead.items())
    slower = ", about a quarter slower" if "torch" in instead else ""
    return (
        f"WARNING: our CUDA kernels cannot run here: {why}.\n"
        f"WARNING: this run takes {what} instead{slower}. With nvcc (CUDA's toolkit) on PATH, build them by\n"
        f"WARNING:   {cuda.how_to_build()}"
    )


def kernels_table(kernels: KernelsConfig, required: Requirements) -> str:
    """What runs each operation, what else could, and why the other backends for this device cannot.

    Raises:
        ConfigError: as ``select_backends``.
    """
    precision = str(required.dtype).removeprefix("torch.")
    title = f"kernels for {precision} on {required.device.type}, data.attention_mask={required.mask}:"
    rows, notes = [("kernels.", "runs", "could run", "cannot run here")], list[str]()
    for operation, chosen in select_backends(kernels, required).items():
        if operation == "norm" and kernels.layers == "te":
            rows.append((operation, "te (kernels.layers)", "", ""))
            continue
        usable, unusable = _others(operation, chosen, required, notes)
        compiled = " (compiled)" if _is_compiled(kernels, operation, chosen, required.mask) else ""
        variant = f" ({name})" if (name := chosen.variant(required)) else ""
        rows.append((operation, chosen.name + variant + compiled, usable, unusable))
    if kernels.fp8 != "off":
        rows.append(("fp8", kernels.fp8 + (", head too" if kernels.fp8_head else ""), "", ""))
    below = (line for i, note in enumerate(notes, 1) for line in wrap(f"[{i}] {note}", 98))
    return "\n".join(
        [title, *(line for row in rows for line in align_wrapped(row, WIDTHS)), *(f"  {line}" for line in below)]
    )


def _others(operation: str, chosen: Backend, required: Requirements, notes: list[str]) -> tuple[str, str]:
    """The names of the backends that could run as well, and those that cannot, with the reasons."""
    usable, reasons = list[str](), dict[str, list[str]]()
    for backend in TABLES[operation]:
        if backend is chosen or required.device.type not in backend.devices:
            continue
        if not (reason := backend.unusable(required)):
            usable.append(backend.name)
        elif operation != "attention" or required.mask in ATTENTION_MASKS[backend.name]:  # else it was never meant
            reasons.setdefault(_short(reason, notes), []).append(backend.name)
    return ", ".join(usable), "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def _short(reason: str, notes: list[str]) -> str:
    """The gist of a reason, so that backends with the same one share a line; a long one becomes a note below."""
    gist = reason.removeprefix("cannot run here (").removesuffix(")") if "cannot run" in reason else reason
    if gist.endswith("is not installed"):
        return "not installed"
    if len(gist) <= WIDTHS[-1]:
        return gist
    if gist not in notes:
        notes.append(gist)
    return f"see [{notes.index(gist) + 1}]"


def _is_compiled(kernels: KernelsConfig, operation: str, chosen: Backend, mask: str) -> bool:
    """By itself, or as part of its layer."""
    if kernels.compile == "operations":
        return chosen.compiles
    inside = ("norm", "rope", "swiglu") if mask == "document" else ("attention", "norm", "rope", "swiglu")
    return kernels.compile == "layers" and operation in inside
