"""Look into checkpoints: which ones a run has, what is in one, and whether every byte is still as it was saved.

    python tools/inspect_checkpoint.py list RUN
    python tools/inspect_checkpoint.py show CHECKPOINT
    python tools/inspect_checkpoint.py verify CHECKPOINT ... [--expect DIGEST]
    python tools/inspect_checkpoint.py diff CHECKPOINT CHECKPOINT
    python tools/inspect_checkpoint.py digest CHECKPOINT [--sha256]

list: all checkpoints of a run with their sizes; those that cannot be read are named with the reason.
show: who wrote it, its model, its state and its tensors, from the manifest alone.
verify: reads everything and compares all hashes; one line for each checkpoint. Exit code 0: all are sound, 4: one is
    damaged or incomplete, which is said on stderr; the others are still read.
diff: how two differ: step, state, settings, tensors by name. How many ranks wrote them makes no difference. Exit code
    0: they are equal, 5: they differ in what is printed.
digest: a digest of weights, optimizer, step and position in the data, the same for every layout, computed from the
    files. A run compares it after each load. It guards against accidents; against forgery, keep the SHA-256 in
    another place. verify --expect takes either.
Where CHECKPOINT is a run (or its checkpoints folder), its newest one is meant.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, report_error, run
from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.base.streams import only_list


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="inspect_checkpoint.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|verify|diff|digest")
    commands.add_parser("list", help="the checkpoints of a run").add_argument("run", metavar="RUN")
    show = commands.add_parser("show", help="what a checkpoint holds")
    show.add_argument("checkpoint", metavar="CHECKPOINT")
    show.add_argument("--step", type=int, metavar="N", help="a run's checkpoint of step N, not its newest")
    verify = commands.add_parser("verify", help="read every byte and compare all hashes")
    verify.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    verify.add_argument("--expect", metavar="DIGEST", help="what digest printed: 32 hex digits, or a SHA-256")
    diff = commands.add_parser("diff", help="how two differ")
    diff.add_argument("pair", nargs=2, metavar="CHECKPOINT")
    digest = commands.add_parser("digest", help="a digest of the whole state, the same for every layout")
    digest.add_argument("checkpoint", metavar="CHECKPOINT")
    digest.add_argument("--sha256", action="store_true", help="print the SHA-256 too, which cannot be forged; slower")
    return parser


def main() -> int:
    arguments = parser().parse_args()
    from megatron_hammer.checkpoint import inspect
    from megatron_hammer.checkpoint.folder import open_checkpoint

    if arguments.command not in ("verify", "digest"):
        only_list()
    if arguments.command == "list":
        print(*inspect.list_checkpoints(arguments.run), sep="\n")
        return 0
    if arguments.command == "show":
        print(*inspect.describe_checkpoint(open_checkpoint(arguments.checkpoint, arguments.step)), sep="\n")
        return 0
    if arguments.command == "digest":
        for line in inspect.digest_lines(open_checkpoint(arguments.checkpoint), arguments.sha256):
            print(line, flush=True)
        return 0
    if arguments.command == "diff":
        lines = inspect.checkpoint_differences(*map(open_checkpoint, arguments.pair))
        print(*lines or ["no difference"], sep="\n")
        return RefusedError.exit_code if lines else 0
    code = 0
    for path in arguments.checkpoints:
        try:
            manifest = open_checkpoint(path)
            found = inspect.verify_checkpoint(manifest)
            if arguments.expect is not None:
                inspect.expect_digest(manifest, found, arguments.expect)
            print(f"{manifest.folder}: every byte is as it was saved: {inspect.summarize(manifest)}", flush=True)
        except CheckpointError as error:
            code = report_error(error)
    return code


if __name__ == "__main__":
    run(main)
