"""The dataset of the runs that train."""

from __future__ import annotations

from tests.train.conftest import data

__all__ = ["data"]
