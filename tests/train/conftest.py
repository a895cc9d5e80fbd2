"""The dataset that all runs of these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, documents) in enumerate({"a": 60, "b": 40, "x": 8, "y": 5}.items()):
        write_dataset(folder / name, documents, seed)
    return folder
