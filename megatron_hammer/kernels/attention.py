"""Causal attention over whole samples or within documents: the backends, what each can do, and which one runs.

::

    data.attention_mask=causal      [s, b, heads, d]     each sample attends to its past, across the documents in it
    data.attention_mask=document    [b s, 1, heads, d]   the samples of a micro-batch one after the other; each token
                                                         attends to the past of its own document

Where documents lie is a ``PackedSequences``. With its ``keys`` (context parallelism) there are other rows of k and v
than of q, and the queries of a document are the end of its keys. ``BACKENDS`` is the whole table.

Legend: s sequence, b micro-batch, n query heads, g query groups, d size of a head (local ones).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hammer.kernels.backend import CPU, CUDA, HALVES, Backend, Requirements
from megatron_hammer.kernels.libraries import flash, te
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.packed_sequences import GraphPackedSequences, PackedSequences

# On a CPU, torch's 16-bit attention costs about as much for 30 rows as for 100, and below this many elements of a head
# (rows x d) up to twice as much as in fp32 with both conversions, above it less: measured on a Xeon with AMX, torch
# 2.13, 64 to 512 rows, d 32 to 128, forward and backward, one and two threads.
FP32_ELEMENTS_ON_CPU = 384 * 32


AttentionFunction = Callable[[Tensor, Tensor, Tensor, PackedSequences | None], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over earlier positions: q [s, b, n, d], k and v [keys, b, g, d] -> [s, b, n, d].

    The last query is at the place of the last key. Where there are as many keys as queries torch masks by itself; its
    own causal mask would have the first query at the first key, so fewer queries than keys are given a mask.
    On a CPU, short 16-bit inputs are computed in fp32: see ``FP32_ELEMENTS_ON_CPU``.
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype.itemsize == 2 and len(q) * q.shape[-1] < FP32_ELEMENTS_ON_CPU:
        return causal_attention(q.float(), k.float(), v.float()).to(dtype)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d], no copy
    queries, keys = q.shape[2], k.shape[2]
    how: dict[str, Any] = {"is_causal": True}
    if queries < keys:
        how = {"attn_mask": torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)}
    out = F.scaled_dot_product_attention(q, k, v, **how, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3)


def whole_samples(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None = None) -> Tensor:
    """Backend "sdpa": one call for all; each sample is one stretch of text."""
    assert documents is None, "this backend knows no documents: it was chosen for data.attention_mask=causal"
    return causal_attention(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None = None) -> Tensor:
    """Backend "cudnn": as "sdpa", by cuDNN's attention or not at all. It shares keys by itself and copies no input."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return whole_samples(q, k, v, documents)


def each_document(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None) -> Tensor:
    """Backend "sdpa-documents": one call a document, so that no mask is stored and no masked product is computed.

    It is the reference of the other backends for documents.
    """
    assert documents is not None, "this backend masks documents and must be told where they are"
    lengths, keys = list(documents.lengths), list(documents.key_lengths)
    parts = zip(q.split(lengths), k.split(keys), v.split(keys), strict=True)  # [rows, 1, heads, d]
    return torch.cat([causal_attention(q_i, k_i, v_i) for q_i, k_i, v_i in parts])


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None) -> Tensor:
    """Backend "varlen": torch's own FlashAttention (arXiv 2307.08691) for variable lengths, one launch for all."""
    from torch.nn.attention.varlen import varlen_attn

    assert documents is not None, "this backend masks documents and must be told where they are"
    q, k, v = (x.squeeze(1) for x in (q, k, v))  # [b s, heads, d], no copy
    bounds = documents.cu_seqlens, documents.key_cu_seqlens
    longest = documents.max_length, documents.max_key_length
    how: dict[str, Any] = {"window_size": (-1, 0)}  # everything before and nothing after, seen from the end of the keys
    if "enable_gqa" in _parameters(varlen_attn):  # torch 2.11 shares keys without being told
        how["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *bounds, *longest, **how)
    assert isinstance(out, Tensor)
    return out.unsqueeze(1)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@cache
def _varlen_unavailable(device: torch.device) -> str:
    """Why torch's variable-length attention cannot run on this device, or an empty string."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if "window_size" not in _parameters(varlen_attn):
        return f"the varlen_attn of torch {torch.__version__} has another signature"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than FlashAttention's sm_80"
    return ""


@cache
def _cudnn_unavailable(device: torch.device) -> str:
    """Why torch cannot reach cuDNN's attention on this device, or an empty string."""
    if not torch.backends.cudnn.is_available():
        return f"torch {torch.__version__} comes without cuDNN"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"it needs sm_80, the GPU is sm_{capability[0]}{capability[1]}"


def _torch_can_use_cudnn(required: Requirements) -> bool:
    """Torch's own check, which knows cuDNN's version and the heads that it can do on this chip, in backward too."""
    shapes = ((1, heads, 64, required.head_size) for heads in (required.heads, required.groups, required.groups))
    # Without requires_grad torch checks forward alone, which can do more heads than backward.
    q, k, v = (torch.empty(s, dtype=required.dtype, device=required.device, requires_grad=True) for s in shapes)
    return can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, required.heads != required.groups), False)


def _cudnn_unsupported(required: Requirements) -> str:
    if (limit := _masks("causal")(required)) or required.device.type != "cuda" or _cudnn_unavailable(required.device):
        return limit
    if _torch_can_use_cudnn(required):
        return ""
    grouped = f" in {required.groups} groups" if required.heads != required.groups else ""
    version = torch.backends.cudnn.version()
    return f"cannot do {required.heads} heads of {required.head_size}{grouped} (torch's own check, cuDNN {version})"


def _cudnn_is_preferred(required: Requirements) -> bool:
    """On Hopper and Blackwell, as torch itself has it: there 1.7 to 2.3 times as fast as torch's flash kernels.

    Measured on an H100 in transformers' pull request 48163; on older chips nobody has, and torch prefers flash.
    """
    return torch.cuda.get_device_capability(required.device) in ((9, 0), (10, 0))


def _masks(*able: str) -> Callable[[Requirements], str]:
    """The limit of a backend that can do these values of ``data.attention_mask`` and no others."""

    def limit(required: Requirements) -> str:
        if required.context_parallel > 1:
            size = f"parallel.context_parallel_size={required.context_parallel}"
            return "" if "document" in able else f"cannot do {size}, where a rank has fewer queries than keys"
        return "" if required.mask in able else f"cannot do data.attention_mask={required.mask}"

    return limit


def _varlen_unsupported(required: Requirements) -> str:
    return _masks("document")(required) or flash.unsupported(required)


def _fused_unsupported(required: Requirements) -> str:
    if required.compile == "layers" and required.mask == "causal":
        return "is not for kernels.compile=layers"
    return cpu.attention_unsupported(required.dtype)


def _te_unsupported(required: Requirements) -> str:
    """Its masks for packed sequences have the first query at the first key."""
    return _masks()(required) if required.context_parallel > 1 else ""


BACKENDS = (
    Backend(
        "fused",
        lambda device: fused.attention,
        CPU,
        unsupported=_fused_unsupported,
        preferred=lambda required: cpu.attention_is_fast(required.dtype),
        variant=lambda required: cpu.attention_versions(required.dtype)[0].name,
    ),
    Backend(
        "cudnn",
        lambda device: cudnn,
        CUDA,
        HALVES,
        _cudnn_unsupported,
        _cudnn_unavailable,
        preferred=_cudnn_is_preferred,
        deterministic=False,  # torch refuses it under use_deterministic_algorithms
    ),
    Backend("sdpa", lambda device: whole_samples, unsupported=_masks("causal")),
    Backend("varlen", lambda device: varlen, CUDA, HALVES, _varlen_unsupported, _varlen_unavailable),
    Backend("sdpa-documents", lambda device: each_document, unsupported=_masks("document")),
    *flash.BACKENDS,
    Backend("te", lambda device: te.attention, CUDA, HALVES, _te_unsupported, te.not_installed, by_name_only=True),
)


# ---- within a compiled layer ---------------------------------------------------------------------------------------


def in_graph(backend: Backend, device: torch.device) -> AttentionFunction:
    """The attention of a backend for layers that are compiled (``kernels.compile=layers``) with document masks.

    Where documents are ``PackedSequences``, as in evaluation, it is the backend's own. ``GraphPackedSequences`` make it
    one operation of the layer's graph, which the compiler calls and does not look into::

        forward     out = attention(q, k, v)                      keeps q, k, v
        backward    attention again, with its record; then that record's backward

    which costs one forward pass of attention more than it does outside of a graph.
    """
    plain: AttentionFunction = backend.load(device)
    operation = _operation(backend, device)

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor:
        if isinstance(documents, GraphPackedSequences):
            within: Tensor = operation(q, k, v, *documents)
            return within
        return plain(q, k, v, documents)

    return attention


@cache
def _operation(backend: Backend, device: torch.device) -> Callable[..., Tensor]:
    """Operations of torch are known by name in a process, so each is made once."""
    plain, name = backend.load(device), f"megatron_hammer::{backend.name.replace('-', '_')}_attention_{device.type}"

    @torch.library.custom_op(name, mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = plain(q, k, v, GraphPackedSequences(lengths, cu_seqlens, positions).documents())
        return out.contiguous()

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cu_seqlens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # An operation runs below autograd; leaving "inference mode" is how torch lets it come back.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = plain(*inputs, GraphPackedSequences(lengths, cu_seqlens, positions).documents())
            grad_q, grad_k, grad_v = torch.autograd.grad(out, inputs, grad)
        return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()

    @forward.register_fake
    def _(q: Tensor, *others: Tensor) -> Tensor:
        return q.new_empty(q.shape)

    @backward.register_fake
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors), None, None, None

    forward.register_autograd(gradient, setup_context=keep)
    return forward
