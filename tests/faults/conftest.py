"""The dataset of runs that train, and a small tokenizer."""

from __future__ import annotations

from tests.dataset.conftest import tokenizer
from tests.train.conftest import data

__all__ = ["data", "tokenizer"]
