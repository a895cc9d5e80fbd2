"""Write one page of HTML about a run, or two runs side by side: its plan, its curves, incidents and results.

    python tools/report.py runs/mine
    python tools/report.py runs/mine runs/other --output compared.html --language zh
    python tools/report.py runs/mine --refresh 30

On the page: curves of the loss, of each source and validation set, of speed and memory, to zoom, smooth and compare;
the data plan and its phases; evaluations; incidents and rewinds; what each checkpoint made of fixed prompts
(train.evaluator.prompts, or --prompt); settings and environment. It needs no network and no server, works while the run
is going, and is as small for a million steps as for a thousand; extreme values are kept. What cannot be read is listed
on the page.

--refresh rewrites the page as long as a run is going, and an open page reloads itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity, size_of

if TYPE_CHECKING:
    from megatron_hammer.report.gather import RunFacts


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="report.py", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a run, with its metrics.jsonl")
    add("other", metavar="RUN2", type=Path, nargs="?", help="another run, to compare it with")
    add("--output", metavar="FILE.html", type=Path, help="the page (default: RUN/report.html)")
    add("--pictures", metavar="DIR", type=Path, help="save the charts as PNGs, too, in this folder")
    parser.add_language("the page, and of the pictures")
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="have each checkpoint continue this prompt first; may be repeated")  # fmt: skip
    add("--new-tokens", type=int, default=48, metavar="N", help="longest continuation, in tokens (default: 48)")
    add("--refresh", metavar="SECONDS", type=float, help="rewrite the page at this interval, as long as a run is going")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    from megatron_hammer.report.gather import open_metrics
    from megatron_hammer.report.write import LEAST_REFRESH_SECONDS, check_page, continue_prompts, write_page

    if arguments.refresh is not None and not arguments.refresh >= LEAST_REFRESH_SECONDS:
        rule = f"must be at least {LEAST_REFRESH_SECONDS:g} second"
        raise ConfigError(1, f"--refresh {arguments.refresh:g}", rule, "write --refresh 30")
    folders = [arguments.run, *([arguments.other] if arguments.other is not None else [])]
    output = arguments.output or arguments.run / "report.html"

    def say_written(runs: Sequence[RunFacts]) -> None:
        steps = ", ".join(f"{one.name} to step {one.metrics.last_step:,}" for one in runs)
        lost = sum(len(one.notes) + one.metrics.damaged + one.metrics.out_of_order for one in runs)
        noted = "; not all could be read, the page says what" if lost else ""
        print(f"{output}: {steps}, {size_of(output.stat().st_size)}{noted}", flush=True)

    check_page(output)
    for folder in folders:
        open_metrics(folder)  # a name that is no run's is said before anything is computed
        if arguments.prompt:
            continue_prompts(folder, arguments.prompt, arguments.new_tokens)
    if arguments.refresh is None:
        with Activity("writing the page"):
            write_page(folders, output, arguments.language, arguments.pictures, None, say_written)
    else:  # which waits in between
        write_page(folders, output, arguments.language, arguments.pictures, arguments.refresh, say_written)


if __name__ == "__main__":
    run(main)
