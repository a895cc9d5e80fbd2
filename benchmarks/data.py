"""The data engine beside its peer, on the same machine, in the same run, in turns.

    python benchmarks/data.py preprocess|encode|index|blend|read|write|merge|shuffle [options] [--json]

Every part lives in ``data_<part>.py``: what it does, what its peer is, and what its options mean stands there and in
``data.py PART --help``. Medians over the rounds are printed, or, with --json, one document with all rounds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from megatron_hammer.base.system import processor_name

sys.path.insert(0, str(Path(__file__).parent))  # the parts, when this is run as a program from anywhere

PARTS = ("preprocess", "encode", "index", "blend", "read", "write", "merge", "shuffle")
LIBRARIES = ("megatron_hammer", "numpy", "megatron-core", "sentencepiece", "orjson", "torch")


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(value: Any, indent: str = "") -> None:
    for name, entry in value.items():
        if isinstance(entry, dict):
            print(f"{indent}{name}")
            _show(entry, indent + "  ")
        elif not isinstance(entry, list):
            print(f"{indent}{name:30} {entry:,.4g}" if isinstance(entry, float) else f"{indent}{name:30} {entry}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="part", required=True, metavar="PART")
    modules = {}
    for part in PARTS:
        if importlib.util.find_spec(f"data_{part}") is None:
            continue
        modules[part] = importlib.import_module(f"data_{part}")
        description = modules[part].__doc__ or part
        command = commands.add_parser(
            part,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        modules[part].add_arguments(command)
        command.add_argument("--json", action="store_true", help="one JSON document with all rounds")
    args = parser.parse_args()
    before = machine()
    result = {"part": args.part, "machine": before, **modules[args.part].measure(args)}
    if args.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
