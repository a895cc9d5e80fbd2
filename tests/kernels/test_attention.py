"""Attention within documents against a formula written down independently, and the table that chooses a backend."""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import ATTENTION_MASKS, DataConfig, KernelsConfig
from megatron_hammer.kernels import attention
from megatron_hammer.kernels.attention import (
    BACKENDS,
    FP32_ELEMENTS_ON_CPU,
    causal_attention,
    each_document,
    varlen,
    whole_samples,
)
from megatron_hammer.kernels.backend import FLOATS, Backend, Requirements
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import select, select_operations
from tests.kernels.spans import spans

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def documents_of(*lengths: int) -> PackedSequences:
    return PackedSequences.from_cu_seqlens(np.cumsum([0, *lengths]).astype(np.int32), CPU)


def qkv(rows: int, heads: int, groups: int, dtype: torch.dtype, d: int = 8) -> list[Tensor]:
    """[rows, 1, heads, d] three times: slices of one fused projection, as the model has them."""
    fused = torch.randn(rows, 1, heads + 2 * groups, d, dtype=dtype)
    return [x.requires_grad_() for x in fused.split((heads, groups, groups), dim=2)]


def reference(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences) -> Tensor:
    """Scores of all pairs, those of other documents and of later rows at minus infinity."""
    document, key_document = (
        torch.repeat_interleave(torch.tensor(lengths)) for lengths in (documents.lengths, documents.key_lengths)
    )
    key = torch.cat([torch.arange(n) for n in documents.key_lengths])
    allowed = (document[:, None] == key_document[None, :]) & (documents.positions[:, None] >= key[None, :])
    copies = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, v)


def with_gradients(function: Any, inputs: list[Tensor], documents: PackedSequences) -> list[Tensor]:
    out = function(*inputs, documents)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(-1))]


@pytest.mark.parametrize("heads, groups", [(6, 6), (6, 2), (4, 1)])
def test_causal_attention(heads: int, groups: int) -> None:
    """Query head i uses group i // (heads / groups), and looks at no later position."""
    s, b, d = 9, 2, 4
    q, k, v = (torch.randn(s, b, n, d, dtype=torch.float64) for n in (heads, groups, groups))
    out = causal_attention(q, k, v)
    for head in range(heads):
        group = head // (heads // groups)
        for position in range(s):
            scores = torch.einsum("bd,tbd->bt", q[position, :, head], k[: position + 1, :, group]) / d**0.5
            expected = torch.einsum("bt,tbd->bd", scores.softmax(-1), v[: position + 1, :, group])
            torch.testing.assert_close(out[position, :, head], expected)


def test_documents_from_cumulative_lengths() -> None:
    documents = PackedSequences.from_cu_seqlens(np.array([0, 5, 8, 16], np.int32), CPU)
    assert documents.lengths == (5, 3, 8) and documents.max_length == 8
    assert documents.cu_seqlens.tolist() == [0, 5, 8, 16] and documents.cu_seqlens.dtype == torch.int32
    assert documents.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]
    for broken in ([1, 5], [0, 5, 5], [0, 5, 4]):
        with pytest.raises(AssertionError, match="must rise from 0"):
            PackedSequences.from_cu_seqlens(np.array(broken, np.int32), CPU)


LENGTHS = [(1, 1, 1), (7, 1, 12, 33), (53,), (2,) * 20, (1, 130, 3)]


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_document_in_fp64(lengths: tuple[int, ...], heads: int, groups: int) -> None:
    """Output and gradients; 1e-12: some hundred roundings of fp64."""
    documents = documents_of(*lengths)
    inputs = qkv(sum(lengths), heads, groups, torch.float64)
    found = with_gradients(each_document, inputs, documents)
    for mine, expected in zip(found, with_gradients(reference, inputs, documents), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


SPANS = [[(1, 1), (1, 9), (4, 4), (7, 30)], [(16, 64)], [(5, 6), (40, 41), (2, 100)]]


@pytest.mark.parametrize("parts", SPANS, ids=str)
def test_queries_are_the_end_of_the_keys(parts: list[tuple[int, int]]) -> None:
    documents = spans(parts)
    (q, _, _), (_, k, v) = (qkv(sum(n), 4, 2, torch.float64) for n in (documents.lengths, documents.key_lengths))
    found = with_gradients(each_document, [q, k, v], documents)
    for mine, expected in zip(found, with_gradients(reference, [q, k, v], documents), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_each_document_in_all_types(dtype: torch.dtype, tolerance: float) -> None:
    """Of the norm; a few roundings of the type. Documents on both sides of the bound up to which 16 bits become 32."""
    rows = FP32_ELEMENTS_ON_CPU // 32
    documents = documents_of(40, rows - 1, rows + 5, 3)
    inputs = qkv(sum(documents.lengths), 4, 2, dtype, 32)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = with_gradients(each_document, inputs, documents)
    for mine, expected in zip(found, with_gradients(reference, wide, documents), strict=True):
        assert mine.dtype == dtype
        assert (mine - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_documents_leave_no_bit_behind(dtype: torch.dtype) -> None:
    """Values and gradients of a document are the same bits beside others and alone."""
    first, second = qkv(37, 4, 2, dtype), qkv(51, 4, 2, dtype)
    both = [torch.cat(pair).detach().requires_grad_() for pair in zip(first, second, strict=True)]
    together = with_gradients(each_document, both, documents_of(37, 51))
    for place, alone in ((slice(37), first), (slice(37, None), second)):
        single = with_gradients(each_document, alone, documents_of(len(alone[0])))
        for mine, expected in zip(together, single, strict=True):
            assert torch.equal(mine[place], expected)


def test_a_mask_is_never_ignored() -> None:
    """Neither kind of backend takes the other kind's call."""
    inputs = qkv(6, 2, 2, torch.float32)
    with pytest.raises(AssertionError, match="knows no documents"):
        whole_samples(*inputs, documents_of(2, 4))
    for row in BACKENDS:
        if row.devices >= {"cpu"} and row.unsupported(Requirements(mask="causal")):
            with pytest.raises(AssertionError, match="must be told where they are"):
                row.load(CPU)(*inputs, None)


def test_varlen_calls_torch_with_what_it_takes() -> None:
    """The true operator on shapes without data: forward and backward accept the arguments."""
    inputs = [x.detach().to("meta").requires_grad_() for x in qkv(12, 4, 2, torch.bfloat16)]
    documents = documents_of(5, 7)
    out = varlen(*inputs, PackedSequences(documents.lengths, documents.cu_seqlens.to("meta"), documents.positions))
    assert out.shape == inputs[0].shape and out.dtype == torch.bfloat16
    for grad, x in zip(torch.autograd.grad(out, inputs, torch.ones_like(out)), inputs, strict=True):
        assert grad.shape == x.shape


def test_varlen_means_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of torch's function, by its documentation: packed tokens, cumulative lengths, a causal window."""

    def double(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert q.dim() == 3 and cu_q.dtype == cu_k.dtype == torch.int32 and window_size == (-1, 0)
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        assert enable_gqa == (q.shape[1] != k.shape[1])
        lengths = spans([*zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)])
        return reference(*(x.unsqueeze(1) for x in (q, k, v)), lengths).squeeze(1)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", double)
    for heads, groups in ((4, 2), (3, 3)):
        inputs, documents = qkv(16, heads, groups, torch.float64), documents_of(5, 3, 8)
        torch.testing.assert_close(varlen(*inputs, documents), each_document(*inputs, documents))
        parts = spans([(5, 9), (3, 3), (8, 20)])
        inputs[1:] = qkv(32, heads, groups, torch.float64)[1:]
        torch.testing.assert_close(varlen(*inputs, parts), each_document(*inputs, parts))


def test_varlen_of_torch_2_11_is_not_told_of_groups(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its varlen_attn has no enable_gqa, and its FlashAttention shares keys where there are fewer of them."""
    seen = []

    def double(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        seen.append((key.shape[1], window_size))
        return query

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", double)
    inputs = qkv(16, 4, 2, torch.bfloat16)
    assert torch.equal(varlen(*inputs, documents_of(5, 3, 8)), inputs[0]) and seen == [(2, (-1, 0))]
    assert choose("auto", HALF).name == "varlen"


def test_config_names_the_table() -> None:
    masks = typing.get_args(typing.get_type_hints(DataConfig)["attention_mask"])
    able = {row.name: tuple(mask for mask in masks if not row.unsupported(Requirements(mask=mask))) for row in BACKENDS}
    assert able == ATTENTION_MASKS and set(masks) == set().union(*able.values())


def choose(name: str, required: Requirements) -> Backend:
    return select("attention", name, BACKENDS, required)


# fused is not for fp64: what a CPU without AVX-512 and AMX would do
CHOSEN = {
    "sdpa": [
        Requirements(dtype=torch.float64),
        Requirements(compile="layers"),
        Requirements(CUDA),
        Requirements(CUDA, torch.bfloat16, heads=8, groups=2, deterministic=True),
        Requirements(CUDA, torch.bfloat16, head_size=512),
    ],
    "cudnn": [Requirements(CUDA, torch.bfloat16, heads=8, groups=2), Requirements(CUDA, torch.float16, head_size=256)],
    "sdpa-documents": [
        Requirements(dtype=torch.float64, mask="document"),
        Requirements(CUDA, mask="document"),
        Requirements(CUDA, torch.bfloat16, "document", head_size=512),
        Requirements(CUDA, torch.bfloat16, "document", head_size=36),  # torch's kernel does it in forward alone
    ],
    "varlen": [
        Requirements(CUDA, torch.bfloat16, "document", heads=8, groups=2),
        Requirements(CUDA, torch.bfloat16, heads=8, groups=2, context_parallel=2),
    ],
}


@pytest.mark.parametrize("name, required", [(n, d) for n, cases in CHOSEN.items() for d in cases], ids=str)
def test_the_first_that_can_is_chosen(name: str, required: Requirements, gpu: Any) -> None:
    assert choose("auto", required).name == choose(name, required).name == name
    chosen = select_operations(KernelsConfig(norm="torch", rope="torch", swiglu="torch", loss="torch"), required)
    assert chosen.attention is choose(name, required).load(required.device)


HALF = Requirements(CUDA, torch.bfloat16, "document", heads=8, groups=2)
REFUSED = [  # name, required, what the line must say
    (
        "sdpa",
        Requirements(dtype=torch.float64, mask="document"),
        ["cannot do data.attention_mask=document", "use auto or sdpa-documents"],
    ),
    ("fused", Requirements(dtype=torch.float64), ["does not compute in float64", "use auto or sdpa"]),
    ("fused", Requirements(compile="layers"), ["is not for kernels.compile=layers", "use auto or sdpa"]),
    (
        "varlen",
        Requirements(CUDA, torch.bfloat16),
        ["cannot do data.attention_mask=causal", "use auto or cudnn or sdpa"],
    ),
    ("sdpa-documents", Requirements(), ["cannot do data.attention_mask=causal"]),
    ("sdpa", Requirements(context_parallel=2), ["parallel.context_parallel_size=2", "fewer queries than keys"]),
    ("te", Requirements(CUDA, torch.bfloat16, "document", context_parallel=2), ["parallel.context_parallel_size=2"]),
    ("varlen", Requirements(dtype=torch.bfloat16, mask="document"), ["does not run on cpu"]),
    ("varlen", Requirements(CUDA, mask="document"), ["does not compute in float32"]),
    ("varlen", Requirements(CUDA, torch.float16, "document", head_size=512), ["at most 256 elements, not 512"]),
    ("varlen", Requirements(CUDA, torch.float16, "document", head_size=36), ["a multiple of 8 elements, not 36"]),
    ("cudnn", HALF, ["cannot do data.attention_mask=document", "use auto or varlen or sdpa-documents"]),
    ("cudnn", Requirements(CUDA), ["does not compute in float32", "use auto or sdpa"]),
    ("cudnn", Requirements(CUDA, torch.bfloat16, deterministic=True), ["is not the same from run to run"]),
    (
        "cudnn",
        Requirements(CUDA, torch.bfloat16, "causal", 8, 2, 512),
        ["cannot do 8 heads of 512 in 2 groups (torch's own"],
    ),
    ("flash-attn", HALF, ["the package flash-attn is not installed"]),
    ("flash-attn-3", Requirements(CUDA, torch.bfloat16), ["the package flash-attn-3 is not installed"]),
    ("flash-attn-4", Requirements(CUDA, torch.bfloat16, head_size=36), ["heads of a multiple of 8 elements, not 36"]),
    ("flash-attn-4", HALF, ["the package flash-attn-4 is not installed"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_one_is_first_where_it_can(dtype: torch.dtype) -> None:
    for mask, other in (("causal", "sdpa"), ("document", "sdpa-documents")):
        required = Requirements(dtype=dtype, mask=mask, heads=8, groups=2)
        assert choose("auto", required).name == ("fused" if cpu.attention_is_fast(dtype) else other)


@pytest.mark.parametrize("name, required, says", REFUSED, ids=str)
def test_a_named_backend_that_cannot(name: str, required: Requirements, says: list[str], gpu: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(name, required)
    for part in (f"error[E209]: kernels.attention={name} ", *says):
        assert part in str(caught.value)


def test_varlen_needs_the_chip_and_the_torch(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"E209.*Some GPU is older than FlashAttention's sm_80"):
        choose("varlen", HALF)
    assert choose("auto", HALF).name == "sdpa-documents", "passed over where nobody named it"
    gpu((9, 0))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, cu_seq_q, is_causal: None)
    with pytest.raises(ConfigError, match=r"E209.*has another signature"):
        choose("varlen", HALF)
    gpu((9, 0))
    monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ConfigError, match=r"E209.*has no torch\.nn\.attention\.varlen"):
        choose("varlen", HALF)


def test_cudnn_needs_the_chip_and_the_torch(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an A100 by name only; below sm_80, or where somebody switched it off, not at all."""
    required = Requirements(CUDA, torch.bfloat16)
    gpu((8, 0))
    assert choose("auto", required).name == "sdpa" and choose("cudnn", required).name == "cudnn"
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"E209.*it needs sm_80, the GPU is sm_75"):
        choose("cudnn", required)
    gpu((10, 0))
    assert choose("auto", required).name == "cudnn"
    for name in ("is_available", "cudnn_sdp_enabled"):
        monkeypatch.setattr(torch.backends.cudnn if "is" in name else torch.backends.cuda, name, lambda: False)
        gpu((9, 0))
        assert choose("auto", required).name == "sdpa"
        with pytest.raises(ConfigError, match=r"E209.*(comes without cuDNN|enable_cudnn_sdp\(False\))"):
            choose("cudnn", required)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a torch for CUDA without a GPU raises its missing driver; only runs on a GPU ask",
)
def test_torch_can_be_asked_about_cudnn() -> None:
    """The true question, with the shapes that it wants: here the answer is no, and nothing is raised."""
    assert attention._torch_can_use_cudnn(Requirements(CPU, torch.bfloat16, heads=8, groups=2)) is False


def test_cudnn_is_forced() -> None:
    """Where it cannot run, torch must say so and not take another kernel."""
    seen: list[str] = []
    q = torch.randn(4, 1, 2, 8)

    def inside(*arguments: Any, **options: Any) -> Tensor:
        flags = ("cudnn", "flash", "mem_efficient", "math")
        seen.extend(name for name in flags if getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
        return arguments[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.F, "scaled_dot_product_attention", inside)
        attention.cudnn(q, q, q)
    assert seen == ["cudnn"]


def test_without_grouped_queries() -> None:
    """What a backend declares decides: one that cannot share keys is passed over for a model that does."""
    narrow = Backend("narrow", lambda device: whole_samples, dtypes=FLOATS, unsupported=lambda required: (
        f"needs as many groups ({required.groups}) as heads" if required.heads != required.groups else ""))  # fmt: skip
    rows = (narrow, *BACKENDS)
    assert select("attention", "auto", rows, Requirements(dtype=torch.float64, heads=4, groups=4)).name == "narrow"
    assert select("attention", "auto", rows, Requirements(dtype=torch.float64, heads=4, groups=2)).name == "sdpa"
    with pytest.raises(ConfigError, match=r"E209.*as many groups \(2\) as heads"):
        select("attention", "narrow", rows, Requirements(heads=4, groups=2))


def test_none_can() -> None:
    with pytest.raises(ConfigError, match=r"E210.*sdpa does not run on xpu.*varlen does not run on xpu"):
        choose("auto", Requirements(torch.device("xpu")))


def test_cudnn_is_asked_about_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's check looks at backward's limits only where a gradient is wanted."""
    asked: list[Any] = []
    monkeypatch.setattr(attention, "SDPAParams", lambda *params: params)
    monkeypatch.setattr(attention, "can_use_cudnn_attention", lambda params, debug: asked.extend(params[:3]) or True)
    required = Requirements(dtype=torch.bfloat16, heads=8, groups=2, head_size=64)
    assert attention._torch_can_use_cudnn(required)
    assert [x.requires_grad for x in asked] == [True] * 3 and [x.shape[1] for x in asked] == [8, 2, 2]
