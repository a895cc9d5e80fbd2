"""The file in which a run writes down what was wrong with a step, for people: ``OUT/incidents/step-N.json``.

What stands in it, ``incidents.py`` and ``corruption.py`` find; every rank can say where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hammer.base.files import dump_names, replace_file
from megatron_hammer.config import Config
from megatron_hammer.parallel.agreement import gather_values
from megatron_hammer.parallel.context import ParallelContext


def incident_path(config: Config, step: int, rewinds: int) -> Path:
    """Where a step is written down; a run that has gone back may come to the same step with other samples."""
    again = f"-after-{rewinds}-rewinds" if rewinds else ""
    return Path(config.train.output) / "incidents" / f"step-{step:08d}{again}.json"


def write_down(path: Path, tree: dict[str, Any], ctx: ParallelContext) -> str:
    """Rank 0 writes what happened, and makes the folder. Communicates over the world.

    It never fails: what is done about that which happened does not depend on it.

    Returns:
        where it is, for people, or that it could not be written there and why: on all ranks the same.
    """
    failed = None
    if ctx.world.rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, dump_names(tree))
        except OSError as error:
            failed = error.strerror or str(error)
    why = gather_values(ctx, failed)[0]
    return str(path) if why is None else f"{path}, which could not be written ({why})"
