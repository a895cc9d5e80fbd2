"""Stands in for a data source whose files were deleted after the last phase that draws from it.

The order of a run's samples depends on the content and the number of tokens of every source that any of its phases
draws from, past ones included. Tokens are read of the remaining phases only. So when a run is past the last phase of a
source, its files may be deleted: the checkpoints record its fingerprint and its tokens (``train/identity.py``), which
are enough to count it and to name its samples. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.base.errors import DataError
from megatron_hammer.dataset.format import path_of


@dataclass(frozen=True)
class AbsentSource:
    """What stands in the place of an ``IndexedDataset`` that is not read any more."""

    prefix: Path
    fingerprint: str
    num_tokens: int

    @property
    def document_lengths(self) -> np.ndarray:
        """One document: where documents end decides nothing but which tokens a sample reads."""
        return np.array([self.num_tokens], np.int64)

    def refusal(self) -> DataError:
        """The error where a token of it is asked for."""
        rule = "is not there, and a sample is asked for that reads it; the rest of the run does without"
        return DataError(30, str(path_of(self.prefix, ".bin")), rule, "bring it back to look at samples that are past")


def is_missing(prefix: str | Path) -> bool:
    """Whether a dataset lacks a file that it cannot be opened without."""
    return not all(path_of(Path(prefix), ending).exists() for ending in (".idx", ".bin"))
