"""Python's garbage collector during training: it runs when the loop asks for it, on all ranks at the same step.

Needs no torch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collected_by_hand() -> Iterator[None]:
    """No garbage collection but those that the loop asks for, which do not look at what was there before.

    Left alone, Python's collector stops a rank at any moment to go through the modules, tables and closures of
    the set-up, all of which stay: 50 ms here, half a second in nanochat's log (dev/LOG.md).

    Where somebody has frozen objects before, none is added: they could not be told apart and let go again.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    if not frozen:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()
