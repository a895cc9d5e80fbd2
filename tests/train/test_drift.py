"""Bits that differ where ranks must hold the same: found, with parameter and ranks, and nothing is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import DriftError
from megatron_hammer.config import Config
from megatron_hammer.kernels.bit_hash import BLOCK, INTEGERS, BitHash
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.train.build import build
from megatron_hammer.train.drift import DriftCheck
from megatron_hammer.train.loop import TrainLoop
from tests.distributed import run_distributed
from tests.host_waits import OperationNames
from tests.model.tiny import make_context, tiny_config
from tests.train.runs import metrics, overrides, train_here

# ---- the hash -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parts_add_up_and_every_place_counts(dtype: torch.dtype) -> None:
    x = torch.randn(5 * BLOCK + 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    hashed = BitHash(torch.device("cpu"), len(x))
    whole = int(hashed(x))
    for cut in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5, len(x)):
        assert int(hashed(x[:cut]) + hashed(x[cut:], cut)) == whole, cut
    seen = {whole}
    bits = x.view(INTEGERS[x.element_size()])
    for i in (0, 1, BLOCK - 1, BLOCK, 3 * BLOCK, len(x) - 1):
        for bit in (0, 1, 8 * x.element_size() - 1):
            flip = torch.tensor(1, dtype=bits.dtype) << bit
            bits[i] ^= flip
            seen.add(int(hashed(x)))
            bits[i] ^= flip
    assert len(seen) == 1 + 6 * 3, "each flip is a hash of its own"
    assert int(hashed(x.roll(1))) not in seen and int(hashed(-x)) not in seen
    x[0], x[BLOCK] = x[BLOCK].clone(), x[0].clone()
    assert int(hashed(x)) not in seen, "two that change places"
    assert int(hashed(torch.zeros(9, dtype=dtype))) != int(hashed(-torch.zeros(9, dtype=dtype)))


# ---- one flipped bit ------------------------------------------------------------------------------------------------


def _tensor(optimizer: Optimizer, row: str, kind: str) -> Tensor | None:
    """What this rank has of a parameter: of the model's weight all, of the optimizer's state its part, if any."""
    if kind == "weight":
        names = [r.name for r in optimizer.store.table]
        return optimizer.store.weights[names.index(row)].detach().view(-1)
    shards = (s.tensors for s in optimizer.shards() if s.parameter.name == row)
    return next(shards, {}).get("weight" if kind == "master" else kind)


def _messages(rank: int, config: Config, flips: list[tuple[tuple[int, ...], str, str, int]]) -> list[str]:
    """What the check says of each flip (ranks: those that have it, parameter, kind, element), one at a time."""
    ctx = make_context(config)
    _, optimizer = build(config, ctx)
    drift = DriftCheck(config, optimizer, ctx)
    said = []
    for at, row, kind, element in flips:
        for flipped in (True, False):  # and back
            flat = _tensor(optimizer, row, kind) if rank in at else None
            if flat is not None:
                flat.view(INTEGERS[flat.element_size()])[element] ^= 1
            with OperationNames() as operations:
                report = drift.check(5)
            assert not operations.waits(), "nobody waits for the device"
            assert bool(report.found) == flipped, (at, row, kind)
            try:
                drift.raise_on(report)
            except DriftError as error:
                assert (error.code, error.exit_code) == ("E1101", 11)
                said.append(f"{error.what} {error.rule}")
    return said


NORM, THEIR_NORM = "layers.1.attention_norm.weight", "model.layers.1.input_layernorm.weight"
QKV, K_PROJ = "layers.0.attention.qkv.weight", "model.layers.0.self_attn.k_proj.weight"


def test_copies_of_tensor_parallel_ranks() -> None:
    """TP 4 on 2 query groups: norms on all ranks, key rows on ranks 0 and 1, and on 2 and 3; DP 1."""
    config = tiny_config(parallel__tensor_model_parallel_size=4, train__precision="bf16")
    key = 2 * 8 * 64 + 3  # of this rank's 2 query heads of 8 rows, then those of the key
    flips = [
        ((2,), NORM, "weight", 5),
        ((1,), NORM, "exp_avg_sq", 6),
        ((3,), QKV, "exp_avg", key),
        ((0,), QKV, "master", key),
    ]
    every = run_distributed(4, _messages, config, flips)
    assert all(said == every[0] for said in every), "all ranks raise the same"
    assert every[0] == [
        # The rank itself sees that its weight is not its master rounded, the others that it is not theirs.
        f"step 5: {THEIR_NORM} is not what its fp32 master rounds to, on rank 2 (and 1 more)",
        f"step 5: exp_avg_sq of {THEIR_NORM} on rank 1 is not what ranks 0, 2 and 3 hold",
        f"step 5: exp_avg of {K_PROJ}[8:16, 0:64] is not the same on ranks 2 and 3",
        f"step 5: master of {K_PROJ}[0:8, 0:64] is not the same on ranks 0 and 1",
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_copies_of_data_parallel_ranks(precision: str) -> None:
    """TP 2 x DP 2: a flip in what another rank updates, and one in a rank's own."""
    config = tiny_config(parallel__tensor_model_parallel_size=2, train__precision=precision)
    names = "embedding.weight", "model.embed_tokens.weight"  # the last of the buffers: its last rows are DP rank 1's
    flips = [((0,), names[0], "weight", 190 * 64), ((3,), "head.weight", "weight", 7), ((0, 2), NORM, "exp_avg", 0)]
    every = run_distributed(4, _messages, config, flips)
    assert all(said == every[0] for said in every)
    embedding, head, norm = every[0]
    assert embedding == f"step 5: {names[1]}[0:256, 0:64] on rank 0 is not what rank 2 holds"
    assert head == "step 5: lm_head.weight[256:301, 0:64] on rank 3 is not what rank 1 holds"
    assert norm.startswith(f"step 5: exp_avg of {THEIR_NORM} is not the same on ranks ")


def test_copies_of_stages_and_of_context_parallel_ranks() -> None:
    """A tied embedding on the first and the last stage, and a weight of two ranks with other parts of a sample."""
    tied = tiny_config(parallel__pipeline_model_parallel_size=2, model__tie_word_embeddings=True)
    flips = [((0,), "embedding.weight", "weight", 9), ((1,), "head.weight", "exp_avg_sq", 70)]
    every = run_distributed(2, _messages, tied, flips)
    name = "model.embed_tokens.weight[0:301, 0:64]"
    assert every[0] == every[1] == [
        f"step 5: {name} is not the same on ranks 0 and 1",
        f"step 5: exp_avg_sq of {name} is not the same on ranks 0 and 1",
    ]  # fmt: skip
    split = tiny_config(parallel__context_parallel_size=2, data__attention_mask="document")
    every = run_distributed(2, _messages, split, [((1,), NORM, "weight", 3)])
    assert every[0] == every[1] and every[0][0].startswith(f"step 5: {THEIR_NORM} ")


# ---- a run ----------------------------------------------------------------------------------------------------------


def _run_with_flip(rank: int, arguments: list[str], method: str, step: int) -> str:
    """The error of a run on whose rank 1 a bit of a weight flips before that method of the loop in that step."""
    original = getattr(TrainLoop, method)

    def flipping(run: TrainLoop, *args: object, **more: object) -> object:
        if rank == 1 and run.state.step == step:
            run.optimizer.store.weights[1].detach().view(-1).view(torch.int16)[3] ^= 1
        return original(run, *args, **more)

    setattr(TrainLoop, method, flipping)
    try:
        return f"exit code {train_here(rank, arguments)}"
    except DriftError as error:
        return str(error)
    finally:
        setattr(TrainLoop, method, original)


def _saved(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def test_a_run_that_drifts_ends_on_all_ranks_and_saves_nothing(data: Path, tmp_path: Path) -> None:
    """Between two steps, where the check of an interval finds it; and after a step's update, before its save."""
    common = ("train.drift_check_interval_steps=5", "train.num_steps=6", "schedule.decay_steps=6")
    for method, step, said in (("_step", 4, "step 5: "), ("_save", 6, "step 6, not saved: ")):
        output = tmp_path / method
        first, second = run_distributed(2, _run_with_flip, overrides(data, output, *common), method, step)
        assert first == second and first.startswith(f"error[E1101]: {said}"), first
        assert "rank 1" in first and "input_layernorm" in first and "run the same command again" in first
        assert _saved(output) == ["step-00000003"]
        assert len(metrics(output)) == (4 if method == "_step" else 6)
    off = overrides(data, tmp_path / "off", *common, "train.drift_check_interval_steps=0")
    assert run_distributed(2, _run_with_flip, off, "_save", 6) == ["exit code 0"] * 2


def test_one_rank_in_fp32_has_nothing_in_common_and_nothing_to_check() -> None:
    config = tiny_config()
    assert config.train.drift_check_interval_steps == 100
    _, optimizer = build(config, make_context(config))
    drift = DriftCheck(config, optimizer, make_context(config))
    assert not drift.items and not drift.check(1).found
