"""The Python sources of Transformer Engine, read and never installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wheels import sources_of

VERSION = "2.20.2"


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder that holds ``transformer_engine/`` of that version."""
    return sources_of("transformer-engine", VERSION, "te")
