"""Both backends of the index builder."""

from __future__ import annotations

import pytest

from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling import index_builder_numpy
from tests.dataset.conftest import tokenizer  # noqa: F401


@pytest.fixture(scope="session")
def compiled():
    """The compiled index builder; a test of it must not pass without it."""
    if index._compiled is None:
        pytest.skip("the compiled index builder is not installed (HAMMER_NO_EXTENSIONS=1?)")
    return index._compiled


@pytest.fixture
def twin():
    """A function that calls the NumPy twin of another one."""

    def call(function, *args, **kwargs):
        return getattr(index_builder_numpy, function.__name__)(*args, **kwargs)

    return call


@pytest.fixture(params=["C++", "NumPy"])
def backend(request, monkeypatch):
    """Run a test once on each backend."""
    if request.param == "NumPy":
        monkeypatch.setattr(index, "_compiled", None)
        for name in ("permute", "epoch_marks", "find_pieces", "locate_windows", "megatron_windows", "copy_windows"):
            monkeypatch.setattr(index, name, getattr(index_builder_numpy, name))
    elif index._compiled is None:
        pytest.skip("the compiled index builder is not installed")
    return request.param
