"""Fixtures shared with the tests of another room."""

from tests.checkpoint.conftest import tokenizer_model  # noqa: F401
