"""What a failed proof says of the cause: patterns in numbers, and seeded faults on real ranks, each with its sentence.

A few of the faults are tried in each run of the tests, with what they say; all of them, on their layouts, where
HAMMER_SEEDED_FAULTS=1 is set (a minute or two).
"""

from __future__ import annotations

import dataclasses
import os
from functools import cache

import numpy as np
import pytest

from megatron_hammer.config import Config
from megatron_hammer.parallel.grid import Grid
from megatron_hammer.verify import parallel
from megatron_hammer.verify.compare import BOUNDS
from megatron_hammer.verify.diagnosis import diagnose
from megatron_hammer.verify.outcome import Outcome, Piece
from megatron_hammer.verify.patterns import first_in_backward, in_sum, shifts, whose
from megatron_hammer.verify.shrink import shrink
from tests.distributed import run_distributed
from tests.model.tiny import tiny_config
from tests.verify.seeded import faulty_steps

ALL_FAULTS = os.environ.get("HAMMER_SEEDED_FAULTS", "")

# ---- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, said",
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], ""),
        ([1, 3, 5, 7], "tensor-parallel rank 1"),
        ([4, 5, 6, 7], "pipeline rank 1"),
        ([0, 1, 4, 5], "data-parallel rank 0"),
        ([5], "rank 5 alone"),
        ([0, 6], "ranks 0, 6 alone"),
    ],
)
def test_whose_ranks(wrong: list[int], said: str) -> None:
    assert whose(wrong, range(8), Grid(pp=2, dp=2, tp=2)) == said


LABELS = [(d, m, c) for d in range(2) for m in range(2) for c in range(2)]


@pytest.mark.parametrize(
    "count, said",
    [
        (lambda d, m, c: 4, "all gradients are there, 4 times"),
        (lambda d, m, c: d == 1, "the sum over data-parallel ranks is missing"),
        (lambda d, m, c: c == 0, "the sum over context-parallel ranks is missing"),
        (lambda d, m, c: d == 1 and c == 0, "the sum over data-parallel and context-parallel ranks is missing"),
        (lambda d, m, c: m == 1, "the last micro-batch alone is in the gradients"),
        (lambda d, m, c: m == 0, "in the gradients of each rank micro-batch 2 is missing"),
        (lambda d, m, c: 1 + (m == 0), "in the gradients of each rank micro-batch 1 counts 2 times"),
        (lambda d, m, c: 1 - 0.5 * (d == 0), "in the sum of gradients data-parallel rank 0 counts 0.5 times"),
        (
            lambda d, m, c: (d, m, c) != (0, 1, 1),
            "micro-batch 2 of data-parallel rank 0 and context-parallel rank 1",
        ),
    ],
)
def test_how_often_each_part_is_in_a_sum(count: object, said: str) -> None:
    times = np.array([float(count(*label)) for label in LABELS])  # type: ignore[operator]
    assert said in in_sum(times, LABELS, (1, 0, 0))


def test_where_backward_goes_wrong() -> None:
    layer = [f"{part}.weight" for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm")]
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in layer]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    said = {
        "backward is wrong from lm_head.weight on": {*names},
        "up to model.layers.1.mlp.down_proj.weight and wrong from model.layers.1.self_attn.o": {*names[:6], names[8]},
        "norms alone": {names[3], names[7]},
        "model.layers.0.self_attn.o_proj.weight alone is wrong": {names[1]},
        "what is added to its rows": {names[8]},
        "layer 1 alone is wrong": {*names[4:8]},
    }
    for sentence, wrong in said.items():
        assert sentence in first_in_backward(names, wrong)


def test_rows_of_another_place() -> None:
    whole = np.random.default_rng(0).normal(size=(12, 5))
    piece = lambda rows: Piece("gradient", "w", (4, 8), (0, 5), whole[rows])  # noqa: E731
    assert shifts(piece([6, 7, 8, 9]), whole) == "each is that of 2 rows further on"
    assert shifts(piece([7, 6, 5, 4]), whole) == "row 4 has the values of row 7, and others likewise"
    assert shifts(Piece("gradient", "w", (4, 8), (0, 5), whole[4:8] + 0.1), whole) == ""


def test_what_no_rank_holds_ends_no_diagnosis() -> None:
    """Nor do values that are no numbers: the findings must be printed whatever is wrong."""
    config, expected, initial = one_process("TP 2 x DP 2")
    for pieces in (expected.pieces[::2], [dataclasses.replace(p, values=p.values * np.nan) for p in expected.pieces]):
        damaged = dataclasses.replace(expected, pieces=pieces)
        assert isinstance(diagnose(config, 4, [damaged] * 4, expected, initial, BOUNDS["fp64"]), list)


# ---- real ranks -----------------------------------------------------------------------------------------------------

TP_DP = dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
CP_DP = dict(parallel__context_parallel_size=2)
LAYOUTS = {"TP 2 x DP 2": TP_DP, "documents": TP_DP | dict(data__attention_mask="document"), "CP 2 x DP 2": CP_DP,
           "weights": TP_DP | dict(parallel__shard="weights")}  # fmt: skip


@cache
def one_process(layout: str) -> tuple[Config, Outcome, dict[str, np.ndarray]]:
    config, _ = shrink(tiny_config(**LAYOUTS[layout], model__vocab_size=1001, train__z_loss=1e-3), 4)
    config.validate(4)
    alone, initial = parallel._one_process(config)
    return config, alone["fp64"], initial


@cache
def said_of(fault: str, layout: str) -> list[str]:
    config, expected, initial = one_process(layout)
    ranks = run_distributed(4, faulty_steps, config, fault)
    return diagnose(config, 4, ranks, expected, initial, BOUNDS["fp64"])


SAID = [
    ("TP 2 x DP 2", "none", ""),
    ("documents", "none", ""),
    ("CP 2 x DP 2", "none", ""),
    ("weights", "none", ""),
    ("TP 2 x DP 2", "norms", "gradients of all norms alone"),
    ("TP 2 x DP 2", "norms", "the sum over tensor-parallel ranks is missing"),
    ("TP 2 x DP 2", "times DP", "all gradients are there, 2 times"),
    ("TP 2 x DP 2", "padding", "the 23 padding rows of the vocabulary count in the loss"),
    ("TP 2 x DP 2", "groups", "key and value heads are in the reverse order"),
    ("TP 2 x DP 2", "early", "the second step computes with other weights"),
    ("TP 2 x DP 2", "swapped", "shards are swapped"),
    ("TP 2 x DP 2", "stretched", "positions (RoPE) go in steps of 2"),
    ("TP 2 x DP 2", "log CP", "off by log(tensor_model_parallel_size=2)"),
    ("TP 2 x DP 2", "overwritten sums", "the last micro-batch alone is in the gradients"),
    (
        "TP 2 x DP 2",
        "not zeroed",
        "the gradients of the first step, or parts of them, are still in those of the second",
    ),
    ("TP 2 x DP 2", "micro-batch twice", "micro-batch 1 counts 2 times"),
    ("TP 2 x DP 2", "replicas", "the sum over data-parallel ranks is missing"),
    ("TP 2 x DP 2", "replica twice", "data-parallel rank 1 counts 2 times"),
    ("TP 2 x DP 2", "input gradients", "where tensor-parallel ranks sum the gradients of a product's input"),
    ("TP 2 x DP 2", "a part of a sum", "the part of tensor-parallel rank 1 is missing in the sums"),
    ("TP 2 x DP 2", "embedding of a rank", "the rows of tensor-parallel rank 1 are missing in the embedding"),
    ("TP 2 x DP 2", "half a layer", "gradients of layer 0 alone"),
    ("TP 2 x DP 2", "gate and up", "mlp.gate_proj.weight has the values of model.layers.1.mlp.up_proj.weight"),
    ("TP 2 x DP 2", "rows moved", "each is that of 3 rows before"),
    ("TP 2 x DP 2", "RoPE of a rank", "from place 1 of their document on are wrong: positions (RoPE), or keys"),
    ("TP 2 x DP 2", "labels of a replica", "losses are wrong on data-parallel rank 1"),
    ("TP 2 x DP 2", "labels of a replica", "labels are one token too early"),
    ("TP 2 x DP 2", "samples twice", "a rank computes other samples than its own"),
    ("TP 2 x DP 2", "weight of a replica", "data-parallel rank 1 counts 2 times"),
    ("TP 2 x DP 2", "learning rate of a rank", "on rank 1 alone"),
    ("TP 2 x DP 2", "learning rate of a rank", "the learning rate is 2 times what it should be"),
    ("TP 2 x DP 2", "an update of a rank", "no second update reached them"),
    ("TP 2 x DP 2", "norms kept", "all norms alone"),
    ("TP 2 x DP 2", "norms kept", "no update reached them"),
    ("TP 2 x DP 2", "updates ahead", "the count of updates is one ahead"),
    ("TP 2 x DP 2", "not clipped", "gradients are not clipped"),
    ("TP 2 x DP 2", "norms decay", "norms and biases decay, too"),
    ("TP 2 x DP 2", "own norm", "that of its own shards: the sum over ranks is missing"),
    ("TP 2 x DP 2", "norm of TP", "its tensor-parallel group alone"),
    ("TP 2 x DP 2", "copies in the norm", "with those that several ranks hold counted several times"),
    ("TP 2 x DP 2", "never gathered", "of before an update: not gathered after it"),
    ("TP 2 x DP 2", "first bucket never gathered", "of lm_head alone"),
    ("documents", "boundary", "boundaries of documents are one token later"),
    ("documents", "boundary earlier", "boundaries of documents inside of samples are one token earlier"),
    ("documents", "documents ignored", "documents are not kept apart"),
    ("CP 2 x DP 2", "key gradients", "of the gradients of keys and values is missing"),
    ("CP 2 x DP 2", "positions of a share", "count the tokens of a context-parallel rank"),
    ("CP 2 x DP 2", "keys of a share", "the order of gathered keys"),
    ("CP 2 x DP 2", "replicas", "the sum over data-parallel and context-parallel ranks is missing"),
    ("weights", "overwritten", "layer 0 computes with the weights of layer 1"),
    ("weights", "released", "the last micro-batch alone is in the gradients"),
]
IN_EACH_RUN = ("none", "padding", "replica twice", "norms decay", "early")


def check(layout: str, fault: str, sentence: str) -> None:
    said = said_of(fault, layout)
    assert any(sentence in found for found in said) if sentence else not said, (layout, fault, said)


@pytest.mark.parametrize("fault", IN_EACH_RUN)
def test_a_seeded_fault_is_named(fault: str) -> None:
    for layout, seeded, sentence in SAID:
        if (layout, seeded) == ("TP 2 x DP 2", fault):
            check(layout, fault, sentence)


@pytest.mark.slow
@pytest.mark.skipif(not ALL_FAULTS, reason="all seeded faults: HAMMER_SEEDED_FAULTS=1 tries them")
@pytest.mark.timeout(0)
def test_every_seeded_fault_is_named() -> None:
    for layout, fault, sentence in SAID:
        check(layout, fault, sentence)
