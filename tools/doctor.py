"""Check, before a run starts, for what would stop or harm it: machine, environment, data, checkpoints, two dry steps.

    python tools/doctor.py [CONFIG.yaml] [--nproc N] [--json] [group.field=value ...]

One row a check: ok, warning, failed or not applicable, with what was found and what to do.

machine: ports, limits, shared memory, clock, GPU, driver and NCCL; space and inodes against the planned checkpoints.
environment: compiled parts; the libraries' versions against those that the newest checkpoint was made with.
data: config, tokenizer and datasets together; each dataset read from end to end, with all its hashes.
checkpoints: each read and verified; which one a start would go on from, and why.
steps: two steps of the config, made small, on one process.
Without CONFIG.yaml only machine and environment are looked at. Nothing of a run is changed.

Exit code 0: nothing failed; else that of the first failure, as the run itself would end with it (docs/errors.md).
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, as_commands, print_json, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity


def main() -> int:
    parser = ArgumentParser(prog="doctor.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the config of the run")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks of the run (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    arguments = parser.parse_intermixed_args()
    if arguments.nproc < 1:
        raise ConfigError(40, f"--nproc={arguments.nproc}", "must be at least 1", "raise --nproc")
    from megatron_hammer.config import load_config
    from megatron_hammer.verify.doctor import checks_to_tree, doctor_exit_code, examine, format_findings

    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    with Activity("looking at the machine") as note:
        findings = list(examine(config, arguments.nproc, note))
    if arguments.json:
        print_json(checks_to_tree(findings))
    else:
        print(*map(as_commands, format_findings(findings)), sep="\n")
    return doctor_exit_code(findings)


if __name__ == "__main__":
    run(main)
