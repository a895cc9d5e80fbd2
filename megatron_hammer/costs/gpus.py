"""What GPUs can do, by published figures: for MFU, for forecasts and for the planner. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_hammer.base.characters import in_ascii
from megatron_hammer.base.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of one device."""

    peak_tflops: float | None
    """Dense peak in bf16 with fp32 accumulation, TFLOP/s. Data sheets mostly print twice as much, with structured
    sparsity. None: no published figure."""
    fp32_tflops: float | None
    """Peak in fp32, TFLOP/s, without tensor cores: torch rounds no factor to TF32 unless it is told to."""
    memory_gib: float
    """What data sheets call GB, which devices report within a percent in GiB; less where ECC takes its part of it."""
    bandwidth: float
    """Of its memory, TB/s."""
    link: float
    """To the other devices of a node, GB/s in one direction: NVLink (half of the figure for both directions), or PCIe
    of 16 lanes where a node has no switch between all of them."""
    fp8: bool = False
    """Whether 8-bit products run at twice the peak."""

    def peak(self, precision: str) -> float | None:
        """TFLOP/s of products in ``train.precision``."""
        return self.fp32_tflops if precision == "fp32" else self.peak_tflops

    def with_peak(self, precision: str, tflops: float) -> Gpu:
        """The same with another rate in a precision."""
        return replace(self, fp32_tflops=tflops) if precision == "fp32" else replace(self, peak_tflops=tflops)


# Words of the device's name, and its figures. The first row whose words are all in a name counts.
GPUS: dict[str, Gpu] = {
    "B300": Gpu(2250.0, 75.0, 262, 8.0, 900, True),  # HGX B300 data sheet: 36 PFLOP/s with sparsity, 2.1 TB for 8
    "B200": Gpu(2250.0, 75.0, 180, 8.0, 900, True),  # HGX and DGX B200 data sheets: 36 PFLOP/s, 1,440 GB for 8
    "GH200": Gpu(989.0, 67.0, 96, 4.0, 450, True),  # NVIDIA GH200 data sheet, HBM3
    "H200 NVL": Gpu(835.5, 60.0, 141, 4.8, 450, True),  # NVIDIA H200 data sheet, NVL column (bridge of four)
    "H200": Gpu(989.0, 67.0, 141, 4.8, 450, True),  # NVIDIA H200 data sheet, SXM column
    "H100 NVL": Gpu(835.5, 60.0, 94, 3.9, 64, True),  # NVIDIA H100 data sheet, NVL column; bridges join pairs only
    "H100 PCIe": Gpu(756.0, 51.2, 80, 2.0, 64, True),  # NVIDIA H100 architecture white paper, table 3; the same
    "H100": Gpu(989.0, 67.0, 80, 3.35, 450, True),  # the same, SXM5
    "H800 PCIe": Gpu(756.0, 51.2, 80, 2.0, 64, True),  # as the H100 PCIe: what differs is NVLink and fp64
    "H800": Gpu(989.0, 67.0, 80, 3.35, 200, True),  # as the H100, NVLink of 400 GB/s in both directions
    "H20": Gpu(148.0, 44.0, 96, 4.0, 450, True),  # NVIDIA H20 data sheet
    "A100": Gpu(312.0, 19.5, 80, 2.0, 300),  # NVIDIA A100 data sheet, 80 GB SXM; --memory 40 for the other
    "A800": Gpu(312.0, 19.5, 80, 2.0, 200),  # as the A100: what differs is NVLink
    "L40S": Gpu(362.05, 91.6, 45, 0.864, 32, True),  # NVIDIA L40S data sheet; of 48 GB 46,068 MiB are there with ECC
    "L20": Gpu(119.5, 59.8, 45, 0.864, 32, True),  # NVIDIA L20 data sheet; the same
    "4090 D": Gpu(None, None, 24, 1.008, 32, True),  # another chip under nearly the same name, no published figure
    "4090": Gpu(165.2, 82.6, 24, 1.008, 32, True),  # NVIDIA Ada architecture white paper, fp32 accumulation; PCIe 4
    "5090 D": Gpu(None, None, 32, 1.792, 64, True),
    "5090": Gpu(209.5, 104.8, 32, 1.792, 64, True),  # NVIDIA RTX Blackwell white paper, fp32 accumulation; PCIe 5
    "MI300X": Gpu(1307.4, 163.4, 192, 5.3, 448, True),  # AMD Instinct MI300X data sheet; seven links of 64 GB/s
}


def find_gpu(device_name: str) -> Gpu | None:
    """The row of a device that calls itself so; None for one that is not known."""
    words = set(re.split(r"[\s-]+", device_name))
    return next((gpu for name, gpu in GPUS.items() if words.issuperset(name.split())), None)


def named_gpu(name: str) -> tuple[str, Gpu]:
    """The row that a user means by ``h100``, ``H100-PCIe`` or ``rtx4090``, and its name.

    Raises:
        ConfigError: E238, with the names that are known.
    """

    def plain(text: str) -> str:
        return re.sub(r"nvidia|amd|instinct|geforce|rtx|sxm\d?|[^a-z0-9]", "", in_ascii(text).lower())

    for known, gpu in GPUS.items():
        if plain(known) == plain(name):
            return known, gpu
    names = ", ".join(known.lower().replace(" ", "-") for known in GPUS)
    raise ConfigError(38, f"--gpu {name}", "is not in the table of GPUs", f"use one of {names}")
