"""``python -m megatron_hammer.train CONFIG.yaml [group.field=value ...]``: one process, or one rank under torchrun.

``python -m megatron_hammer.launch`` starts several ranks and has the clearer exit codes. Needs no torch.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_hammer.base.signals import end_at_once

if TYPE_CHECKING:
    from megatron_hammer.base.cli import ArgumentParser


def build_parser() -> ArgumentParser:
    """The command line; torch is not imported for it."""
    from megatron_hammer.base.cli import ArgumentParser
    from megatron_hammer.config import add_settings, help_text

    parser = ArgumentParser(
        prog="python -m megatron_hammer.train",
        description="Train a Llama; the same command resumes.",
        epilog=help_text(),
    )
    add_settings(parser)
    return parser


def main() -> int:
    """Run the rank that torchrun's variables describe, or the only one."""
    from megatron_hammer.base.cli import keep_torch_quiet, leave, report_error
    from megatron_hammer.base.errors import ParallelError, from_exception
    from megatron_hammer.base.progress import say
    from megatron_hammer.config import load_config

    arguments = build_parser().parse_intermixed_args()
    keep_torch_quiet()
    rank, local_rank, world_size = _place_of_torchrun(os.environ)
    config = load_config(arguments.config, arguments.overrides, note=say if rank == 0 else None)
    from megatron_hammer.train.run import run_rank

    if world_size == 1:
        return run_rank(config, rank, local_rank, world_size, None, accepted=arguments.accept)
    from megatron_hammer.parallel.torchrun import OtherRanks

    nodes = OtherRanks(rank, world_size, config.parallel.timeout_seconds)
    try:
        code = run_rank(
            config, rank, local_rank, world_size, nodes.store, accepted=arguments.accept, status=nodes.status
        )
    except Exception as error:
        known = from_exception(error, f"rank {rank}")
        if known is None:
            lost = nodes.lost()
            if lost is None:
                traceback.print_exception(error)
            known = lost or ParallelError(2, f"rank {rank}", f"raised {type(error).__name__}", "its traceback is above")
        code = report_error(known)
    nodes.leave()
    leave(code)


def _place_of_torchrun(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of its GPU on this node and number of ranks, by torchrun's variables; without them the only one.

    Raises:
        ConfigError: E240: they are left over from something else.
    """
    from megatron_hammer.base.errors import ConfigError

    remedy = "start with torchrun, srun or python -m megatron_hammer.launch; or unset RANK, LOCAL_RANK and WORLD_SIZE"

    def number(name: str, default: int, least: int = 0) -> int:
        text = environment.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ConfigError(40, f"environment variable {name}={text[:40]!r}", "must be a number", remedy)
        if int(text) < least:
            raise ConfigError(40, f"environment variable {name}={text}", f"must be at least {least}", remedy)
        return int(text)

    rank, local_rank, world_size = number("RANK", 0), number("LOCAL_RANK", 0), number("WORLD_SIZE", 1)
    if rank >= world_size:
        what = f"environment variables RANK={rank}, WORLD_SIZE={world_size}"
        raise ConfigError(40, what, "must name one of the ranks, counted from 0", remedy)
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                rule = f"is missing beside WORLD_SIZE={world_size}"
                raise ConfigError(40, f"environment variable {name}", rule, remedy)
        number("MASTER_PORT", 0)
        number("LOCAL_WORLD_SIZE", world_size, least=1)
    if _has_a_gpu_of_its_own(environment):
        local_rank = 0
    return rank, local_rank, world_size


def _has_a_gpu_of_its_own(environment: Mapping[str, str]) -> bool:
    """Whether Slurm has bound this task to one GPU, as by --gpus-per-task=1: it sees no other, and calls it 0.

    One GPU alone says nothing: without a binding all tasks of a node may see the same one.
    """
    is_task = environment.get("SLURM_LOCALID", "") == environment.get("LOCAL_RANK", "0")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    binding = re.split("[:,]", environment.get("SLURM_GPU_BIND", "").removeprefix("verbose,"))[0]
    is_bound = "SLURM_GPUS_PER_TASK" in environment or binding in ("single", "per_task", "map_gpu", "mask_gpu")
    return is_task and is_bound and visible != "" and "," not in visible


def _main() -> None:
    """Handlers first: everything else is loaded behind them."""
    end_at_once("before the first step")
    from megatron_hammer.base.cli import run
    from megatron_hammer.base.streams import OutputKind

    run(main, OutputKind.LOG)


if __name__ == "__main__":
    _main()
