"""Figures by source: against plain sums, exact in any order, and the same bits per byte whatever the tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.sampling.batch import Batch
from megatron_hammer.tokenizer.pieces import Pieces
from megatron_hammer.train.source_sums import Sources, mean_loss, sizes_of, source_figures, sum_by_source

CPU = torch.device("cpu")


def batches_of(seed: int, weighted: bool, by_token: bool) -> tuple[list[Batch[Tensor]], list[Tensor]]:
    """Three micro-batches of [2, 16] from four sources, of which the last gives nothing, and losses."""
    generator = torch.Generator().manual_seed(seed)
    batches, losses = [], []
    for _ in range(3):
        labels = torch.randint(0, 50, (2, 16), generator=generator)
        weights = torch.rand(2, 16, generator=generator) * (labels % 3 > 0) if weighted else None
        sources = torch.randint(0, 3, (2, 16) if by_token else (2,), generator=generator)
        batches.append(Batch(labels, labels, weights, sources=sources))
        losses.append(torch.rand(2, 16, generator=generator) * 12)
    return batches, losses


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_a_plain_loop(weighted: bool, by_token: bool) -> None:
    batches, losses = batches_of(1, weighted, by_token)
    sizes = torch.arange(50) % 5 << 32 | torch.arange(50) % 3
    expected = np.zeros((4, 4))
    for batch, found in zip(batches, losses, strict=True):
        assert batch.sources is not None
        for row in range(2):
            for column in range(16):
                source = int(batch.sources[row, column] if by_token else batch.sources[row])
                label, loss = int(batch.labels[row, column]), float(found[row, column])
                w = 1.0 if batch.loss_weights is None else float(batch.loss_weights[row, column])
                expected[source] += [w * loss, w, w * (label % 5), w * (label % 3)]
    table = sum_by_source(batches, losses, Sources(4, sizes), CPU)
    assert table.numpy() == pytest.approx(expected, rel=1e-6, abs=0) and not table[3].any()
    if not weighted:  # integers are exact
        assert np.array_equal(table[:, 1:].numpy(), expected[:, 1:])
    assert float(mean_loss(table)) == pytest.approx(expected[:, 0].sum() / expected[:, 1].sum(), rel=1e-6)
    without = sum_by_source(batches, losses, Sources(4), CPU)
    assert torch.equal(without[:, :2], table[:, :2]) and not without[:, 2:].any()


def test_the_order_of_additions_changes_no_bit() -> None:
    """Micro-batches turned round, and split over ranks and over parts of a sample (context parallelism)."""
    batches, losses = batches_of(2, True, False)
    whole, sources = sum_by_source(batches, losses, Sources(4), CPU), Sources(4)
    assert torch.equal(sum_by_source(batches[::-1], losses[::-1], sources, CPU), whole)
    parts = []
    for part in (slice(0, 5), slice(5, 16)):
        cut = []
        for batch in batches:
            assert batch.loss_weights is not None and batch.sources is not None
            rows = batch.sources[:, None].expand(2, 16)[:, part]
            cut.append(Batch(batch.tokens[:, part], batch.labels[:, part], batch.loss_weights[:, part], sources=rows))
        parts += [sum_by_source([b], [x[:, part]], sources, CPU) for b, x in zip(cut, losses, strict=True)]
    assert torch.equal(torch.stack(parts[::-1]).sum(0), whole)
    generator, total = torch.Generator().manual_seed(3), torch.zeros(4, dtype=torch.float64)
    rows = torch.randn(4096, 4, generator=generator).abs().double().mul(2**22).round().div(2**22)
    for row in rows[torch.randperm(4096, generator=generator)]:
        total += row
    assert torch.equal(total, rows.sum(0))


def test_a_loss_that_is_not_finite_stays_with_its_source() -> None:
    batches, losses = batches_of(4, False, False)
    assert batches[0].sources is not None
    losses[0][0, 3] = math.nan
    bad = int(batches[0].sources[0])
    table = sum_by_source(batches, losses, Sources(4), CPU)
    assert [bool(x) for x in table[:, 0].isnan()] == [source == bad for source in range(4)]
    assert mean_loss(table).isnan()


@dataclass
class Vocabulary:
    """As much of a tokenizer as the figures need."""

    content: list[bytes]

    @property
    def vocab_size(self) -> int:
        return len(self.content)

    def encode(self, text: bytes) -> list[int]:
        """Longest piece first."""
        ids = []
        while text:
            piece = max((piece for piece in self.content if piece and text.startswith(piece)), key=len)
            ids.append(self.content.index(piece))
            text = text[len(piece) :]
        return ids

    def _pieces(self) -> Pieces:
        return Pieces(self.content, np.zeros(self.vocab_size, bool), np.ones(self.vocab_size, bool))

    def piece_bytes(self) -> np.ndarray:
        return self._pieces().lengths

    def piece_characters(self) -> np.ndarray:
        return self._pieces().characters


def test_bits_per_byte_do_not_change_with_the_tokenizer() -> None:
    """An oracle whose loss of a token is what its bytes cost: 0.5 nats a byte in one source and 2 in the other."""
    texts = ["the cat, the café, the cat" * 3, "今天天气很好，今天去看猫" * 2]
    characters = sorted({c for text in texts for c in text})
    single: list[bytes] = [b"", *(bytes([i]) for i in range(256))]  # byte by byte; the first is a special
    vocabularies = [single, [*single, *(c.encode() for c in characters)], [*single, b"the ", "今天".encode(), b"cat"]]
    lines: list[dict[str, Any]] = []
    lengths = set()
    for content in vocabularies:
        vocabulary = Vocabulary(content)
        sizes = sizes_of(vocabulary, len(content) + 5)  # type: ignore[arg-type]
        assert not sizes[len(content) :].any()
        batches, losses = [], []
        for source, text in enumerate(texts):
            ids = vocabulary.encode(text.encode())
            ids += [0] * (240 - len(ids))  # specials, which the oracle knows
            labels = torch.tensor([ids])
            batches.append(Batch(labels, labels, sources=torch.tensor([source])))
            losses.append((0.5, 2.0)[source] * torch.from_numpy(vocabulary.piece_bytes())[labels].float())
            lengths.add(len(vocabulary.encode(text.encode())))
        table = sum_by_source(batches, losses, Sources(2, sizes), CPU)
        lines.append(source_figures(["en", "zh"], table.tolist(), {0: 240, 1: 240}))
    assert len(lengths) > 4, "the vocabularies must cut the texts in other ways"
    for line in lines:
        assert line["source/en/bits_per_byte"] == pytest.approx(0.5 / math.log(2), rel=1e-12)
        assert line["source/zh/bits_per_byte"] == pytest.approx(2.0 / math.log(2), rel=1e-12)
        for name, text, cost in zip(("en", "zh"), texts, (0.5, 2.0), strict=True):
            expected = cost * len(text.encode()) / math.log(2) / len(text)
            assert line[f"source/{name}/bits_per_character"] == pytest.approx(expected, rel=1e-12)


def test_what_gave_nothing_is_not_in_the_line() -> None:
    table = [[6.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert source_figures(["a", "b", "c"], table, {2: 8, 0: 40}) == {
        "source/a/loss": 2.0, "source/a/bits_per_byte": None, "source/a/bits_per_character": None,
        "source/a/tokens": 40, "source/c/loss": None, "source/c/bits_per_byte": None,
        "source/c/bits_per_character": None, "source/c/tokens": 8,
    }  # fmt: skip
