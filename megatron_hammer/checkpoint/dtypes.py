"""The types in which tensors are stored: their names in manifests and configs, and torch's types.

``tensor_files.py``, which does without torch, has their sizes and their names in safetensors files.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISION_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""``train.precision`` -> the type in which the model computes."""


def common_dtype(names: Iterable[str]) -> str:
    """The type of weights that are stored in these: the only one, or fp32, which holds any mixture exactly."""
    different = set(names)
    return different.pop() if len(different) == 1 else "float32"
