"""Rehearse failures with your own config, in minutes on two cores: a fault may cost time, but no bit of the result.

    python tools/drill.py CONFIG.yaml [--nproc N] [--kills K] [--seed S] [group.field=value ...]

The config is shrunk as tools/verify_parallel.py does (widths, layers, vocabulary, length, batch; the layout, saving and
what to do about errors stay as they are) and trained twice on CPUs, on a made-up dataset: once undisturbed, once under
faults. Each fault strikes a running launcher at a random moment, and the same command is then run again: kills of one
rank, of the launcher, of everything, of everything inside a save; a stop signal; a rank that is stopped; a bit flipped
in the newest checkpoint; files that may not grow (as on a full disk). A table says what was done and how the launcher
ended; then every step's record and the state at the end are compared with those of the undisturbed run.

Exit code 0: equal in every bit, and every exit code was right; 5: something differs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity


def main() -> int:
    parser = ArgumentParser(prog="drill.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the run")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (default: the fewest of the layout, two or more)")
    parser.add_argument("--kills", type=int, default=4, metavar="K", help="kills beside the other faults (default: 4)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the moments and of the ranks that are hit (default: 0)",
    )
    parser.add_argument("--keep", metavar="FOLDER", help="leave both runs in this new folder (default: removed)")
    arguments = parser.parse_intermixed_args()
    for name, value, least in (
        ("kills", arguments.kills, 0),
        ("nproc", 1 if arguments.nproc is None else arguments.nproc, 1),
    ):
        if value < least:
            raise ConfigError(40, f"--{name}={value}", f"must be at least {least}", f"raise --{name}")
    from megatron_hammer.config import load_config
    from megatron_hammer.train.prepare import prepare
    from megatron_hammer.verify.drill import drill_summary, run_drill, smallest_world

    asked = load_config(arguments.config, [*arguments.overrides, "train.dry_run=true"])
    ranks = arguments.nproc or smallest_world(asked)
    config = prepare(asked, ranks).config  # checked, with the tokenizer's vocabulary
    with tempfile.TemporaryDirectory(prefix="drill-") as temporary:
        folder = Path(arguments.keep or temporary)
        folder.mkdir(parents=True, exist_ok=not arguments.keep)
        with Activity("the drill") as note:
            report = run_drill(config, ranks, arguments.kills, arguments.seed, folder, note)
    print(*report.table(), *drill_summary(report), sep="\n")
    if report.left_out:
        print(f"not part of the drill: {', '.join(report.left_out)}")
    return 5 if report.failed else 0


if __name__ == "__main__":
    run(main)
