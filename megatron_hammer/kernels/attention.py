"""Causal attention over whole samples or within documents: the backends, what each can do, and which one runs.

::

    data.attention_mask=causal      [s, b, heads, d]     each sample attends to its past, across the documents in it
    data.attention_mask=document    [b s, 1, heads, d]   the samples of a micro-batch one after the other; each token
                                                         attends to the past of its own document

    cu_seqlens   0         5     8               16      documents are the rows [0, 5), [5, 8) and [8, 16)
    positions    0 1 2 3 4 0 1 2 0 1 2 3 4 5 6 7         restart with each document, for RoPE

Cumulative lengths are those of flash-attn: what every kernel for variable lengths takes. The end of a sample is the end
of a document, so the length of the longest is at most s. ``BACKENDS`` is the whole table; a new backend is a function
and a row in it. ``select_attention`` takes the first row that can do what the config asks for. One that cannot is
passed over, and an error where the user named it: a mask is never ignored in silence.

Legend: s sequence, b micro-batch, n query heads, g query groups, d head_dim (local ones).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.errors import ConfigError
from megatron_hammer.kernels import te

# On a CPU, torch's 16-bit attention costs about as much for 30 rows as for 100, and below this many elements of a head
# (rows x d) up to twice as much as in fp32 with both conversions, above it less: measured on a Xeon with AMX, torch
# 2.13, 64 to 512 rows, d 32 to 128, forward and backward, one and two threads.
FP32_ELEMENTS_ON_CPU = 384 * 32


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed micro-batch lie. Made on the host: nothing ever waits for the device."""

    lengths: tuple[int, ...]
    """Rows of each document, none of them 0; on the host, their sum is b s."""
    cu_seqlens: Tensor
    """[documents + 1] int32 on the device: document i is the rows [cu_seqlens[i], cu_seqlens[i + 1])."""
    positions: Tensor
    """[b s] int64 on the device: place of each row in its document."""

    @property
    def max_length(self) -> int:
        """Rows of the longest document."""
        return max(self.lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: np.ndarray, device: torch.device) -> Documents:
        """From int32 [documents + 1] on the host; the copies to a GPU are asynchronous."""
        lengths = np.diff(cu_seqlens)
        assert cu_seqlens[0] == 0 and (lengths > 0).all(), f"cumulative lengths {cu_seqlens} must rise from 0"
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        arrays = (torch.from_numpy(a) for a in (cu_seqlens.astype(np.int32), positions.astype(np.int64)))
        on_device = [a.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else a for a in arrays]
        return cls(tuple(lengths.tolist()), *on_device)


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over earlier positions: q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d].

    On a CPU, short 16-bit inputs are computed in fp32: see ``FP32_ELEMENTS_ON_CPU``.
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype.itemsize == 2 and len(q) * q.shape[-1] < FP32_ELEMENTS_ON_CPU:
        return causal_attention(q.float(), k.float(), v.float()).to(dtype)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d], no copy
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3)


def whole_samples(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Backend "sdpa": one call for all; each sample is one stretch of text."""
    assert documents is None, "this backend knows no documents: it was chosen for data.attention_mask=causal"
    return causal_attention(q, k, v)


def each_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Backend "sdpa-documents": one call a document, so that no mask is stored and no masked product is computed.

    It is the reference of the other backends for documents.
    """
    assert documents is not None, "this backend masks documents and must be told where they are"
    lengths = list(documents.lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)  # [rows, 1, heads, d]
    return torch.cat([causal_attention(q_i, k_i, v_i) for q_i, k_i, v_i in parts])


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Backend "varlen": torch's own FlashAttention (arXiv 2307.08691) for variable lengths, one launch for all."""
    from torch.nn.attention.varlen import varlen_attn

    assert documents is not None, "this backend masks documents and must be told where they are"
    q, k, v = (x.squeeze(1) for x in (q, k, v))  # [b s, heads, d], no copy
    bounds, longest = documents.cu_seqlens, documents.max_length
    causal = (-1, 0)  # a window of everything before and nothing after
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=causal, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out.unsqueeze(1)


@cache
def _varlen_is_missing(device: torch.device) -> str:
    """Why torch's variable-length attention cannot run on this device, or an empty string."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return f"the varlen_attn of torch {torch.__version__} has another signature"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than FlashAttention's sm_80"
    return ""


def _nothing_is_missing(device: torch.device) -> str:
    return ""


@dataclass(frozen=True)
class AttentionDemand:
    """What a run asks of its attention."""

    mask: str = "causal"
    """``data.attention_mask``."""
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    heads: int = 1
    """n of one rank."""
    groups: int = 1
    """g of one rank."""
    head_size: int = 64
    """d."""


@dataclass(frozen=True)
class AttentionBackend:
    """A row of the table: what a backend declares that it can do."""

    name: str
    """Value of ``kernels.attention``."""
    function: AttentionFunction
    masks: frozenset[str]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    grouped_queries: bool
    """Fewer groups than heads."""
    max_head_size: int | None = None
    missing: Callable[[torch.device], str] = _nothing_is_missing
    """Why this machine cannot run it, or an empty string; asked only on a device that it declares."""

    def obstacle(self, demand: AttentionDemand) -> str:
        """Why this backend cannot do what is asked for, or an empty string."""
        if demand.mask not in self.masks:
            return f"cannot do data.attention_mask={demand.mask}"
        if demand.device.type not in self.devices:
            return f"does not run on {demand.device.type}"
        if demand.dtype not in self.dtypes:
            return f"does not compute in {str(demand.dtype).removeprefix('torch.')}"
        if demand.heads != demand.groups and not self.grouped_queries:
            return f"needs as many query groups ({demand.groups}) as heads ({demand.heads})"
        if self.max_head_size is not None and demand.head_size > self.max_head_size:
            return f"takes heads of at most {self.max_head_size} elements, not {demand.head_size}"
        missing = self.missing(demand.device)
        return f"cannot run here ({missing})" if missing else ""


_HALVES = frozenset({torch.bfloat16, torch.float16})
_FLOATS = _HALVES | {torch.float32, torch.float64}
_ANYWHERE, _CAUSAL, _DOCUMENT = frozenset({"cpu", "cuda"}), frozenset({"causal"}), frozenset({"document"})

BACKENDS = (  # the first that can do it is chosen; name, function, masks, devices, dtypes, grouped queries, ...
    AttentionBackend("sdpa", whole_samples, _CAUSAL, _ANYWHERE, _FLOATS, True),
    AttentionBackend("varlen", varlen, _DOCUMENT, frozenset({"cuda"}), _HALVES, True, 256, _varlen_is_missing),
    AttentionBackend("sdpa-documents", each_document, _DOCUMENT, _ANYWHERE, _FLOATS, True),
    AttentionBackend(
        "te", te.attention, _CAUSAL | _DOCUMENT, frozenset({"cuda"}), _HALVES, True, None, te.attention_obstacle
    ),
)


def select_attention(name: str, demand: AttentionDemand) -> AttentionBackend:
    """The backend of this name, or for "auto" the first that can do what is asked for.

    Raises:
        ConfigError: the backend that the user named cannot do it, or none can.
    """
    able = [backend for backend in BACKENDS if not backend.obstacle(demand)]
    choices = " or ".join(["auto", *(backend.name for backend in able)])
    if name != "auto":
        backend = next(backend for backend in BACKENDS if backend.name == name)
        if backend not in able:
            raise ConfigError(9, f"kernels.attention={name}", backend.obstacle(demand), f"use {choices}")
        return backend
    if not able:
        why = ", ".join(f"{backend.name} {backend.obstacle(demand)}" for backend in BACKENDS)
        raise ConfigError(10, "kernels.attention=auto", f"finds no backend: {why}", "change one of these settings")
    return able[0]
