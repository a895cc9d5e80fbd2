"""The proof of a layout: equal where nothing is wrong, and seeded faults, one at a time, found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.verify import parallel, steps
from megatron_hammer.verify.compare import (
    BOUNDS,
    NUMBER_BOUNDS,
    Deviation,
    LayoutSizes,
    compare_numbers,
    compare_pieces,
    compare_stages,
)
from megatron_hammer.verify.compare import whole_tensors as whole
from megatron_hammer.verify.outcome import Outcome, TensorPiece, read_outcome, write_outcome
from megatron_hammer.verify.reference import reference_steps
from megatron_hammer.verify.shrink import alone as alone_config
from megatron_hammer.verify.shrink import shrink
from megatron_hammer.verify.steps import take_steps
from megatron_hammer.verify.token_inputs import TokenInputs
from megatron_hammer.verify.tokens import compare_tokens
from tests.distributed import run_distributed
from tests.model.tiny import tiny_config
from tests.verify.seeded import faulty_steps

FP64 = torch.float64
SINGLE = ParallelContext.single()


def config_of(world_size: int = 4, **changes: Any) -> Config:
    """TP 2 with sequence parallelism x DP 2, shrunk."""
    layout = dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True, model__vocab_size=1001)
    small, left_out = shrink(tiny_config(**(layout | changes)), world_size)
    small.validate(world_size)
    assert not left_out
    return small


@cache
def references(mask: str) -> tuple[Outcome, Outcome]:
    """Our own one process, and transformers."""
    small = config_of(data__attention_mask=mask)
    ours, initial = parallel._one_process(small)
    return ours["fp64"], reference_steps(small, initial)


def found(fault: str, mask: str, shard: str = "optimizer") -> list[Deviation]:
    ranks = run_distributed(4, faulty_steps, config_of(data__attention_mask=mask, parallel__shard=shard), fault)
    ours, theirs = references(mask)
    findings: list[Deviation] = []
    for reference, bound in ((ours, BOUNDS["fp64"]), (theirs, parallel.AGAINST_TRANSFORMERS)):
        findings += compare_numbers(ranks, reference, NUMBER_BOUNDS["fp32"], LayoutSizes(2, 2, 2))[1]
        findings += compare_pieces(ranks, whole(reference.pieces), bound, LayoutSizes(2, 2, 2))[1]
    return findings


@pytest.mark.parametrize(
    "mask, shard",
    [("causal", "optimizer"), ("document", "optimizer"), ("document", "gradients"), ("causal", "weights")],
)
def test_without_a_fault_nothing_is_found(mask: str, shard: str) -> None:
    assert found("none", mask, shard) == []


@pytest.mark.parametrize(
    "fault, mask, what, cause",
    [
        ("norms", "causal", "gradient of model.layers.0.input_layernorm.weight", "their sum is missing"),
        ("times DP", "causal", "gradient norm of step 1", "times data_parallel_size=2"),
        ("accumulated twice", "causal", "gradient norm of step 1", "divided by data_parallel_size=2"),
        ("padding", "causal", "loss of step 1", ""),
        ("groups", "causal", "loss of step 1", ""),
        ("early", "causal", "model of lm_head.weight", ""),
        ("swapped", "causal", "model of ", ""),
        ("boundary", "document", "loss of step 1", ""),
        ("stretched", "causal", "gradient of model.layers.0.self_attn.q_proj.weight", ""),
        ("stretched", "document", "gradient of model.layers.1.self_attn.k_proj.weight", ""),
    ],
)
def test_a_seeded_fault_is_found_and_named(fault: str, mask: str, what: str, cause: str) -> None:
    findings = found(fault, mask)
    named = [finding for finding in findings if finding.what.startswith(what)]
    assert named and cause in named[0].cause, findings[:5]


def shared_config(mask: str) -> Config:
    """CP 2 and nothing else, shrunk."""
    return config_of(
        2,
        parallel__tensor_model_parallel_size=1,
        parallel__sequence_parallel=False,
        parallel__context_parallel_size=2,
        data__attention_mask=mask,
    )


@cache
def alone(mask: str) -> Outcome:
    return parallel._one_process(shared_config(mask))[0]["fp64"]


@pytest.mark.parametrize(
    "fault, mask, what, cause",
    [
        ("none", "causal", "", ""),
        ("none", "document", "", ""),
        ("times DP", "document", "gradient norm of step 1", "times context_parallel_size=2"),
        ("log CP", "causal", "loss of step 1", "off by log(context_parallel_size=2)"),
        ("positions of a share", "causal", "loss of ", "positions (RoPE)"),
        ("positions of a share", "document", "loss of ", "positions (RoPE)"),
        ("boundary of a share", "document", "loss of ", "a boundary of documents"),
        ("keys of a share", "causal", "loss of ", "the order of gathered keys"),
        ("first key of a share missing", "document", "loss of ", "missing keys"),
        (
            "key gradients",
            "causal",
            "gradient of model.layers.1.self_attn.k_proj.weight",
            "of keys and values is missing",
        ),
        (
            "key gradients",
            "document",
            "gradient of model.layers.1.self_attn.v_proj.weight",
            "of keys and values is missing",
        ),
    ],
)
def test_faults_of_context_parallelism(fault: str, mask: str, what: str, cause: str) -> None:
    config, sizes = shared_config(mask), LayoutSizes(1, 1, 2, 2)
    ranks, reference = run_distributed(2, faulty_steps, config, fault), alone(mask)
    findings = compare_tokens(ranks, reference, TokenInputs.of(config).positions.ravel(), BOUNDS["fp64"], sizes)[1]
    findings += compare_numbers(ranks, reference, NUMBER_BOUNDS["fp32"], sizes)[1]
    findings += compare_pieces(ranks, whole(reference.pieces), BOUNDS["fp64"], sizes)[1]
    if fault == "none":
        assert findings == [] and sorted(np.concatenate([r.tokens for r in ranks])) == list(
            range(len(reference.tokens))
        )
    else:
        assert any(f.what.startswith(what) and cause in f.cause for f in findings), findings[:5]


@pytest.mark.parametrize(
    "fault, shard, what",
    [
        ("swapped", "gradients", "model of "),
        ("swapped", "weights", "loss of step 1"),
        ("overwritten", "weights", "loss of step 1"),
        ("released", "gradients", "gradient of lm_head.weight"),
        ("norms", "weights", "gradient of model.layers.0.input_layernorm.weight"),
    ],
)
def test_a_seeded_fault_of_sharding_is_found_and_named(fault: str, shard: str, what: str) -> None:
    findings = found(fault, "causal", shard)
    assert any(finding.what.startswith(what) for finding in findings), findings[:5]


@pytest.mark.parametrize("fault", ["none", "shards alone", "owner"])
def test_faults_of_muon(fault: str) -> None:
    """Sharded weights and tensor parallelism, so that matrices are cut in rows, columns and within rows."""
    config = config_of(parallel__shard="weights", optimizer__style="muon")
    ranks, ours = run_distributed(4, faulty_steps, config, fault), take_steps(alone_config(config), SINGLE, FP64)
    worst, findings = compare_pieces(ranks, whole(ours.pieces), BOUNDS["fp64"], LayoutSizes(2, 2, 2))
    if fault == "none":
        assert findings == [] and worst["weight"] < 1e-12
    else:
        named = [finding for finding in findings if finding.what.startswith("weight of model.layers.0.self_attn.")]
        assert named and named[0].difference > 0.01, findings[:3]


def test_positions_that_all_shift_are_no_fault() -> None:
    """RoPE is relative: the proof compares what is computed, not how."""
    assert [f for f in found("shifted", "causal") if f.difference > 1e-6] == []


@cache
def pipelined() -> tuple[Config, Outcome]:
    """Two stages on each of PP 2, DP 2, a tied embedding; and one process of that."""
    layout = dict(parallel__pipeline_model_parallel_size=2, parallel__virtual_pipeline_stages=2)
    small, _ = shrink(tiny_config(**layout, model__tie_word_embeddings=True, model__num_layers=8), 4)
    small.validate(4)
    return small, parallel._one_process(small)[0]["fp64"]


@pytest.mark.parametrize(
    "fault, what, cause",
    [
        ("none", "", ""),
        ("stages", "order of the stages", "on pipeline ranks 0 1: stages are swapped"),
        (
            "tied twice",
            "gradient of model.embed_tokens.weight",
            "done twice; first and last stag",
        ),
        ("tied never", "gradient of model.embed_tokens.weight", "their sum is missing; first and last stage"),
    ],
)
def test_faults_of_a_pipeline(fault: str, what: str, cause: str) -> None:
    config, expected = pipelined()
    ranks, sizes = (
        run_distributed(4, faulty_steps, config, fault),
        LayoutSizes(1, 2, 2, pp=2, stages_per_rank=2, tied=True),
    )
    findings = compare_stages(ranks, sizes) + compare_numbers(ranks, expected, NUMBER_BOUNDS["fp64"], sizes)[1]
    findings += compare_pieces(ranks, whole(expected.pieces), BOUNDS["fp64"], sizes)[1]
    if fault == "none":
        assert findings == []
        return
    named = [finding for finding in findings if finding.what == what]
    assert named and cause in named[0].cause, findings[:5]


# ---- on GPUs, as far as CPUs can say ---------------------------------------------------------------------------------


@cache
def as_on_gpus(precision: str) -> tuple[Config, Outcome]:
    """What ``--gpu`` runs, but for the device; and the one process that it is held against."""
    layout = dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True, model__vocab_size=1001)
    small, left_out = shrink(tiny_config(**layout, train__precision=precision), 4, on_gpus=True)
    assert small.train.device == "cuda" and small.train.precision == precision and not left_out
    small = dataclasses.replace(small, train=dataclasses.replace(small.train, device="cpu"))
    return small, parallel._one_process(small)[0]["fp32"]


@pytest.mark.parametrize(
    "precision, fault, named",
    [
        ("bf16", "none", ""),
        ("fp16", "none", ""),
        ("bf16", "swapped", "model of "),
        ("bf16", "norms", "gradient of model.layers.0.input_layernorm.weight"),
        ("bf16", "times DP", "gradient norm of step 1"),
        ("bf16", "groups", "gradient of model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_sixteen_bits_hide_no_fault(precision: str, fault: str, named: str) -> None:
    config, expected = as_on_gpus(precision)
    (name, dtype), *others = steps.precisions(config).items()
    ranks, sizes = run_distributed(4, faulty_steps, config, fault, dtype), LayoutSizes(2, 2, 2)
    findings = compare_numbers(ranks, expected, NUMBER_BOUNDS[name], sizes)[1]
    findings += compare_pieces(ranks, whole(expected.pieces), BOUNDS[name], sizes)[1]
    assert name == precision and not others
    assert not findings if fault == "none" else any(f.what.startswith(named) for f in findings), findings[:5]


@pytest.mark.parametrize(
    "gpus, rule", [(0, r"E204\]: --gpu needs GPUs"), (1, r"E205\]: --nproc=2 is more ranks than the 1 GPU")]
)
def test_a_proof_on_gpus_needs_them(gpus: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not run on CPUs and say that GPUs were proved."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=rule):
        parallel.prove_layout(tiny_config(parallel__tensor_model_parallel_size=2), 2, lambda text: None, on_gpus=True)


# ---- causes by themselves -------------------------------------------------------------------------------------------


def _pieces(values: np.ndarray, kind: str = "gradient") -> list[TensorPiece]:
    return [TensorPiece(kind, "w", (0, len(values)), (0, values.shape[1]), values)]


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda w: w * 8, "times data_parallel_size=8"),
        (lambda w: w / 4, "divided by tensor_model_parallel_size=4"),
        (lambda w: w * 1.5, "all of it times 1.5"),
        (lambda w: w[::-1], "right values in another place"),
        (lambda w: w * 0, "it is zero"),
        (lambda w: w + np.eye(*w.shape)[:, ::-1] * (np.arange(len(w)) == 3)[:, None], "1 of 16 rows differ (3)"),
        (lambda w: w * np.nan, ""),
    ],
)
def test_causes(change: Callable[[np.ndarray], np.ndarray], cause: str) -> None:
    expected = np.random.default_rng(1).normal(size=(16, 16))
    outcome = Outcome([], [], _pieces(np.ascontiguousarray(change(expected))))
    _, findings = compare_pieces([outcome], {("gradient", "w"): expected}, 1e-10, LayoutSizes(4, 8, 2))
    assert len(findings) == 1 and cause in findings[0].cause, findings


def test_what_no_rank_holds_is_a_finding() -> None:
    outcome = Outcome([], [], [TensorPiece("weight", "w", (0, 3), (0, 4), np.ones((3, 4)))])
    _, findings = compare_pieces([outcome], {("weight", "w"): np.ones((5, 4))}, 1e-10, LayoutSizes(1, 1, 1))
    assert [f.cause for f in findings] == ["8 of 20 elements are on no rank"]


def test_a_loss_with_too_many_ranks_in_its_sum() -> None:
    _, findings = compare_numbers(
        [Outcome([5 + np.log(2)], [], [])], Outcome([5.0], [], []), 1e-6, LayoutSizes(2, 4, 1)
    )
    assert "off by log(tensor_model_parallel_size=2)" in findings[0].cause


@pytest.mark.parametrize(
    "loss, of_sources, cause",
    [
        (5.0, [5.5, 4.5], "the loss of the step is right: tokens are counted to another source"),
        (5.2, [4.3, 6.1], ""),
        (np.nan, [np.nan, np.nan], ""),
        (10.0, [8.0, 12.0], "times data_parallel_size=2"),
        (5 + np.log(4), [4 + np.log(4), 6 + np.log(4)], "off by log(tensor_model_parallel_size=4)"),
    ],
)
def test_tokens_of_another_source_leave_the_loss_what_it_is(loss: float, of_sources: list[float], cause: str) -> None:
    right, found = (Outcome([a], [], [], source_losses=[b]) for a, b in ((5.0, [4.0, 6.0]), (loss, of_sources)))
    _, findings = compare_numbers([right, found], right, 1e-6, LayoutSizes(4, 2, 1))
    causes = [finding.cause for finding in findings if finding.what.startswith("loss of source")]
    assert len(causes) == 2 and all(cause in named and bool(cause) == bool(named) for named in causes), findings


def test_an_outcome_comes_back_from_its_files(tmp_path: Path) -> None:
    config, _ = shrink(tiny_config(), 1)
    outcome = take_steps(config, ParallelContext.single(), FP64)
    write_outcome(tmp_path / "a", outcome)
    back = read_outcome(tmp_path / "a")
    assert (back.losses, back.norms, len(back.pieces)) == (outcome.losses, outcome.norms, len(outcome.pieces))
    for a, b in zip(back.pieces, outcome.pieces, strict=True):
        assert (a.kind, a.tensor, a.rows, a.cols) == (b.kind, b.tensor, b.rows, b.cols)
        assert np.array_equal(a.values, b.values)
    assert back.points.keys() == outcome.points.keys() and len(back.points) > 5 and back.refused == outcome.refused
    for name, values in [("", outcome.point_tokens), *outcome.points.items()]:
        assert np.array_equal(back.points[name] if name else back.point_tokens, values)
    assert len(back.in_steps) == 2 and all(forward.is_whole for forward in back.in_steps)
    assert np.array_equal(back.in_steps[1].token_losses, outcome.in_steps[1].token_losses)
    assert back.in_steps[0].points.keys() == outcome.points.keys()
    assert np.allclose(back.of_step(1).token_losses, outcome.token_losses, rtol=1e-12)


# ---- shrinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, changes",
    [
        (1, {}),
        (8, dict(parallel__tensor_model_parallel_size=8, parallel__sequence_parallel=True)),
        (4, dict(model__tie_word_embeddings=True, data__attention_mask="document", train__global_batch_size=16)),
        (2, dict(train__recompute="full", train__recompute_layers=2, model__head_dim=24)),
        (2, dict(kernels__adamw="torch", train__precision="bf16")),
        (2, dict(data__train={"a": 1.0}, data__fim={"a": {"rate": 0.5}}, data__order="megatron")),
        (2, dict(data__valid={"v": "v"}, train__evaluator={"interval_steps": 5}, checkpoint__save_interval_steps=5)),
    ],
)
def test_a_small_config_keeps_the_structure(world_size: int, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    small, left_out = shrink(config, world_size)
    small.validate(world_size)
    for name in ("num_attention_heads", "query_groups", "tie_word_embeddings", "rope_scaling", "norm_eps"):
        assert getattr(small.model, name) == getattr(config.model, name)
    assert small.grid(world_size) == config.grid(world_size)
    assert small.parallel.sequence_parallel == config.parallel.sequence_parallel
    assert (small.train.recompute, small.data.attention_mask) == (config.train.recompute, config.data.attention_mask)
    assert (small.grad_accum(world_size) > 1) == (config.grad_accum(world_size) > 1)
    padding = 128 * config.parallel.tensor_model_parallel_size
    assert (small.model.vocab_size or 0) % padding == (config.model.vocab_size or 0) % padding
    assert left_out == (["kernels.adamw=torch", "train.precision=bf16"] if "kernels__adamw" in changes else [])


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks through the launcher, one of them with a checkpoint that differs: the table, and the exit codes."""
    config = tiny_config(parallel__tensor_model_parallel_size=2)
    proof = parallel.prove_layout(config, 2, lambda text: None)
    assert isinstance(proof, parallel.Proof) and not proof.findings, proof
    assert {(row[1], row[2]) for row in proof.rows} == {
        ("one process", "fp64"), ("one process", "fp32"), ("transformers", "fp64")}  # fmt: skip
    assert sum(row[0].startswith("checkpoint's") for row in proof.rows) == 3
    assert len(proof.table()) == len(proof.rows) + 1
