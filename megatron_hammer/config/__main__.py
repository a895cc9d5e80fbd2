"""``python -m megatron_hammer.config CONFIG.yaml [group.field=value ...]``: checks the names and values of settings.

For scripts that prepare much before they train, so that a misspelt setting is refused first. Prints nothing where all
is well.
Needs no torch.
"""

from __future__ import annotations

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.config import add_settings, load_config


def main() -> int:
    """Read the settings as training does."""
    parser = ArgumentParser(prog="python -m megatron_hammer.config", description="Check the settings of a run.")
    add_settings(parser)
    arguments = parser.parse_intermixed_args()
    load_config(arguments.config, arguments.overrides)
    return 0


if __name__ == "__main__":
    run(main)
