"""Attention by Tri Dao's flash-attn packages, as backends: 2 (arXiv 2307.08691), 3 (arXiv 2407.08608) and 4.

Three packages with two functions of one meaning each, which take [b, s, heads, d] or, for documents, [b s, heads, d]
with cumulative lengths, share keys between heads by themselves and want only the last dimension contiguous: so no
tensor is copied. Their causal mask has the last query at the last key (since 2.1), as ``PackedSequences`` means it.
Backward is deterministic on request, which follows torch's own switch (``torch.use_deterministic_algorithms``).

::

    backend         package         module                  chips                   heads
    flash-attn      flash-attn      flash_attn              sm_80 and newer         up to 256
    flash-attn-3    flash-attn-3    flash_attn_interface    sm_90                   up to 256
    flash-attn-4    flash-attn-4    flash_attn.cute         sm_90 to sm_110         up to 128 (256 on sm_90)

Names, arguments and limits are those of flash-attention's sources (``flash_attn/flash_attn_interface.py``,
``hopper/flash_attn_interface.py``, and for 4 the wheel 4.0.0b36, which ``tests/kernels/test_libraries.py`` reads).
**None of these has run here yet**, so they are used only where a config names them. A package is imported when its
function is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.kernels.backend import CUDA, HALVES, Backend, Requirements
from megatron_hammer.kernels.packed_sequences import PackedSequences

WHOLE = ("q", "k", "v", "causal", "deterministic")  # arguments of flash_attn_func that are used
PACKED = (  # and of flash_attn_varlen_func
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "deterministic",
)  # fmt: skip


def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None) -> Tensor:
    """Causal, within documents where they are given: as ``AttentionFunction``, by one of the three modules."""
    how = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if documents is None:
        out = module.flash_attn_func(q=q.transpose(0, 1), k=k.transpose(0, 1), v=v.transpose(0, 1), **how)
        return _output(out).transpose(0, 1)
    out = module.flash_attn_varlen_func(
        q=q.squeeze(1),
        k=k.squeeze(1),
        v=v.squeeze(1),
        cu_seqlens_q=documents.cu_seqlens,
        cu_seqlens_k=documents.key_cu_seqlens,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_key_length,
        **how,
    )
    return _output(out).unsqueeze(1)


def _output(result: Any) -> Tensor:
    """4, and 3 until the summer of 2025, return the log of the sum of exponentials beside it."""
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def _load(module: str, device: torch.device) -> Callable[..., Tensor]:
    return partial(attention, importlib.import_module(module))


def _flash_2_unavailable(device: torch.device) -> str:
    # The extension, for a folder flash_attn alone may be that of flash-attn-4.
    if not find_spec("flash_attn_2_cuda"):
        return "the package flash-attn is not installed"
    return _older_than(device, (8, 0))


def _flash_3_unavailable(device: torch.device) -> str:
    if not find_spec("flash_attn_interface"):
        return "the package flash-attn-3 is not installed"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability == (9, 0) else f"it is for sm_90, the GPU is {_sm(capability)}"


def _flash_4_unavailable(device: torch.device) -> str:
    found = find_spec("flash_attn")  # a submodule cannot be looked for without importing what is above it
    folders = (found and found.submodule_search_locations) or []
    if not any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders):
        return "the package flash-attn-4 is not installed"
    if not find_spec("cutlass"):
        return "flash-attn-4 needs the package nvidia-cutlass-dsl, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    return "" if 9 <= capability[0] <= 11 else f"its backward is for sm_90 to sm_110, the GPU is {_sm(capability)}"


def _older_than(device: torch.device, capability: tuple[int, int]) -> str:
    mine = torch.cuda.get_device_capability(device)
    return "" if mine >= capability else f"it needs {_sm(capability)}, the GPU is {_sm(mine)}"


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def unsupported(required: Requirements, largest: int = 256) -> str:
    """Why FlashAttention's kernels cannot do heads of this size, or an empty string; torch's own have the same limits.

    Torch's kernel for variable lengths pads other sizes in forward, and then backward refuses them.
    """
    if required.head_size > largest:
        return f"takes heads of at most {largest} elements, not {required.head_size}"
    return f"takes heads of a multiple of 8 elements, not {required.head_size}" if required.head_size % 8 else ""


def _flash_4_unsupported(required: Requirements) -> str:
    hopper = required.device.type == "cuda" and torch.cuda.get_device_capability(required.device)[0] == 9
    return unsupported(required, 256 if hopper else 128)


BACKENDS = (
    Backend("flash-attn", partial(_load, "flash_attn"), CUDA, HALVES, unsupported, _flash_2_unavailable, True),
    Backend("flash-attn-3", partial(_load, "flash_attn_interface"), CUDA, HALVES, unsupported, _flash_3_unavailable,
            True),
    Backend("flash-attn-4", partial(_load, "flash_attn.cute"), CUDA, HALVES, _flash_4_unsupported, _flash_4_unavailable,
            True),
)  # fmt: skip
