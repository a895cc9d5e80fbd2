"""What a rank has gathered, for comparisons with what is counted."""

from __future__ import annotations

from megatron_hammer.config import Config
from megatron_hammer.costs.rank_buffers import StageBuffers


def buffer_bytes(config: Config, world_size: int, rank: int) -> dict[str, int]:
    """Bytes at each moment of a rank's last stage, of a micro-batch that is not the first where there are several."""
    buffers = StageBuffers(config, world_size, rank)
    count = len(buffers.stages)
    return buffers.at(count - 1, [config.grad_accum(world_size) > 1] * count, [n == count - 1 for n in range(count)])
