"""FLOPs of a token, and peaks of devices by their names."""

from __future__ import annotations

import pytest

from megatron_hammer.config import ModelConfig
from megatron_hammer.costs.flops import flops_per_token, peak_tflops
from megatron_hammer.model.parameters import count_parameters
from tests.model.tiny import tiny_config

HAMMERLLM = ModelConfig(2048, 5632, 22, 32, 4, vocab_size=105_789)


def test_flops_of_hammerllm() -> None:
    """6 x 1,185,540,096 matrix weights, plus 12 (6) L H s: 8.2205 (7.6669) GFLOP a token."""
    full, causal = flops_per_token(HAMMERLLM, 2048)
    assert full == 6 * 1_185_540_096 + 12 * 22 * 2048 * 2048
    assert causal == 6 * 1_185_540_096 + 6 * 22 * 2048 * 2048
    assert count_parameters(HAMMERLLM) == 1_402_288_128
    tied = ModelConfig(2048, 5632, 22, 32, 4, vocab_size=105_789, tie_word_embeddings=True)
    assert flops_per_token(tied, 2048) == (full, causal), "a tied table is still multiplied with"


def test_peaks() -> None:
    bf16 = tiny_config(train__precision="bf16")
    assert peak_tflops(bf16, "NVIDIA H100 80GB HBM3") == 989 and peak_tflops(bf16, "NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops(bf16, "NVIDIA H100 PCIe") == 756 and peak_tflops(bf16, "cpu") is None
    assert peak_tflops(tiny_config(), "NVIDIA H200") == 67, "without TF32"
    assert peak_tflops(tiny_config(log__peak_tflops=1.5), "cpu") == 1.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200 NVL", 835.5), ("NVIDIA H200", 989), ("NVIDIA H800", 989),
        ("NVIDIA H20", 148), ("NVIDIA L20", 119.5), ("NVIDIA L40S", 362.05), ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA B200", 2250), ("NVIDIA B300 SXM6 AC", 2250), ("AMD Instinct MI300X", 1307.4), ("NVIDIA L4", None),
        ("NVIDIA GH200 480GB", 989), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_by_whole_words_of_the_name(name: str, peak: float | None) -> None:
    """H20 is no H200, and an H100 NVL no H100 SXM."""
    assert peak_tflops(tiny_config(train__precision="bf16"), name) == peak
