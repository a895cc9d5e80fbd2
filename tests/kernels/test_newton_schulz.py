"""Newton-Schulz against singular values: the polynomial itself, and how near it comes to orthogonal rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hammer.kernels import newton_schulz
from megatron_hammer.kernels.newton_schulz import flops, orthogonalise, type_of_products

BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.3}
"""Largest error of an element times the root of the longer side. Small singular values grow 485-fold, and so do the
roundings beside them: in bf16, of 2^-9."""


def by_singular_values(matrix: Tensor) -> Tensor:
    """The polynomial, five times, of each singular value, in fp64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 80), (1, 1, 7), (4, 8, 256)])
def test_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    x = (1e-4 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    x[0] *= 1e-3  # a matrix does not see how large another is
    expected = torch.stack([by_singular_values(matrix) for matrix in x])
    error = (orthogonalise(x.clone()).double() - expected).abs().max() * shape[2] ** 0.5
    assert error < BOUNDS[dtype]


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 0.0), (torch.bfloat16, 0.05)])
def test_singular_values_end_near_one(dtype: torch.dtype, slack: float) -> None:
    """Those from 0.002 of the norm; the stated bound."""
    torch.manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, -2.2, 64, dtype=torch.float64)
    assert (s / s.norm()).min() > 0.002
    found = torch.linalg.svdvals(orthogonalise(((u * s) @ v)[None].to(dtype))[0].double())
    assert 0.68 - slack < found.min() and found.max() < 1.21 + slack


def test_zeros_stay_zeros() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 5)).any()
    assert orthogonalise(torch.full((1, 3, 5), 1e-30)).isfinite().all()


def test_costs() -> None:
    assert flops(3, 5) == flops(5, 3) == 5 * (4 * 9 * 5 + 2 * 27)


def test_types(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for quick in (True, False):
        monkeypatch.setattr(newton_schulz, "has_quick_bf16", lambda quick=quick: quick)
        assert type_of_products("auto", torch.float32, cpu) == (torch.bfloat16 if quick else torch.float32)
        assert type_of_products("auto", torch.float32, gpu) == torch.bfloat16
        assert type_of_products("bf16", torch.float32, cpu) == torch.bfloat16
        assert type_of_products("fp32", torch.float32, gpu) == torch.float32
        assert type_of_products("auto", torch.float64, gpu) == torch.float64, "a proof"
