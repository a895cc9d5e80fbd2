"""The numerical health of a run: which steps are not finite, which are spikes, and when weights may be saved.

A spike is a loss or a gradient norm above its limit. The limit follows from the finite values of the last
``train.spike_window_steps`` steps by robust statistics, which a few spikes do not move::

    limit = median + z * max(1.4826 * MAD, 1 % of |median|)        MAD: the median distance from the median

For step n the values up to step n - 2 count: on a GPU step n is launched before n - 1 has been read, and a CPU shall
decide the same. A phase that draws otherwise (``data.phases``) has other losses, which say nothing of a fault: its
limits follow from its own steps, and the first of these have none. So the limits are a function of recorded numbers
alone, equal on all ranks. These are kept in every checkpoint, and a run that goes on decides as if it had never
stopped. Needs no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hammer.sampling.ledger import Finding

KNOWN_AFTER = 2  # steps: see above
SMALLEST_HISTORY = 20  # values: of fewer the median distance says little
NORMAL = 1.4826  # the standard deviation of a normal distribution whose MAD is 1
SMALLEST_SPREAD = 0.01  # of the median: values that hardly differ must not make a trifle a spike


@dataclass(frozen=True)
class Limits:
    """What the loss and the gradient norm of a step may be at most."""

    loss: float
    grad_norm: float


class Health:
    """What is remembered of the steps that have been read, and what follows from it.

    Args:
        window: values that the limits follow from.
        z: how many robust standard deviations above the median the limits are.
    """

    def __init__(self, window: int, z: float) -> None:
        self.window, self.z = window, z
        self.recent: list[tuple[int, float, float]] = []
        """(step, loss, gradient norm) of steps where both were finite."""
        self.streak = 0
        """Steps in a row, up to the last, that were not finite or were held back as spikes."""
        self.since = 0
        """The step from which on values count: the first that reads samples of the present phase."""
        self.skips = 0
        """Steps in a row, up to the last, that changed nothing, for whatever reason."""

    def begin_anew(self, step: int) -> None:
        """From this step on samples are drawn otherwise: what was before it is no measure any more."""
        self.since = step

    def limits(self, step: int) -> Limits | None:
        """Of a step; None while too little is known."""
        known = [values for at, *values in self.recent if self.since <= at <= step - KNOWN_AFTER][-self.window :]
        if len(known) < SMALLEST_HISTORY:
            return None
        losses, norms = zip(*known, strict=True)
        return Limits(_limit(losses, self.z), _limit(norms, self.z))

    def take(
        self, step: int, loss: float, grad_norm: float, applied: bool, limits: Limits | None, scaled: bool
    ) -> Finding | Literal[""]:
        """Remember a step that has been read; what is wrong with it.

        Args:
            limits: those of the step.
            scaled: the loss is scaled (fp16): a gradient that is not finite while the loss is looks for a scale.
        """
        finding: Finding | Literal[""] = ""
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaled):
            finding = "nonfinite"
        elif limits is not None and (loss > limits.loss or (limits.grad_norm < grad_norm < math.inf)):
            finding = "spike"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.recent = [*self.recent, (step, loss, grad_norm)][-(self.window + KNOWN_AFTER) :]
        self.skips = 0 if applied else self.skips + 1
        self.streak = self.streak + 1 if finding and not applied else 0
        return finding

    def to_tree(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON values, which give floats back exactly."""
        recent = [list(values) for values in self.recent]
        return {"recent": recent, "since": self.since, "streak": self.streak, "skips": self.skips}

    def load(self, tree: Mapping[str, Any]) -> None:
        """The inverse; of a checkpoint that kept nothing, nothing is remembered."""
        self.recent = [(int(step), float(loss), float(norm)) for step, loss, norm in tree.get("recent", ())]
        self.streak, self.skips = int(tree.get("streak", 0)), int(tree.get("skips", 0))
        self.since = int(tree.get("since", 0))


def _limit(values: tuple[float, ...], z: float) -> float:
    median = statistics.median(values)
    spread = NORMAL * statistics.median(abs(value - median) for value in values)
    return median + z * max(spread, SMALLEST_SPREAD * abs(median))
