"""What a rank holds: shares that make up the whole, for stages, matrices, heads and the padded vocabulary."""

from __future__ import annotations

import itertools

import pytest

from megatron_hammer.config import ModelConfig
from megatron_hammer.parallel.placement import Placement, padded_vocab_size, place


def model(**changes: int) -> ModelConfig:
    sizes = dict(
        hidden_size=64, ffn_hidden_size=176, num_layers=4, num_attention_heads=8, num_query_groups=2, vocab_size=301
    )
    return ModelConfig(**{**sizes, **changes})


def test_the_drawing() -> None:
    at = place(model(), 1, 2, stage=1, num_stages=2)
    assert (at.layers, at.heads, at.groups, at.ffn) == ((2, 4), (4, 8), (1, 2), (88, 176))
    assert at.has_head and not at.has_embedding


def test_one_rank_holds_everything() -> None:
    at = place(model())
    assert at == Placement((0, 4), True, True, (0, 8), (0, 2), True, 1, (0, 176), 0, 1, False)
    assert (at.layers_local, at.heads_local, at.groups_local, at.ffn_local, at.sequence_shards) == (4, 8, 2, 176, 1)
    assert at.vocab_rows(301) == (0, 301) and at.vocab_rows_local(301) == 384


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_shares_of_the_ranks_make_up_the_whole(tp: int, groups: int) -> None:
    sizes = model(num_query_groups=groups)
    ranks = [place(sizes, rank, tp) for rank in range(tp)]
    for name, total in {"heads": 8, "ffn": 176}.items():
        assert [i for at in ranks for i in range(*getattr(at, name))] == list(range(total))
    assert [i for at in ranks if at.owns_groups for i in range(*at.groups)] == list(range(groups))
    assert {at.groups_local for at in ranks} == {max(1, groups // tp)}
    for at in ranks:  # each query head finds its key and value heads on its own rank
        assert {head * groups // 8 for head in range(*at.heads)} <= set(range(*at.groups))
        assert at.kv_copies == sum(other.groups == at.groups for other in ranks)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 301, 1024, 1025])
def test_rows_of_the_vocabulary(tp: int, vocab_size: int) -> None:
    ranks = [place(model(), rank, tp) for rank in range(tp)]
    assert [i for at in ranks for i in range(*at.vocab_rows(vocab_size))] == list(range(vocab_size))
    for at in ranks:
        assert at.vocab_rows_local(vocab_size) * tp == padded_vocab_size(vocab_size, tp)
        start, stop = at.vocab_rows(vocab_size)
        assert stop - start <= at.vocab_rows_local(vocab_size)
        assert start == stop or start == at.tp_rank * at.vocab_rows_local(vocab_size)


@pytest.mark.parametrize("num_layers, num_stages", list(itertools.product((4, 5, 7), (1, 2, 3, 4))))
def test_stages_make_up_the_model(num_layers: int, num_stages: int) -> None:
    stages = [place(model(num_layers=num_layers), stage=i, num_stages=num_stages) for i in range(num_stages)]
    assert [i for at in stages for i in range(*at.layers)] == list(range(num_layers))
    assert [at.has_embedding for at in stages] == [i == 0 for i in range(num_stages)]
    assert [at.has_head for at in stages] == [i == num_stages - 1 for i in range(num_stages)]
    sizes = [at.layers_local for at in stages]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0


def test_sequence_shards() -> None:
    assert place(model(), 0, 4, sequence_parallel=True).sequence_shards == 4
    assert place(model(), 0, 4).sequence_shards == 1


def test_what_cannot_be_divided_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="8 cannot be divided over 3 ranks"):
        place(model(), 0, 3)
