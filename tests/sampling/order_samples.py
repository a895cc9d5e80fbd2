"""One sample of an order, as tests ask for it."""

from __future__ import annotations

from typing import Any


def sample(order: Any, position: int) -> tuple[int, int]:
    """Epoch and window of sample ``position`` of a source's order."""
    window = int(order.windows(position, 1)[0])
    return window * order.seq_length // order.num_tokens, window
