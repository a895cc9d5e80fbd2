"""Check that this installation computes what it must, in about two minutes on a CPU: what to run after installing.

    python tools/selftest.py [--only PART ...] [--report FILE] [CONFIG.yaml [group.field=value ...]]

tokenizer: one is trained on a sample corpus; its ids equal sentencepiece's, decode to the text and survive conversion.
index: the compiled index builder equals its NumPy twin.
training: twenty steps whose losses are known, within what rounding explains; on a GPU, too, where there is one.
resume: two ranks are killed and started again; every step and the final state equal an undisturbed run's, bit for bit.
layout: TP 2 with sequence parallelism computes what one process and transformers compute; on two GPUs, too.
export: text to a Hugging Face model, with the certificate that it is the checkpoint's.

Each part is named as it passes, with its seconds; one that fails is named with its remedy, and the others still run.
Nothing is read from the network, and nothing stays but --report's FILE: versions, hardware, settings and results to be
pasted into a bug report, without paths, secrets and names of hosts and people. CONFIG.yaml, that of your run, is for
the report only: its numbers and choices, without its names and paths.

Exit code 0: all passed; 5: a result is wrong or a part crashed; else that of the first failure (docs/errors.md).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, as_commands, run
from megatron_hammer.base.progress import Activity


def main() -> int:
    from megatron_hammer.base.signals import Stopped, StopRequest
    from megatron_hammer.verify.selftest import chosen, run_parts, selftest_exit_code, selftest_summary
    from megatron_hammer.verify.selftest_parts import PARTS

    parser = ArgumentParser(prog="selftest.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="config of your run, for the report only")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--only", action="append", default=[], choices=[part.name for part in PARTS],
                        help="run this part alone; may be repeated")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what a bug report needs (Markdown)")
    arguments = parser.parse_intermixed_args()
    config = None
    if arguments.report is None and arguments.config is not None:
        parser.error("CONFIG.yaml is for --report FILE")
    if arguments.report is not None:
        from megatron_hammer.config import load_config
        from megatron_hammer.verify.bug_report import check_place, write_bug_report

        check_place(arguments.report)
        config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    results = []
    with StopRequest() as stop, tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        try:
            parts = chosen(arguments.only)
            with Activity(parts[0].name) as activity:
                for number, result in enumerate(run_parts(parts, Path(folder), stop), start=1):
                    results.append(result)
                    print(*map(as_commands, result.lines()), sep="\n", flush=True)
                    activity.begin(parts[min(number, len(parts) - 1)].name)
        except Stopped:
            print("stopped")
            return stop.exit_code
    print(selftest_summary(results), flush=True)
    if arguments.report is not None:
        write_bug_report(arguments.report, results, config)
        print(f"wrote {arguments.report}: read it before you send it")
    return selftest_exit_code(results)


if __name__ == "__main__":
    run(main)
