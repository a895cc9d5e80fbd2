"""Fill-in-the-middle: what it does to a piece, that it is a pure function of the sample, and what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, config_from_tree, config_to_tree
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling.fill_in_the_middle import SMALLEST, FillInTheMiddle, open_fim, uniform
from megatron_hammer.sampling.samples import TrainData, describe_samples
from megatron_hammer.tokenizer.load import load_tokenizer

BOS, EOS, PREFIX, MIDDLE, SUFFIX = 1, 2, 3, 4, 5
SEQ = 64


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of bos, rising ids from 10 on, and eos: what was moved shows."""
    path, rng = tmp_path_factory.mktemp("fim") / "code", np.random.default_rng(0)
    with IndexedWriter(path, vocab_size=1000) as writer:
        for _ in range(200):
            length = int(rng.integers(1, 120))
            first = int(rng.integers(10, 800))
            writer.add(np.concatenate([[BOS], np.arange(first, first + length), [EOS]]), [length + 2])
    return str(path)


def open_data(prefix: str, rate: float = 0.6, spm_rate: float = 0.5, seed: int = 3, **more: Any) -> TrainData:
    fim = FillInTheMiddle(rate, spm_rate, (PREFIX, MIDDLE, SUFFIX), BOS, EOS)
    return TrainData({prefix: 1.0}, SEQ, seed, fim={prefix: fim}, vocab_size=1000, **more)


def undone(piece: list[int]) -> tuple[str, list[int], tuple[int, int, int]]:
    """(form, the text as it was but for its last tokens, tokens of the parts), by reading the sentinels."""
    middle = piece.index(MIDDLE)
    if piece[1] == SUFFIX and piece[0] == PREFIX and piece.count(SUFFIX) == 1 and _rises(piece[middle + 1 :]):
        suffix, text = piece[2:middle], piece[middle + 1 :]
        return "SPM", [*text, *suffix], (-1, -1, len(suffix))
    at = piece.index(SUFFIX)
    prefix, suffix, text = piece[1:at], piece[at + 1 : middle], piece[middle + 1 :]
    return "PSM", [*prefix, *text, *suffix], (len(prefix), len(text), len(suffix))


def _rises(ids: list[int]) -> bool:
    return all(b == a + 1 for a, b in itertools.pairwise(ids))


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_each_piece_is_its_text_in_other_order(prefix: str, order: Any) -> None:
    """Every token comes back but the last three of the suffix; bos and eos, lengths and places stay."""
    plain = TrainData({prefix: 1.0}, SEQ, 3, order, 100)
    data = open_data(prefix, order=order, num_samples=100)
    seen: dict[str, int] = {"PSM": 0, "SPM": 0}
    eligible = 0
    for i in range(100):
        before, after = plain.tokens(i).tolist(), data.tokens(i).tolist()
        done = {infill.piece: infill for infill in data.infills(i)}
        start = 0
        for number, span in enumerate(data.locate(i)):
            old, new = before[start : start + span.length], after[start : start + span.length]
            start += span.length
            begin, end = int(old[0] == BOS), span.length - int(old[-1] == EOS)
            eligible += end - begin >= SMALLEST
            if number not in done:
                assert new == old
                continue
            assert (new[:begin], new[end:]) == (old[:begin], old[end:])
            infill, (form, text, parts) = done[number], undone(new[begin:end])
            assert text == old[begin : end - 3]
            if (infill.prefix, infill.suffix) != (0, 0):  # both forms look alike where there is nothing around
                assert form == infill.form or infill.prefix == 0
            if form == "PSM":
                assert sum(parts) == infill.prefix + infill.middle + infill.suffix
            seen[infill.form] += 1
        assert start == SEQ + 1
    share = sum(seen.values()) / eligible
    assert 0.5 < share < 0.7 and 0.35 < seen["SPM"] / sum(seen.values()) < 0.65, (seen, eligible)


def test_batches_are_the_samples_one_by_one_in_any_cut(prefix: str) -> None:
    """So a resume, another batch size or another number of ranks changes nothing; another seed and epoch do."""
    data = open_data(prefix, document_mask=True)
    whole = data.read(40, 24)
    assert whole.windows is not None
    for i in range(24):
        assert np.array_equal(whole.windows[i], data.tokens(40 + i))
    parts = [open_data(prefix, document_mask=True).read(40 + i, 6) for i in (18, 6, 0, 12)]
    found = [part.windows for part in (parts[2], parts[1], parts[3], parts[0])]
    assert np.array_equal(np.concatenate([x for x in found if x is not None]), whole.windows)
    plain = TrainData({prefix: 1.0}, SEQ, 3, document_mask=True)
    assert data.sample_ids(0, 64) == plain.sample_ids(0, 64)
    expected = plain.read(40, 24)
    assert isinstance(whole.documents, np.ndarray) and isinstance(expected.documents, np.ndarray)
    assert np.array_equal(whole.documents, expected.documents)
    assert not np.array_equal(whole.windows, expected.windows)
    assert not np.array_equal(open_data(prefix, seed=4).read(40, 24).windows, whole.windows)
    nothing = open_data(prefix, rate=0.0, document_mask=True).read(40, 24)
    assert np.array_equal(nothing.windows, expected.windows)


def test_another_epoch_has_other_cuts(prefix: str) -> None:
    data = open_data(prefix, rate=1.0)
    per_epoch = data.sources[0].num_tokens // SEQ
    cuts = [[(x.piece, x.form, x.prefix) for i in range(20) for x in data.infills(first + i)]
            for first in (0, 3 * per_epoch)]  # fmt: skip
    assert cuts[0] != cuts[1]


def test_draws_are_even_and_apart() -> None:
    draws = uniform(7, np.arange(2**13) // 8 + 2**40, np.arange(2**13) % 8)
    assert draws.shape == (4, 2**13) and draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(1) - 0.5).max() < 0.02 and np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.05
    assert len(np.unique(draws)) == draws.size
    assert not np.array_equal(draws, uniform(8, np.arange(2**13) // 8 + 2**40, np.arange(2**13) % 8))


def test_inspection_says_what_was_done(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(prefix, rate=1.0)
    (described,) = describe_samples(data, 5, 1)
    assert described["infills"] == [vars(infill) for infill in data.infills(5)] != []
    monkeypatch.setattr(TrainData, "_sample", None)  # reads tokens, of which nothing is said here
    assert "infills" not in describe_samples(TrainData({prefix: 1.0}, SEQ, 3), 5, 1)[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.add_special_tokens(["<s>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def config_of(fim: Any, tokenizer: Path | None) -> Config:
    data = {"train": {"p": 1.0, "q": 1.0}, "fim": fim}
    path = None if tokenizer is None else str(tokenizer)
    return config_from_tree({
        "model": dict(hidden_size=8, ffn_hidden_size=8, num_layers=1, num_attention_heads=1, num_query_groups=1),
        "data": data, "tokenizer": {"path": path}, "train": dict(num_steps=1, micro_batch_size=1, global_batch_size=1),
    })  # fmt: skip


def test_sentinels_are_tokens_of_the_tokenizer(tokenizer: Path) -> None:
    config = config_of({"q": {"rate": 0.9}}, tokenizer)
    config.data.check()
    assert open_fim(config) == {"q": FillInTheMiddle(0.9, 0.5, (3, 4, 5), 2, None)}
    assert open_fim(config, load_tokenizer(tokenizer)) == open_fim(config)
    assert config_from_tree(config_to_tree(config)) == config
    assert open_fim(config_of(None, None)) == {}


@pytest.mark.parametrize(
    ("fim", "with_tokenizer", "code", "named"),
    [
        ({"q": {"middle": "<|fim_middle|>"}}, True, "E268", "data.fim[q].middle=<|fim_middle|>"),
        ({"q": {"suffix": "<s>"}}, True, "E268", "data.fim[q].suffix=<s> is bos of"),
        ({"q": {}}, False, "E268", "tokenizer.path"),
        ({"r": {}}, True, "E204", "data.fim[r]"),
        ({"q": {"rate": 1.5}}, True, "E204", "data.fim[q].rate=1.5"),
        ({"q": {"prefix": "<fim_suffix>"}}, True, "E204", "three tokens"),
        ({"q": {"spm": 0.5}}, True, "E202", "data.fim[q].spm_rate"),
        ({"q": 0.5}, True, "E203", "data.fim[q]"),
        ("q", True, "E203", "{prefix: {rate: 0.5, ...}}"),
    ],
)
def test_what_is_refused(fim: Any, with_tokenizer: bool, code: str, named: str, tokenizer: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config = config_of(fim, tokenizer if with_tokenizer else None)
        config.data.check()
        open_fim(config)
    assert caught.value.code == code and named in str(caught.value)
