"""What a rank that the launcher has started runs first and last in its process: it sets up signals and output, runs the
training, hands an error to the launcher and exits with its code."""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from megatron_hammer.base.cli import leave
from megatron_hammer.base.errors import ParallelError, from_exception, to_fields
from megatron_hammer.base.signals import STOP_SIGNALS, on_signals
from megatron_hammer.base.streams import OutputKind, flush_streams, guard_streams
from megatron_hammer.base.system import die_with_parent
from megatron_hammer.config import Config
from megatron_hammer.parallel.board import Board
from megatron_hammer.parallel.rendezvous import collective_timeout, join_store

StoreAddress = tuple[str, int] | None
"""Address and port of the store; None for a rank that is alone."""


def rank_main(
    entry: str,
    config: Config,
    rank: int,
    local_rank: int,
    world_size: int,
    place: StoreAddress,
    options: dict[str, Any],
    launcher: int,
    pipe: Connection,
    board: Board,
) -> None:
    """First function of a new process: run ``entry``, hand any error to the launcher, exit with its code.

    Args:
        board: of the ranks of this machine, on which this one notes what it does.
    """
    die_with_parent(launcher)
    status = board.slot(local_rank)
    guard_streams(OutputKind.LOG)
    # What the training loop gives back at its end: a late signal changes nothing.
    on_signals(STOP_SIGNALS, lambda *_: None)
    try:
        store = None if place is None else join_store(*place, collective_timeout(config.parallel.timeout_seconds)).store
        module, _, function = entry.partition(":")
        run_rank = getattr(importlib.import_module(module), function)
        check_data = False  # the launcher has
        code = run_rank(config, rank, local_rank, world_size, store, check_data, status=status, **options)
    except BaseException as error:
        known = from_exception(error, f"rank {rank}")
        pipe.send_bytes(
            json.dumps(
                {
                    "time": time.monotonic(),  # one clock for all processes of a machine
                    "in_collective": status.is_waiting,
                    "error": None if known is None else to_fields(known),
                    "exception": " ".join(traceback.format_exception_only(error)).strip(),
                    "traceback": "".join(traceback.format_exception(error))[-20_000:].rstrip(),
                }
            ).encode()
        )
        flush_streams()
        os._exit(known.exit_code if known is not None else ParallelError.exit_code)  # no teardown with a broken peer
    leave(code)
