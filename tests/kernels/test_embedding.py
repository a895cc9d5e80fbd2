"""The gradient of an embedding: the sum by blocks against fp64, and how many additions wait for one another."""

from __future__ import annotations

import pytest
import torch

from megatron_hammer.kernels.embedding import BLOCK, add_rows, sum_in_blocks
from megatron_hammer.model.layers import LayerOptions, VocabParallelEmbedding
from megatron_hammer.parallel.context import Group


def text_like(n: int, vocabulary: int) -> torch.Tensor:
    """Frequencies by rank r as 1 / (r + 2.7): Zipf's law with Mandelbrot's shift (doi 10.3758/s13423-014-0585-6)."""
    frequencies = 1 / (torch.arange(1, vocabulary + 1) + 2.7)
    return torch.multinomial(frequencies, n, replacement=True)


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, 5 * BLOCK + 3])
@pytest.mark.parametrize("vocabulary", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_and_sums_add_up_to_the_gradient(n: int, vocabulary: int, dtype: torch.dtype) -> None:
    tokens, rows = text_like(n, vocabulary), torch.randn(n, 6, dtype=torch.float64).to(dtype)
    keys, sums = sum_in_blocks(tokens, rows, vocabulary)
    assert len(keys) == len(sums) == -(-n // BLOCK) * BLOCK and sums.dtype == torch.promote_types(dtype, torch.float32)
    found = torch.zeros(vocabulary, 6, dtype=torch.float64).index_add_(0, keys, sums.double())
    expected = torch.zeros(vocabulary, 6, dtype=torch.float64).index_add_(0, tokens, rows.double())
    # A block's sum of at most 64 terms in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if dtype != torch.float64 else 1e-12)


def test_no_row_waits_for_hundreds_of_others() -> None:
    """Of 16,384 tokens of text in a vocabulary of 32,000; index_put_ adds those of one key one after the other."""
    tokens = text_like(16_384, 32_000)
    copies = int(tokens.bincount().max())
    keys, _ = sum_in_blocks(tokens, torch.zeros(len(tokens), 1), 32_000)
    assert copies > 300 and int(keys.bincount().max()) <= copies // BLOCK + 4  # where its run begins and ends; spread


def test_on_a_cpu_the_rows_are_added_in_order() -> None:
    tokens, rows, place = text_like(500, 9), torch.randn(500, 4).bfloat16(), torch.randn(9, 4)
    expected = place.clone()
    for token, row in zip(tokens.tolist(), rows.float(), strict=True):
        expected[token] += row
    add_rows(place, tokens, rows)
    assert torch.equal(place, expected)


def test_tokens_of_other_ranks_do_not_meet_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under tensor parallelism they look up something, with a gradient of zero; not all of them the same row."""
    embedding = VocabParallelEmbedding(128, 4, LayerOptions(tp=Group(1, 4)))
    looked_up: list[torch.Tensor] = []

    def lookup(weight: torch.Tensor, gradient: None, tokens: torch.Tensor) -> torch.Tensor:
        looked_up.append(tokens)
        return torch.ones(*tokens.shape, 4)

    monkeypatch.setattr("megatron_hammer.model.layers.look_up", lookup)
    monkeypatch.setattr("megatron_hammer.model.layers._sum_parts", lambda partial, options: partial)
    tokens = torch.arange(512).view(4, 128)
    found = embedding(tokens)
    assert torch.equal(found[:, :, 0], ((tokens >= 128) & (tokens < 256)).float())
    assert looked_up[0].min() >= 0 and looked_up[0].flatten().bincount().tolist() == [4] * 128
