"""Reports the predicted memory and speed of rank 0 beside the measured ones, once, after some steps.

Predicted are ``rank_peak.py`` and, on GPUs that the table has, ``rank_speed.py``. Measured are the most that torch's
allocator has given out (what the process ever had resident on a CPU, libraries included), and the mean speed of the
steps after the first ones, which compile and fill caches. Nothing is asked of the device: the allocator counts on the
host, and the times are those that the loop has taken. A prediction that fails is one line, and no run's failure.
"""

from __future__ import annotations

import torch

from megatron_hammer.base import system
from megatron_hammer.config import Config
from megatron_hammer.costs.flops import peak_tflops
from megatron_hammer.costs.gpus import find_gpu
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_peak import rank_peak
from megatron_hammer.costs.rank_speed import Cluster, step_time
from megatron_hammer.kernels.selection import kernel_requirements, select_backends

WARM_UP_STEPS = 3
MIB = 2**20
MEASURED_STEPS = 7  # after these: a line at step 10 of a process


def device_name(device: torch.device) -> str:
    """The name that the device gives itself, by which tables know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class Prediction:
    """What is predicted for rank 0 of a run, until it is held against what was measured."""

    @classmethod
    def of(cls, config: Config, world_size: int, device: torch.device) -> tuple[Prediction | None, str]:
        """The prediction for a run, or None where a formula fails, and the line for its start, which says why."""
        try:
            made = cls(config, world_size, device, device_name(device))
            return made, made.predicted
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return None, f"nothing is predicted for this run ({reason})"

    def __init__(self, config: Config, world_size: int, device: torch.device, device_name: str) -> None:
        config = config.largest
        backends = select_backends(config.kernels, kernel_requirements(config, device))
        self.device = device
        self.parts = rank_peak(config, world_size, 0, backends, device.type)
        """Bytes of rank 0, by part."""
        gpu, peak = find_gpu(device_name), peak_tflops(config, device_name)
        self.speed: float | None = None
        """Tokens a second of all ranks; None where no rate is known."""
        if gpu is not None and peak is not None:
            here = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
            cluster = Cluster(device_name, gpu.with_peak(config.train.precision, peak), here)
            self.speed = step_time(config, world_size, cluster).tokens_per_second
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0

    @property
    def predicted(self) -> str:
        """The first half, before a step is taken."""
        total = sum(self.parts.values())
        unit, name, digits = (GIB, "GiB", 2) if total >= GIB else (MIB, "MiB", 1)
        shown = ", ".join(f"{part} {size / unit:.{digits}f}" for part, size in self.parts.items() if size)
        speed = "no rate is known for this device" if self.speed is None else f"{self.speed:,.0f} tokens/s"
        return f"predicted: {total / unit:.{digits}f} {name} on rank 0 ({shown}); {speed}"

    def step(self, tokens: int, seconds: float) -> str | None:
        """Account for a step; the line when there have been enough of them, and once."""
        self._steps += 1
        if self._steps > WARM_UP_STEPS:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if self._steps != WARM_UP_STEPS + MEASURED_STEPS:
            return None
        predicted, measured = sum(self.parts.values()) / GIB, peak_of_process(self.device) / GIB
        rate = self._tokens / self._seconds
        beside = "" if self.speed is None else f", predicted {self.speed:,.0f} ({rate / self.speed - 1:+.0%})"
        what = f"allocated, predicted {predicted:.2f} ({measured / predicted - 1:+.0%})"
        if self.device.type != "cuda":  # Python and torch, some 0.3 GiB, are no share of what is predicted
            what = f"resident, of which {predicted:.2f} are predicted and the libraries take the most of the rest"
        return f"after {self._steps} steps: at most {measured:.2f} GiB of rank 0 {what}; {rate:,.0f} tokens/s{beside}"


def peak_of_process(device: torch.device) -> int:
    """The most memory that this process has had: given out by torch's allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return system.peak_resident_bytes()
