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

from megatron_hammer.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of ``step`` (1 is the first)."""
    optimizer, schedule, num_steps = config.optimizer, config.schedule, config.train.num_steps
    peak, floor = optimizer.lr, optimizer.min_lr
    warmup = min(schedule.warmup_steps, num_steps)
    if step < warmup:
        return peak * step / warmup
    horizon = max(schedule.decay_steps or num_steps, warmup)
    step = min(step, horizon)
    progress = (step - warmup) / max(1, horizon - warmup)  # 0 at the end of the warm-up, 1 at the horizon
    match schedule.style:
        case "constant":
            return peak
        case "linear":
            return peak + (floor - peak) * progress
        case "cosine":
            return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine-clamped":
            return max(floor, peak * 0.5 * (1 + math.cos(math.pi * progress)))
        case "wsd":
            anneal = schedule.anneal_steps or max(1, horizon // 10)
            return peak + (floor - peak) * max(0.0, 1 - (horizon - step) / anneal)
