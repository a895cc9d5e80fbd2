"""``python -m megatron_hammer`` is not a program and ends with an error that names those. Needs no torch."""

from megatron_hammer.base.cli import run
from megatron_hammer.base.errors import ConfigError


def main() -> int:
    """Refuse, with what was probably meant."""
    raise ConfigError(
        1,
        "python -m megatron_hammer",
        "names the package, which is no program",
        "train with python -m megatron_hammer.launch --nproc N CONFIG.yaml; all programs: docs/programs.md",
    )


if __name__ == "__main__":
    run(main)
