"""Drives a run: begins it, trains on, and begins again from an older checkpoint after a rewind (``rewind.py``).

A program goes on to the end in one call, ``train``. The Python interface (``api/run.py``) enters a ``Training`` and
goes on a few steps at a time: the same loop, so the same bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from megatron_hammer.base.signals import StopRequest
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.prepare import Prepared

BeginRun = Callable[[Prepared, ParallelContext], TrainLoop | None]
"""Builds a run and loads its state; None where its end is reached already."""


class Training:
    """One process's part of a run, through any number of beginnings. A context manager: within it the run has outputs.

    Args:
        heard: called with each line of metrics.jsonl, on rank 0.
    """

    def __init__(
        self,
        prepared: Prepared,
        ctx: ParallelContext,
        begin: BeginRun = TrainLoop,
        heard: Callable[[Mapping[str, Any]], None] = lambda line: None,
    ) -> None:
        self._ctx, self._begin, self._heard = ctx, begin, heard
        self._outputs, self._is_open = ExitStack(), False
        self.loop = begin(prepared, ctx)
        """None where there is nothing to do."""

    def __enter__(self) -> Training:
        self._is_open = True
        self._open()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_open = False
        self._outputs.__exit__(*error)

    def _open(self) -> None:
        if self.loop is not None:
            self.loop.heard = self._heard
            self._outputs.enter_context(self.loop.reporting())

    def advance(self, last: int | None, stop: Callable[[], bool], save_when_stopped: bool = True) -> int:
        """Go on to the end of step ``last``, None: to the end; as ``TrainLoop.advance``."""
        while self.loop is not None:
            if self.loop.rewound is None:
                end = self.loop.config.train.num_steps
                code = self.loop.advance(end if last is None else last, stop, save_when_stopped)
                if code or self.loop.rewound is None:
                    return code
            self._begin_again()
        return 0

    def _begin_again(self) -> None:
        """Begin as a run that was stopped and started anew would."""
        assert self._is_open and self.loop is not None and self.loop.rewound is not None
        rewound, self.loop = self.loop.rewound, None
        self._outputs.close()
        gc.collect()  # the weights leave before those of the next one come
        self.loop = self._begin(rewound, self._ctx)
        self._open()


def train(prepared: Prepared, ctx: ParallelContext, begin: BeginRun = TrainLoop) -> int:
    """Train from wherever the run stands to its end; return the exit code (0, or 75 after a stop signal)."""
    training = Training(prepared, ctx, begin)
    with StopRequest() as request, training:
        return training.advance(None, lambda: request.received)
