"""What a rank does by itself when torchrun or srun has started it, and not our launcher.

It joins the store that the variables of its environment name, and says over which network gloo talks: by itself gloo
takes the interface that this machine's own name resolves to, which may be loopback. It keeps compiled kernels on this
machine, as the ranks of our launcher do. The first rank of every node also keeps a heartbeat, so that a node which is
cut off is named and not the healthy rank that waited for it; and the ranks of a node watch each other for one that
hangs (``watchman.py``).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megatron_hammer.base.environment import keep_kernels_on_this_machine
from megatron_hammer.base.progress import say
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.heartbeat import Heartbeat
from megatron_hammer.parallel.rendezvous import Meeting, Store, interface_towards, torchrun_store
from megatron_hammer.parallel.watchman import Watchman, share_board

if TYPE_CHECKING:
    from megatron_hammer.base.errors import ParallelError


class OtherRanks:
    """What a rank shares with the others that torchrun or srun has started: store, board, heartbeat, watchman.

    Args:
        timeout_seconds: of collectives (``parallel.timeout_seconds``).
    """

    def __init__(self, rank: int, world_size: int, timeout_seconds: int) -> None:
        self.store: Store = torchrun_store(rank, world_size)
        meeting = Meeting(self.store, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        name = "lo" if here == world_size else interface_towards(meeting)
        if name:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        keep_kernels_on_this_machine()
        self._heartbeat = None
        if here < world_size and rank % here == 0:
            self._heartbeat = Heartbeat(meeting, rank // here, world_size // here, here, timeout_seconds)
        self._watchman = None
        node, local_rank = divmod(rank, here)
        try:
            board = share_board(self.store, node, local_rank, here)
            numbers = range(node * here, (node + 1) * here)
            self._watchman = Watchman(board, numbers, rank, timeout_seconds, here == world_size)
        except OSError as error:
            say(f"note: rank {rank} cannot be watched by its neighbours ({error.strerror}): a hang will not be named")

    @property
    def status(self) -> StatusSlot | None:
        """Where this rank notes what it does; None where there is no reader."""
        return None if self._watchman is None else self._watchman.status

    def lost(self) -> ParallelError | None:
        """A node that does not answer any more, or a rank of this node that has died, as far as this rank knows."""
        lost = None if self._heartbeat is None else self._heartbeat.lost()
        return self._watchman.dead() if lost is None and self._watchman is not None else lost

    def leave(self) -> None:
        """This rank has done its work, or has failed and said so."""
        if self._watchman is not None:
            self._watchman.stop()
