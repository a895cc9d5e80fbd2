"""The learning rate as a pure function of (config, step): nothing to save, nothing to restore.

Steps count from 1. With peak ``lr``, floor ``min_lr``, warm-up w and horizon D (``decay_steps``)::

    lr   /----------.            cosine: interpolates between lr and min_lr (Megatron-LM's)
        /            `.          cosine-clamped: half a cosine to zero, never below min_lr (HammerLLM's)
       /               `.        linear: straight from lr to min_lr
    0 +----+-------------+---    constant: stays at lr;  wsd: stays at lr, then straight to min_lr over anneal_steps
      1    w             D       after D: the value at D

Step w is the first at the peak. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hammer.config import Config


@dataclass(frozen=True)
class ScheduleLengths:
    """The lengths of a schedule with their defaults filled in, in steps."""

    warmup: int
    horizon: int
    anneal: int


def schedule_lengths(config: Config) -> ScheduleLengths:
    """The lengths that a config's schedule has; what is absent follows from ``train.num_steps``."""
    schedule, num_steps = config.schedule, config.train.num_steps
    horizon = max(schedule.decay_steps or num_steps, config.warmup_steps)
    return ScheduleLengths(config.warmup_steps, horizon, schedule.anneal_steps or max(1, horizon // 10))


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of ``step`` (1 is the first)."""
    peak, floor, lengths = config.optimizer.lr, config.optimizer.min_lr, schedule_lengths(config)
    warmup, horizon = lengths.warmup, lengths.horizon
    if step < warmup:
        return peak * step / warmup
    step = min(step, horizon)
    progress = (step - warmup) / max(1, horizon - warmup)  # 0 at the end of the warm-up, 1 at the horizon
    match config.schedule.style:
        case "constant":
            return peak
        case "linear":
            return peak + (floor - peak) * progress
        case "cosine":
            return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine-clamped":
            return max(floor, peak * 0.5 * (1 + math.cos(math.pi * progress)))
        case "wsd":
            return peak + (floor - peak) * max(0.0, 1 - (horizon - step) / lengths.anneal)
