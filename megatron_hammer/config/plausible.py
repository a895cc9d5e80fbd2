"""Finds values of the right type and range that cannot be meant: impossible paths, figures far beyond any in use."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.paths import output_remedy, unusable_remedy

USUAL = {  # setting -> least and most that are in use anywhere for this AdamW and these models
    "optimizer.lr": (1e-7, 0.1),  # a hundred million parameters take 1e-3, billions 1e-4; tests with toys 1e-2
    "optimizer.weight_decay": (0.0, 1.0),
    "optimizer.beta1": (0.5, 0.999),
    "optimizer.beta2": (0.8, 0.99999),
    "optimizer.eps": (0.0, 1e-3),
    "optimizer.clip_grad": (0.0, 1e4),
    "model.init_std": (1e-4, 0.5),
    "model.rope_theta": (100.0, 1e9),
    "model.norm_eps": (1e-9, 1e-2),
}


def check_paths(output: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse what is no path on this machine, and for the output what belongs to others.

    Args:
        output: train.output.
        inputs: setting -> path, or prefix of files.

    Raises:
        ConfigError: E204.
    """
    if remedy := output_remedy(output):
        raise ConfigError(4, f"train.output={output}", "cannot be the folder of a run", remedy)
    for setting, path in inputs.items():
        if path and not os.path.lexists(f"{path}.idx") and (remedy := unusable_remedy(path)):
            raise ConfigError(4, f"{setting}={path}", "is no path on this machine", remedy)


def far_beyond(values: Mapping[str, float]) -> list[str]:
    """A remark for each value, by its setting, that lies outside of what anybody uses."""
    notes = []
    for setting, value in values.items():
        least, most = USUAL[setting]
        if not least <= value <= most and value != 0:
            side = f"above {most:g}, the most" if value > most else f"below {least:g}, the least"
            notes.append(f"{setting}={value:g} is {side} that is in use: see that no digit or exponent is wrong")
    return notes
