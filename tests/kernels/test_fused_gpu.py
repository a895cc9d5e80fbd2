"""Our CUDA kernels on a GPU: every operation against torch, at the sizes of training, and what an emulator cannot show.

Skipped, visibly, without a GPU; with one, a missing library is a failure that says why.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hammer.kernels.native import cuda
from megatron_hammer.kernels.swiglu import swiglu
from tests.kernels import cuda_checks as checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = torch.device("cuda", 0)
SEED = int(torch.randint(2**31, ()))  # fresh inputs in every run; a failure shows it
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def k() -> Any:
    assert not cuda.unavailable(GPU), cuda.unavailable(GPU)
    print(f"seed {SEED}")
    return cuda.library()


of_every_type = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)


@of_every_type
@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize(
    "rows, h, offset",
    [(4096, 2048, 0), (1000, 64, 0), (515, 4096, 0), (300, 8192, 0), (77, 8200, 0), (513, 2047, 0), (513, 2048, 1)],
)
def test_norm(k: Any, dtype: torch.dtype, rows: int, h: int, updated: bool, offset: int) -> None:
    checks.norm(k, GPU, dtype, rows, h, updated, offset, SEED)


@of_every_type
@pytest.mark.parametrize(
    "s, b, heads, groups, d, offset",
    [(512, 2, 32, 4, 64, 0), (100, 3, 8, 8, 128, 0), (33, 2, 3, 1, 6, 0), (64, 2, 4, 2, 16, 1)],
)
def test_rope(k: Any, dtype: torch.dtype, s: int, b: int, heads: int, groups: int, d: int, offset: int) -> None:
    checks.rope_forward(k, GPU, dtype, s, b, heads, groups, d, offset, SEED)
    for layout in ("contiguous", "transposed", "expanded", "parts", "gaps"):
        checks.rope_backward(k, GPU, dtype, s, b, heads, groups, d, offset, layout, SEED)


@of_every_type
@pytest.mark.parametrize("rows, f, offset", [(2048, 5632, 0), (1000, 24, 0), (300, 2047, 0), (300, 2048, 1)])
def test_swiglu(k: Any, dtype: torch.dtype, rows: int, f: int, offset: int) -> None:
    checks.swiglu_both(k, GPU, dtype, rows, f, offset, SEED)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, offsets", [(5_000_003, (0,) * 5), (100_001, (3,) * 5), (100_001, (0, 1, 2, 3, 0)), (3, (0,) * 5)]
)
def test_adamw(k: Any, dtype: torch.dtype | None, n: int, offsets: tuple[int, ...]) -> None:
    checks.adamw(k, GPU, dtype, n, offsets, SEED)


@pytest.mark.parametrize("n, offset", [(0, 0), (1, 0), (50_000_003, 0), (1_000_003, 1)])
def test_square_sum(k: Any, n: int, offset: int) -> None:
    checks.square_sum(k, GPU, n, offset, SEED)


@of_every_type
@pytest.mark.parametrize("n, offset", [(0, 0), (1, 0), (9_000_001, 0), (90_001, 1)])
def test_amax(k: Any, dtype: torch.dtype, n: int, offset: int) -> None:
    checks.amax(k, GPU, dtype, n, offset, SEED)


@of_every_type
@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    "rows, columns, offset, both",
    [
        (2048, 2048, 0, True),
        (2048, 5632, 0, False),
        (200, 136, 0, True),
        (80, 136, 0, True),
        (67, 71, 0, True),
        (80, 136, 1, True),
    ],
)
def test_cast_fp8(
    k: Any, dtype: torch.dtype, to: torch.dtype, rows: int, columns: int, offset: int, both: bool
) -> None:
    checks.cast_fp8(k, GPU, dtype, to, rows, columns, offset, both, SEED)


@of_every_type
def test_through_autograd(k: Any, dtype: torch.dtype) -> None:
    checks.through_autograd(k, GPU, dtype, SEED)


def test_wrong_arguments_are_refused(k: Any) -> None:
    checks.refuses(k, GPU)
    with pytest.raises(ValueError, match="out must be on the device of the other tensors"):
        k.amax(torch.ones(3, device=GPU), torch.ones(()))


def test_work_is_on_the_current_stream_and_can_be_captured(k: Any) -> None:
    """The workspace of two-stage sums included: a graph's replay gives the bits of the call."""
    m = checks.memory(GPU, SEED)
    x, grad, weight = m.random((300, 512), BF16), m.random((300, 512), BF16), m.random((512,), BF16)
    rstd = x.float().square().mean(-1).rsqrt()

    def compute(grad_x: torch.Tensor, grad_weight: torch.Tensor, total: torch.Tensor) -> None:
        k.add_rms_norm_backward(grad, None, x, weight, rstd, grad_x, grad_weight)
        total.zero_()
        k.add_square_sum(grad_weight.float(), total)

    plain, replayed = (
        [torch.zeros_like(x), torch.zeros_like(weight), x.new_zeros((), dtype=torch.float32)] for _ in "ab"
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work elsewhere would come too early
        x.mul_(2)
        compute(*plain)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute(*replayed)
    graph.replay()
    assert all(checks.same(a, b) for a, b in zip(plain, replayed, strict=True))
    assert plain[1].any() and plain[2] > 0


def test_counts_beyond_32_bits(k: Any) -> None:
    """Rows behind 2^31 elements equal those of a small call."""
    if torch.cuda.mem_get_info(GPU)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    rows, h = 2**20 + 7, 2048
    x, weight = torch.zeros(rows, h, dtype=BF16, device=GPU), torch.randn(h, dtype=BF16, device=GPU)
    x[-9:].normal_()
    normed, rstd, few = torch.empty_like(x), torch.empty(rows, device=GPU), torch.empty_like(x[-9:])
    k.add_rms_norm_forward(x, None, weight, 1e-5, normed, None, rstd)
    k.add_rms_norm_forward(x[-9:], None, weight, 1e-5, few, None, rstd[-9:].clone())
    assert checks.same(normed[-9:], few)
    total, largest = torch.zeros((), device=GPU), torch.empty((), device=GPU)
    k.amax(x, largest)
    assert torch.equal(largest, x[-9:].abs().max().float())
    product, eight = torch.empty(rows, h // 2, dtype=BF16, device=GPU), torch.empty_like(x, dtype=torch.float8_e4m3fn)
    k.swiglu_forward(x, product)
    checks.near(product[-9:], swiglu(x[-9:].double()))
    transposed = torch.empty(h, rows, dtype=eight.dtype, device=GPU)
    k.cast_fp8(x, weight.float().max(), eight, transposed)
    assert checks.same(transposed[:, -9:], eight[-9:].t()) and eight[-9:].float().any()
    del normed, product, eight, transposed
    flat = torch.zeros(2**31 + 5, device=GPU)
    flat[-3:] = 2.0
    k.add_square_sum(flat, total)
    assert float(total) == 12.0
