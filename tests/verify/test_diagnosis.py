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
from megatron_hammer.verify.compare import BOUNDS, Evidence
from megatron_hammer.verify.diagnosis import ONLY_IN_STEPS, diagnose
from megatron_hammer.verify.outcome import Outcome, TensorPiece
from megatron_hammer.verify.patterns import first_in_backward, in_sum, shifts, whose
from megatron_hammer.verify.shrink import shrink
from tests.distributed import run_distributed
from tests.model.tiny import tiny_config
from tests.verify.seeded import faulty_steps
from tests.verify.seeded_parts import proof_with

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
    piece = lambda rows: TensorPiece("gradient", "w", (4, 8), (0, 5), whole[rows])  # noqa: E731
    assert shifts(piece([6, 7, 8, 9]), whole) == "each is that of 2 rows further on"
    assert shifts(piece([7, 6, 5, 4]), whole) == "row 4 has the values of row 7, and others likewise"
    assert shifts(TensorPiece("gradient", "w", (4, 8), (0, 5), whole[4:8] + 0.1), whole) == ""


def test_what_no_rank_holds_ends_no_diagnosis() -> None:
    """Nor do values that are no numbers: the findings must be printed whatever is wrong."""
    config, expected, initial = one_process("TP 2 x DP 2")
    no_numbers = [dataclasses.replace(p, values=p.values * np.nan) for p in expected.pieces]
    of_gradients = [n if n.kind == "gradient" else p for n, p in zip(no_numbers, expected.pieces, strict=True)]
    for pieces in (expected.pieces[::2], no_numbers, of_gradients):
        damaged = dataclasses.replace(expected, pieces=pieces)
        assert isinstance(diagnose(Evidence(config, 4, [damaged] * 4, expected, initial, BOUNDS["fp64"])), list)
    losses, points = expected.token_losses.copy(), {name: at.copy() for name, at in expected.points.items()}
    losses[5] = points["layers.1.mlp"][5] = np.nan
    damaged = dataclasses.replace(expected, token_losses=losses, points=points)
    (*_, said) = diagnose(Evidence(config, 4, [damaged] * 4, expected, initial, BOUNDS["fp64"]))
    assert "right up to layers.1.mlp_norm and wrong from layers.1.mlp on: they are not finite for 1 of " in said
    first, second = expected.in_steps
    in_step = [dataclasses.replace(first, token_losses=losses, points=points), second]
    damaged = dataclasses.replace(expected, in_steps=in_step)
    found = diagnose(Evidence(config, 4, [damaged] * 4, expected, initial, BOUNDS["fp64"]))
    assert (found[0], found[-1]) == (ONLY_IN_STEPS, said)


@pytest.mark.parametrize("layout", ["TP 2 x DP 2", "Muon"])
def test_a_second_step_that_no_fault_explains(layout: str) -> None:
    config, expected, initial = one_process(layout)
    noise = np.random.default_rng(7)
    pieces = [
        dataclasses.replace(p, values=p.values + noise.normal(size=p.values.shape)) if p.kind == "exp_avg" else p
        for p in expected.pieces
    ]
    damaged = dataclasses.replace(expected, pieces=pieces)
    (*_, said) = diagnose(Evidence(config, 4, [damaged] * 4, expected, initial, BOUNDS["fp64"]))
    assert said == "the first step is right, and exp_avg after the second are not: its gradients, or its update"


# ---- real ranks -----------------------------------------------------------------------------------------------------

TP_DP = dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
CP_DP = dict(parallel__context_parallel_size=2)
LAYOUTS = {"TP 2 x DP 2": TP_DP, "documents": TP_DP | dict(data__attention_mask="document"), "CP 2 x DP 2": CP_DP,
           "weights": TP_DP | dict(parallel__shard="weights"),
           "Muon": TP_DP | dict(optimizer__style="muon")}  # fmt: skip


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
    return diagnose(Evidence(config, 4, ranks, expected, initial, BOUNDS["fp64"]))


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
    ("TP 2 x DP 2", "never gathered", "shards are right before the first step, and what is gathered of them is not"),
    ("TP 2 x DP 2", "first bucket never gathered", "of before an update: not gathered after it"),
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
    ("weights", "not there in time", "a forward alone is right, and that of the first step is not"),
    ("weights", "not there in time", "only losses of tokens of micro-batch 2 are wrong"),
    ("weights", "not there in time", "the numbers are those where layer 1 adds nothing"),
    ("weights", "rolled for backward", "backward is right up to model.layers.1.mlp.down_proj.weight"),
    ("TP 2 x DP 2", "z-loss twice", "of what train.z_loss adds to the loss: all gradients are there, 2 times"),
    (
        "TP 2 x DP 2",
        "borders of shards",
        "the first or last ones of what a rank has of a tensor: the borders of shards",
    ),
    ("TP 2 x DP 2", "divisor of before", "gradients in the second update are "),
    ("TP 2 x DP 2", "first losses reported", "what is reported of losses is not: their sum or count"),
]
IN_EACH_RUN = ("none", "padding", "replica twice", "norms decay", "early", "z-loss twice")


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


# ---- whole proofs ---------------------------------------------------------------------------------------------------

PP = dict(parallel__pipeline_model_parallel_size=2, model__num_layers=8)
TREE = dict(train__deterministic_reduction="tree", train__micro_batch_size=1)
MUON = dict(optimizer__style="muon", parallel__shard="gradients")
WHOLE: dict[str, tuple[int, dict[str, object]]] = {
    "TP 2 x DP 2": (4, TP_DP),
    "TP 2 without SP": (4, dict(parallel__tensor_model_parallel_size=2)),
    "biases": (4, TP_DP | dict(model__qkv_bias=True, model__attention_output_bias=True, model__mlp_bias=True)),
    "TP 4": (4, dict(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True)),
    "PP 2 x DP 2": (4, PP),
    "interleaved, documents": (4, PP | dict(parallel__virtual_pipeline_stages=2, data__attention_mask="document")),
    "PP 2, tied": (4, PP | dict(model__tie_word_embeddings=True)),
    "interleaved by 3": (2, PP | dict(parallel__virtual_pipeline_stages=3)),
    "CP 2, documents": (4, CP_DP | dict(data__attention_mask="document")),
    "DP 4": (4, {}),
    "DP 4 in pairs": (4, dict(parallel__shard_size=2)),
    "Muon": (4, TP_DP | MUON),
    "Muon, TP 4": (4, dict(parallel__tensor_model_parallel_size=4, optimizer__style="muon")),
    "tree": (2, TREE | dict(train__global_batch_size=12)),
    "tree of 4": (4, TREE | dict(train__global_batch_size=16)),
}
SAID_OF_PROOFS = [
    *((layout, "none", "") for layout in WHOLE),
    ("TP 2 x DP 2", "rows of ranks", "wrong from layers.0.attention on: they are those of other tokens, of token 16"),
    ("TP 2 x DP 2", "own rows", "gradients of gate_proj, k_proj, q_proj, up_proj, v_proj alone are wrong"),
    ("TP 2 x DP 2", "up of another rank", "right up to layers.0.mlp_norm and wrong from layers.0.mlp on"),
    ("TP 2 x DP 2", "other ranks' tokens", "hidden states are wrong from embedding on"),
    ("TP 2 x DP 2", "exponentials", "hidden states are right: what is wrong is the head, the loss or the labels"),
    ("TP 2 x DP 2", "own clipping", "gradients in the update are multiples of what they should be"),
    ("TP 2 x DP 2", "decay twice", "weights decay twice"),
    ("TP 2 x DP 2", "seed of a rank", "initialisation: they are not what train.seed gives"),
    ("TP 2 x DP 2", "seed of a rank", "weights before the first step are wrong on tensor-parallel rank 1"),
    ("TP 2 x DP 2", "source of a rank", "tokens are counted to another source"),
    ("TP 2 x DP 2", "moments in the file", "it has the values of exp_avg_sq"),
    ("TP 2 x DP 2", "moments in the file", "the ranks' states are right, and what a checkpoint has of them is not"),
    ("TP 2 without SP", "norms summed", "gradients are 2 times what they should be"),
    ("biases", "bias on each rank", "the biases of o_proj and down_proj are added on each tensor-parallel rank"),
    ("TP 4", "keys not summed", "the sum over tensor-parallel ranks is missing"),
    ("TP 4", "keys summed over TP", "those of each query group are the sum over all of them"),
    ("TP 4", "groups in turn", "copies of key and value heads are on ranks in turn, not on neighbours"),
    ("TP 4", "groups of the next rank", "ranks have the key and value heads of the next rank"),
    ("DP 4", "updates in the file", "it is 1 after 2 updates"),
    ("DP 4", "decay twice at the border", "weights decay twice"),
    ("DP 4 in pairs", "copies averaged", "all gradients are there, 0.5 times"),
    ("interleaved by 3", "stages of a rank", "the stages of this rank have the layers 0, 4, 5, 2, in this order"),
    ("CP 2, documents", "dealt otherwise", "ranks divide samples otherwise than one another"),
    ("TP 4", "copies of keys counted", "with copies of keys and values counted several times"),
    ("TP 4", "copies of keys counted", "it cannot be written: model.layers.0.self_attn.k_proj.weight is saved twice"),
    ("PP 2 x DP 2", "gradients exchanged", "behind the border of two pipeline stages"),
    ("PP 2 x DP 2", "branch lost", "behind the border of two pipeline stages"),
    ("PP 2 x DP 2", "labels before", "labels are those of other micro-batches"),
    ("interleaved, documents", "overwritten sums", "the last micro-batch alone is in the gradients"),
    (
        "PP 2, tied",
        "tied begins otherwise",
        "weights before the first step of embed_tokens alone are wrong",
    ),
    (
        "CP 2, documents",
        "labels of a share",
        "hidden states are right: what is wrong is the head, the loss or the labels",
    ),
    ("DP 4", "samples of rank 0", "6 of 8 samples are read by no rank"),
    ("DP 4", "samples overlap", "are read by no rank"),
    ("DP 4", "a bucket not reduced", "gradients of lm_head alone are wrong"),
    ("DP 4", "a bucket not reduced", "the sum over data-parallel ranks is missing"),
    ("DP 4 in pairs", "copies not summed", "the sum over data-parallel ranks is missing"),
    ("Muon", "Nesterov", "Muon's momentum is not Nesterov's"),
    ("Muon", "other matrices", "Muon takes queries, keys and values head by head"),
    ("Muon, TP 4", "copies without direction", "as before the update but for their decay"),
    ("tree of 4", "tree in a row", "added in another order than that of the tree"),
    ("tree", "tree in another order", "added in another order than that of the tree"),
]


@cache
def said_of_proof(fault: str, layout: str) -> list[str]:
    ranks, changes = WHOLE[layout]
    config = tiny_config(**(dict(model__vocab_size=1001, train__z_loss=1e-3) | changes))
    proof = proof_with(fault, config, ranks)
    return proof.causes + [finding.cause or finding.what for finding in proof.findings]


def check_proof(layout: str, fault: str, sentence: str) -> None:
    said = said_of_proof(fault, layout)
    assert any(sentence in found for found in said) if sentence else not said, (layout, fault, said[:8])


def test_other_bits_than_those_of_the_tree_are_found() -> None:
    for fault in ("none", "tree in another order"):
        check_proof(*next(case for case in SAID_OF_PROOFS if case[:2] == ("tree", fault)))


@pytest.mark.slow
@pytest.mark.skipif(not ALL_FAULTS, reason="all seeded faults: HAMMER_SEEDED_FAULTS=1 tries them")
@pytest.mark.timeout(0)
def test_every_seeded_fault_of_a_proof_is_named() -> None:
    for layout, fault, sentence in SAID_OF_PROOFS:
        check_proof(layout, fault, sentence)
