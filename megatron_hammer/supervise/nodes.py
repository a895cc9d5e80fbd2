"""Which ranks a launcher starts, and where they all meet.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """Which ranks this launcher starts and where they all meet."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0: any free port (one node only)."""

    @property
    def world_size(self) -> int:
        """Ranks of the whole run, over all nodes."""
        return self.nproc * self.nnodes
