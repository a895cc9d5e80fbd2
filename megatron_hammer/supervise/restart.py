"""Whether to start the ranks again after a failure, and how many of them.

A rank that died or hung, or ranks that drifted apart, may be a fault of the machine that does not recur; a mistake of
the user's, a full disk and a loss that is not finite would recur. Where the same rank fails twice without a checkpoint
in between, the run goes on with fewer ranks, if the user allows it and the batch divides among them: on each of several
nodes, whose launchers do what node 0 has decided (``several_nodes.py``). Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hammer.base.errors import ConfigError, DriftError, HangError, ParallelError
from megatron_hammer.checkpoint.folder import find_checkpoints
from megatron_hammer.config import Config
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.watch import Failure

WORTH_IT = (ParallelError, HangError, DriftError)


@dataclass
class Restarts:
    """What is left of the restarts that the user allows."""

    config: Config
    most: int
    fewest_ranks: int
    done: int = 0
    _last: tuple[str, Path | None] | None = None
    """Who failed before, and the newest checkpoint then."""

    def after(self, failure: Failure, node: Node) -> Node | None:
        """The ranks to start after a failure; None where it stands."""
        if self.done >= self.most or not isinstance(failure.error, WORTH_IT):
            return None
        self.done += 1
        newest = find_checkpoints(self.config.train.output)[-1:]
        this = failure.error.what, newest[0] if newest else None
        again = this == self._last
        self._last = this
        return replace(node, nproc=self._fewer(node)) if again else node

    def as_decided(self, nproc: int, node: Node) -> Node | None:
        """The ranks to start as node 0 has decided, where this is another node."""
        if node.node_rank and nproc:
            self.done += 1
        return replace(node, nproc=nproc) if nproc else None

    def _fewer(self, node: Node) -> int:
        """The most ranks of a node below these that the layout and the batch allow; as many, where none are."""
        for fewer in range(node.nproc - 1, self.fewest_ranks - 1, -1):
            try:
                self.config.validate(fewer * node.nnodes)
            except ConfigError:
                continue
            return fewer
        return node.nproc


def make_restarts(config: Config, node: Node, most: int, fewest_ranks: int | None) -> Restarts:
    """The restarts that the command line asks for, checked."""
    if most < 0:
        raise ConfigError(40, f"--max-restarts={most}", "must not be negative", "use 0 for none")
    fewest = node.nproc if fewest_ranks is None else fewest_ranks
    if not 1 <= fewest <= node.nproc:
        raise ConfigError(40, f"--min-nproc={fewest}", f"must lie in 1 to --nproc={node.nproc}", "leave it out")
    return Restarts(config, most, fewest)
