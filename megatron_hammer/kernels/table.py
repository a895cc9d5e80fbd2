"""Tables of backends: for every hot operation, who can compute it, what each can do, and which one runs.

Each operation has a file with its plain torch reference and ``ROWS``, a table of ``Backend``. At start ``select`` takes
the first row that can do what the run asks for (``Demand``). One that cannot is passed over, and is an error where the
user named it: nothing is ignored in silence. A new backend is a function and a row.

What a row needs is imported when it is loaded, never before: a machine without the library pays nothing for the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_hammer.base.errors import ConfigError

HALVES = frozenset({torch.bfloat16, torch.float16})
FLOATS = HALVES | {torch.float32, torch.float64}
ANYWHERE, CUDA = frozenset({"cpu", "cuda"}), frozenset({"cuda"})


@dataclass(frozen=True)
class Demand:
    """What a run asks of its operations on each rank; heads and groups are local ones."""

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


def no_limits(demand: Demand) -> str:
    """For a row that can do whatever its devices and dtypes allow."""
    return ""


def always(demand: Demand) -> bool:
    """For a row that "auto" may take wherever it can run."""
    return True


def nothing_missing(device: torch.device) -> str:
    """For a row that needs nothing but torch."""
    return ""


@dataclass(frozen=True)
class Backend:
    """A row of a table: what a backend declares that it can do."""

    name: str
    """Value of the operation's setting."""
    load: Callable[[torch.device], Any]
    """Import what it needs and return the operation's function for this device."""
    devices: frozenset[str] = ANYWHERE
    dtypes: frozenset[torch.dtype] = FLOATS
    limits: Callable[[Demand], str] = no_limits
    """Why it cannot do what is asked for, beyond device and dtype, or an empty string."""
    missing: Callable[[torch.device], str] = nothing_missing
    """Why this machine cannot run it, or an empty string; asked only on a device that it declares."""
    by_name_only: bool = False
    """Never chosen by "auto": not measured to be faster, or slow to import."""
    preferred: Callable[[Demand], bool] = always
    """Whether "auto" may take it, asked where it can run: false where another was measured to be faster or none was."""
    deterministic: bool = True
    """Equal bits from run to run, with torch's own switch on (``be_deterministic`` in operations.py)."""
    compiles: bool = False
    """torch.compile can look into it, so that ``kernels.compile`` fuses it with its neighbours."""

    def obstacle(self, demand: Demand) -> str:
        """Why this backend cannot do what is asked for, or an empty string."""
        if demand.device.type not in self.devices:
            return f"does not run on {demand.device.type}"
        if demand.dtype not in self.dtypes:
            return f"does not compute in {str(demand.dtype).removeprefix('torch.')}"
        if demand.deterministic and not self.deterministic:
            return "is not the same from run to run (kernels.deterministic=true)"
        if limit := self.limits(demand):
            return limit
        missing = self.missing(demand.device)
        return f"cannot run here ({missing})" if missing else ""


def select(operation: str, name: str, rows: Sequence[Backend], demand: Demand) -> Backend:
    """The row of this name, or for "auto" the first that can do what is asked for.

    Raises:
        ConfigError: the backend that the user named cannot do it, or none can.
    """
    if name != "auto":
        row = next(row for row in rows if row.name == name)
        if obstacle := row.obstacle(demand):
            able = [other.name for other in rows if not other.obstacle(demand)]
            raise ConfigError(9, f"kernels.{operation}={name}", obstacle, f"use {' or '.join(['auto', *able])}")
        return row
    obstacles = []
    for row in rows:
        if row.by_name_only:
            continue
        obstacle = row.obstacle(demand)
        if not obstacle and row.preferred(demand):
            return row
        obstacles.append(f"{row.name} {obstacle or 'is taken by name only on this device'}")
    raise ConfigError(
        10, f"kernels.{operation}=auto", f"finds no backend: {', '.join(obstacles)}", "change one of these settings"
    )
