"""TensorBoard: the folder of a run, and a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_hammer.base.errors import from_exception
from megatron_hammer.metrics.reporter import Reporter, board_folder
from tests.model.tiny import tiny_config


def test_tensorboard_calls_a_run_by_its_name(tmp_path: Path) -> None:
    """Also one that older versions began, and one whose folder was renamed since."""
    run, old = tmp_path / "中文 run", tmp_path / "old"
    assert board_folder(run) == run / "tensorboard" / "中文 run" and not run.exists()
    (old / "tensorboard").mkdir(parents=True)
    (old / "tensorboard" / "events.out.tfevents.1.host.2.0").write_bytes(b"x")
    assert board_folder(old) == old / "tensorboard" / "old"
    assert [path.name for path in (old / "tensorboard").iterdir()] == ["old"]
    assert (old / "tensorboard" / "old" / "events.out.tfevents.1.host.2.0").read_bytes() == b"x"
    renamed = old.rename(tmp_path / "new")
    assert board_folder(renamed) == renamed / "tensorboard" / "old"


class FullBoard:
    """A writer of TensorBoard on a full disk: torch's own names no file, and fails again when it is closed."""

    def __init__(self, folder: Path) -> None:
        self.log_dir = str(folder)

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        self.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.close()


def test_a_full_disk_of_tensorboard_names_its_folder(tmp_path: Path) -> None:
    config = tiny_config(train__output=str(tmp_path), log__tensorboard=False)
    line = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 1.0}
    for act in (lambda reporter: reporter.step(line, {}), Reporter.sync):
        reporter = Reporter(config, 0, (1.0, 1.0), None, 1)
        with pytest.raises(OSError) as caught, reporter:
            reporter.board = FullBoard(tmp_path / "tensorboard")
            act(reporter)
        said = str(from_exception(caught.value, "rank 0"))
        assert f"{tmp_path}/tensorboard could not be used" in said and "100 bytes needed" in said and "MB free" in said
        assert reporter.file.file.closed
