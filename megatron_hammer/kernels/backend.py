"""What a backend is: one way to compute an operation, with a statement of what it supports and what it needs.

Every operation that has more than one implementation (attention, norm, RoPE, SwiGLU, output head and loss, AdamW) has a
file in this folder with its plain torch reference and ``BACKENDS``, a table with a row for each implementation. A row
is a ``Backend``. What a run requires of its backends is a ``Requirements``; ``selection.py`` compares the two and
chooses. A new backend is therefore a function and a row.

The library that a backend needs is imported when the backend is loaded, never before: a machine without the library
pays nothing for the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

HALVES = frozenset({torch.bfloat16, torch.float16})
FLOATS = HALVES | {torch.float32, torch.float64}
ANYWHERE, CPU, CUDA = frozenset({"cpu", "cuda"}), frozenset({"cpu"}), frozenset({"cuda"})


@dataclass(frozen=True)
class Requirements:
    """What a run requires of its backends on each rank; heads and groups are those of one rank."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    mask: str = "causal"
    """``data.attention_mask``."""
    heads: int = 1
    groups: int = 1
    head_size: int = 64
    deterministic: bool = False
    """``kernels.deterministic``: equal bits from run to run."""
    compile: str = "none"
    """``kernels.compile``."""
    context_parallel: int = 1
    """``parallel.context_parallel_size``: above 1 documents have fewer queries than keys, whatever the mask."""


def supports_all(required: Requirements) -> str:
    """For a backend that supports everything on its devices and in its dtypes."""
    return ""


def one_version(required: Requirements) -> str:
    """For a backend that is the same on every machine."""
    return ""


def needs_nothing(device: torch.device) -> str:
    """For a backend that needs nothing but torch."""
    return ""


def always(required: Requirements) -> bool:
    """For a backend that "auto" may take wherever it can be used."""
    return True


@dataclass(frozen=True)
class Backend:
    """One row of an operation's table: what an implementation states about itself."""

    name: str
    """The value of the operation's setting (``kernels.norm=NAME``) that chooses it."""
    load: Callable[[torch.device], Any]
    """Import what the backend needs and return the operation's function for this device."""
    devices: frozenset[str] = ANYWHERE
    dtypes: frozenset[torch.dtype] = FLOATS
    unsupported: Callable[[Requirements], str] = supports_all
    """Why it does not support what is required, beyond device and dtype, or an empty string."""
    unavailable: Callable[[torch.device], str] = needs_nothing
    """Why this machine cannot run it, or an empty string; asked only about a device in ``devices``."""
    by_name_only: bool = False
    """Never chosen by "auto": not measured to be faster, or slow to import."""
    preferred: Callable[[Requirements], bool] = always
    """Whether "auto" may take it, asked where it can be used: false where another was measured to be faster or nobody
    has measured."""
    variant: Callable[[Requirements], str] = one_version
    """Which of its versions this machine takes, for the table at start, or an empty string; of the chosen only."""
    deterministic: bool = True
    """Equal bits from run to run, with torch's own switch on (``_be_deterministic`` in selection.py)."""
    compiles: bool = False
    """torch.compile can look into it, so that ``kernels.compile`` fuses it with its neighbours."""

    def unusable(self, required: Requirements) -> str:
        """Why this backend cannot be used for what is required, or an empty string."""
        if required.device.type not in self.devices:
            return f"does not run on {required.device.type}"
        if required.dtype not in self.dtypes:
            return f"does not compute in {str(required.dtype).removeprefix('torch.')}"
        if required.deterministic and not self.deterministic:
            return "is not the same from run to run (kernels.deterministic=true)"
        if reason := self.unsupported(required):
            return reason
        reason = self.unavailable(required.device)
        return f"cannot run here ({reason})" if reason else ""
