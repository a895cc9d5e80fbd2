"""Look into checkpoints: which ones a run has, what is in one, and whether every byte is still as it was saved.

    python tools/inspect_checkpoint.py list RUN
    python tools/inspect_checkpoint.py show CHECKPOINT
    python tools/inspect_checkpoint.py verify CHECKPOINT ...

list: all checkpoints of a run with their sizes; those that cannot be read are named with the reason.
show: who wrote it, its model, its state and its tensors, from the manifest alone.
verify: reads everything and compares all hashes; one line for each checkpoint. Exit code 0: all are sound, 4: one is
    damaged or incomplete, which is said on stderr; the others are still read.
Where CHECKPOINT is a run (or its checkpoints folder), its newest one is meant.
"""

from __future__ import annotations

from megatron_hammer.base.cli import ArgumentParser, report, run
from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.streams import only_list


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="inspect_checkpoint.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|verify")
    commands.add_parser("list", help="the checkpoints of a run").add_argument("run", metavar="RUN")
    commands.add_parser("show", help="what one holds").add_argument("checkpoint", metavar="CHECKPOINT")
    verify = commands.add_parser("verify", help="read every byte and compare all hashes")
    verify.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    return parser


def main() -> int:
    arguments = parser().parse_args()
    from megatron_hammer.checkpoint.folder import open_checkpoint
    from megatron_hammer.checkpoint.inspect import describe, list_checkpoints, summarize, verify_checkpoint

    if arguments.command != "verify":
        only_list()
    if arguments.command == "list":
        print(*list_checkpoints(arguments.run), sep="\n")
        return 0
    if arguments.command == "show":
        print(*describe(open_checkpoint(arguments.checkpoint)), sep="\n")
        return 0
    code = 0
    for path in arguments.checkpoints:
        try:
            manifest = open_checkpoint(path)
            verify_checkpoint(manifest)
            print(f"{manifest.folder}: every byte is as it was saved: {summarize(manifest)}", flush=True)
        except CheckpointError as error:
            code = report(error)
    return code


if __name__ == "__main__":
    run(main)
