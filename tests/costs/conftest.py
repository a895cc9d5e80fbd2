"""Fixtures shared with the tests of another room."""

from tests.train.conftest import data  # noqa: F401
