"""The angles of RoPE and their stretching for long contexts, as ``modeling_rope_utils.py`` of transformers defines it.

A pair of dimensions i of d turns by ``theta^(-2i/d)`` a position (arXiv 2104.09864), or by less where the config asks
for a longer context (``RopeScaling``). Only yarn also scales what was turned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_hammer.config import ModelConfig, RopeScaling


def cos_and_sin(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position below ``length``, [s, 1, 1, d/2] each: computed in fp32, then rounded."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(config, length).to(device))[:, None, None, :]
    scale = 1.0 if config.rope_scaling is None else config.rope_scaling.cos_sin_factor
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rope_frequencies(config: ModelConfig, length: int = 0) -> Tensor:
    """Angle per position of each pair of dimensions: [d/2] fp32.

    Args:
        length: positions of the text, on which they depend above model.max_position_embeddings in the dynamic type.
    """
    scaling, d = config.rope_scaling, config.head_size
    theta = config.rope_theta
    if scaling is not None and scaling.rope_type == "dynamic":
        longest = config.max_position_embeddings or length
        stretch = scaling.factor * max(length, longest) / longest - (scaling.factor - 1)
        theta *= stretch ** (d / (d - 2))
    wavelengths = theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)  # over 2 pi
    if scaling is None or scaling.rope_type == "dynamic":
        return 1.0 / wavelengths
    if scaling.rope_type == "linear":
        return 1.0 / wavelengths / scaling.factor
    return _llama3(1.0 / wavelengths, scaling) if scaling.rope_type == "llama3" else _yarn(wavelengths, scaling, theta)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the frequencies of long wavelengths by ``factor``, leave short ones, and blend between."""
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert context is not None and low is not None and high is not None  # RopeScaling.check
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < context / high, frequencies, stretched)


def _yarn(wavelengths: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Blend by the dimension's number: below ``first`` left alone, above ``last`` divided by ``factor``.

    ``first`` and ``last`` are where a dimension turns ``beta_fast`` and ``beta_slow`` times over the first context. The
    order of operations is that of transformers, so that the frequencies have the same bits: far out in a text an
    angle is large, and its rounding shows.
    """
    context, pairs = scaling.original_max_position_embeddings, len(wavelengths)
    assert context is not None  # RopeScaling.check

    def dimension(turns: float) -> float:
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first if last != first else 0.001
    kept = 1 - ((torch.arange(pairs, dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
