"""What it means to change a setting of a run that goes on from a checkpoint.

Each field in ``settings.py`` says so in its type, ``lr: Mathematics[float] = 5e-4``, and nowhere else: what may change
freely, what must be accepted by name (``--accept optimizer.lr``), and what the ranks of several nodes must have in
common. Needs no torch.
"""

from __future__ import annotations

import enum
import typing
from typing import Annotated, Any, TypeVar


class Effect(enum.Enum):
    """What changes with a setting; the value says it to people."""

    MODEL = "the weights would be those of another model"
    MATHEMATICS = "what a step computes"
    SAMPLES = "which samples a step computes with"
    CONTENT = "judged by what lies there, not by its path"
    LENGTH = "how long the run is"
    FREE = "nothing that is learnt"
    PLACE = "where files lie"

    @property
    def must_be_accepted(self) -> bool:
        """Whether a run that resumes with another value needs ``--accept``."""
        return self in (Effect.MATHEMATICS, Effect.SAMPLES)

    @property
    def is_common(self) -> bool:
        """Whether all ranks must have the same value; paths may differ from one node to the next."""
        return self not in (Effect.PLACE, Effect.CONTENT)


T = TypeVar("T")

Model = Annotated[T, Effect.MODEL]
"""Decides which function the weights mean: a checkpoint of another value is refused, whatever is accepted."""
Mathematics = Annotated[T, Effect.MATHEMATICS]
"""Decides what a step computes from its samples."""
Samples = Annotated[T, Effect.SAMPLES]
"""Decides which samples there are, and their order."""
Content = Annotated[T, Effect.CONTENT]
"""Names files whose content belongs to the run: their fingerprints are compared, the paths may change."""
Length = Annotated[T, Effect.LENGTH]
"""Decides when the run ends; may change freely where nothing else follows from it."""
Free = Annotated[T, Effect.FREE]
"""Logging, layout, kernels, limits, and what counts only when a run begins: may change at any time."""
Place = Annotated[T, Effect.PLACE]
"""Where files lie: may change at any time, and differ from node to node."""


def effect_of(hint: Any) -> Effect | None:
    """The effect that a field's type states; None where it states none."""
    found = [entry for entry in typing.get_args(hint)[1:] if isinstance(entry, Effect)]
    return found[0] if typing.get_origin(hint) is Annotated and found else None
