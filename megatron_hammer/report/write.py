"""Writes the report of one run or two to the disk, once, or again and again while a run is going. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.files import replace_file
from megatron_hammer.base.language import Language
from megatron_hammer.base.progress import Progress, track
from megatron_hammer.base.reading import open_regular
from megatron_hammer.checkpoint.folder import find_checkpoints, step_of
from megatron_hammer.metrics.generations import GENERATIONS, read_generations, write_generations
from megatron_hammer.report.charts import charts_of, draw
from megatron_hammer.report.curves import MetricsReader
from megatron_hammer.report.gather import RunFacts, gather_runs, open_metrics
from megatron_hammer.report.page import names_of, run_page

LEAST_REFRESH_SECONDS = 1.0


def check_page(output: Path) -> None:
    """Refuse a name that no page can have here.

    Raises:
        ConfigError: E288.
    """
    if output.is_dir():
        raise ConfigError(88, f"output {output}", "is a folder", f"name a file in it: {output / 'report.html'}")
    if output.suffix.lower() not in (".html", ".htm"):
        remedy = f"write {output.with_suffix('.html') if output.suffix else f'{output}.html'}"
        raise ConfigError(88, f"output {output}", "gets a page of HTML, and its name does not end in .html", remedy)


def read_runs(folders: Sequence[Path], readers: Sequence[MetricsReader]) -> list[RunFacts]:
    """Everything that the folders have, with a bar for long metrics; ``readers`` go on where they have stopped."""
    sizes = [max(0, os.path.getsize(reader.path) - reader.bytes_read) for reader in readers]
    with Progress("reading metrics.jsonl", sum(sizes)) as progress:
        return [gather_runs(folder, reader, progress.advance) for folder, reader in zip(folders, readers, strict=True)]


def continue_prompts(folder: Path, prompts: Sequence[str], new_tokens: int) -> None:
    """Have every checkpoint of a run continue the prompts that it has not continued yet, into generations.jsonl.

    Raises:
        HammerError: a checkpoint cannot be loaded, or has no tokenizer.
    """
    done, path = set[tuple[int, str]](), folder / GENERATIONS
    if path.is_file():
        with open_regular(path, follow=False) as file:
            done = {(one.step, one.prompt) for one in read_generations(file)}
    left = [
        (checkpoint, [prompt for prompt in dict.fromkeys(prompts) if (step_of(checkpoint), prompt) not in done])
        for checkpoint in find_checkpoints(folder)
    ]
    left = [(checkpoint, missing) for checkpoint, missing in left if missing]
    for checkpoint, missing in track(left, "checkpoints continue prompts", len(left), "checkpoints"):
        write_generations(checkpoint, step_of(checkpoint), missing, folder, new_tokens, "auto")


def write_page(
    folders: Sequence[Path],
    output: Path,
    language: Language = "en",
    pictures: Path | None = None,
    refresh: float | None = None,
    written: Callable[[Sequence[RunFacts]], None] = lambda runs: None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[RunFacts]:
    """Write the page, and the pictures where a folder is named for them; returns what was read of the runs.

    Args:
        folders: of one run or two.
        refresh: seconds between two versions of the page, as long as one of the runs lives; None: one version.
        written: called after each version of the page, when it is on the disk.

    Raises:
        DataError: E380, E381: a run has no metrics.
    """
    readers = [open_metrics(folder) for folder in folders]
    check_page(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if pictures is not None:
        from megatron_hammer.base.pictures import picture_sayer

        pictures.mkdir(parents=True, exist_ok=True)
        chosen = picture_sayer(language)
    while True:
        runs = read_runs(folders, readers)
        goes_on = refresh is not None and any(run.is_alive is not False and not run.is_complete for run in runs)
        replace_file(output, run_page(runs, language, refresh if goes_on else None))
        if pictures is not None:
            names = names_of(runs)
            source = chosen("Source: metrics of ", "来源：指标，") + chosen(", ", "；").join(
                chosen(f"{name} to step {run.metrics.last_step:,}", f"{name} 到第 {run.metrics.last_step:,} 步")
                for name, run in zip(names, runs, strict=True)
            )
            draw(charts_of(runs, names, chosen), pictures, source, chosen)
        written(runs)
        if not goes_on or refresh is None:
            return runs
        sleep(max(refresh, LEAST_REFRESH_SECONDS))
