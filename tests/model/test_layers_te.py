"""The Transformer Engine layers equal the torch layers on every layout.

Once on a contract double (te_double.py), which covers attention, fp8's regions and copies and a hostile ``main_grad``;
and once on the library's own Python code, fp8 included, over a stub of its C++ extension (te_sources.py). Neither has
the library's kernels: tests/test_gpu.py does, where it is installed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import Config
from megatron_hammer.kernels.attention import BACKENDS, causal_attention, each_document
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.libraries import te
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import select
from megatron_hammer.model.llama import build_stage
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import run_rank
from megatron_hammer.train.step import train_step
from tests.checkpoint.layouts import KINDS, config_tree
from tests.distributed import run_distributed
from tests.model import te_double, te_sources
from tests.model.tiny import (
    VARIANTS,
    build,
    logical_parts,
    make_context,
    merged,
    rank_batches,
    tiny_config,
    train,
)
from tests.train.runs import config_for, overrides, run, write_dataset

Trained = tuple[list[tuple[float, float, bool]], dict[str, Tensor], list[dict[str, Any]]]

# More ranks than query groups, sequence parallelism, data parallelism with shards that cut tensors, documents.
LAYOUTS = [(1, False, 1), (1, False, 2), (2, False, 1), (2, True, 1), (2, True, 2), (4, False, 1), (4, True, 1)]


def te_config(tp: int = 1, sp: bool = False, **changes: Any) -> Config:
    """A feed-forward width that fp8 takes on two ranks."""
    changes = {"kernels__layers": "te", "model__ffn_hidden_size": 192, **changes}
    return tiny_config(parallel__tensor_model_parallel_size=tp, parallel__sequence_parallel=sp, **changes)


def torch_config(config: Config) -> Config:
    """The same run on the torch layers, in one process."""
    plain = tiny_config(data__attention_mask=config.data.attention_mask, train__precision=config.train.precision)
    return dataclasses.replace(plain, model=config.model, optimizer=config.optimizer)


def _trained(rank: int, config: Config, steps: int) -> Trained:
    """Train on the double, its attention included, and say what it recorded (a group by its size)."""
    with te_double.installed() as events, pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hammer.train.build.select_operations", lambda *_: Operations(attention=te.attention))
        reports, parts = train(rank, config, steps)
        for event in events:
            for key in ("group", "tp_group"):
                if event.get(key) is not None:
                    event[key] = torch.distributed.get_world_size(event[key])
        return reports, parts, list(events)


def _equal(results: list[Trained], expected: tuple[list[Any], dict[str, Tensor]], tolerance: float = 1e-5) -> None:
    """As in test_parallel.py."""
    for reports, _, _ in results:
        for (loss, norm, applied), (loss_1, norm_1, _) in zip(reports, expected[0], strict=True):
            assert loss == pytest.approx(loss_1, rel=tolerance) and norm == pytest.approx(norm_1, rel=100 * tolerance)
            assert applied
    for name, tensor in merged([parts for _, parts, _ in results]).items():
        error = (tensor - expected[1][name]).norm() / expected[1][name].norm()
        assert error < 10 * tolerance, f"{name}: {error}"


@pytest.mark.parametrize(
    "tp, sp, dp, mask, variant",
    [(*layout, "causal", kind) for layout, kind in zip(LAYOUTS, [*list(VARIANTS)[1:], *VARIANTS], strict=True)]
    + [(*layout, "document", kind) for layout, kind in zip((LAYOUTS[0], *LAYOUTS[4:7:2]), VARIANTS)],
)
def test_training_equals_the_torch_layers(tp: int, sp: bool, dp: int, mask: str, variant: str) -> None:
    """Losses, norms and weights over 4 steps of several micro-batches, in fp32."""
    config = te_config(tp, sp, data__attention_mask=mask, **VARIANTS[variant])
    config.validate(tp * dp)
    results: list[Trained] = run_distributed(tp * dp, _trained, config, 4) if tp * dp > 1 else [_trained(0, config, 4)]
    _equal(results, train(0, torch_config(config), 4))
    linear = [e for e in results[0][2] if e["event"] == "linear"]
    batches = config.grad_accum(tp * dp)
    assert len(linear) == 4 * batches * 4 * config.model.num_layers, "every matrix product of the layers, no other"
    assert {e["tp_group"] for e in linear} == {tp if tp > 1 else None}
    assert {e["mode"] for e in linear} == ({"column", "row"} if tp > 1 else {None})
    added = [e for e in results[0][2] if e["event"] == "gradient"]
    assert len(added) == len(linear) and all(e["in_main_grad"] for e in added), "in the matrix product"
    per_step = [e["first"] for e in linear[: batches * 4 * config.model.num_layers]]
    assert per_step == [i == 0 for i in range(batches) for _ in range(4 * config.model.num_layers)]


@pytest.mark.parametrize("fp8", ["delayed", "current"])
@pytest.mark.parametrize("tp, sp, dp", [(1, False, 1), (2, True, 2)])
def test_fp8_runs_over_the_right_groups(tp: int, sp: bool, dp: int, fp8: str) -> None:
    """The double computes in full precision, so a stale copy of a weight would show; groups and regions are counted."""
    config = te_config(tp, sp, kernels__fp8=fp8, train__global_batch_size=8)
    results: list[Trained] = run_distributed(tp * dp, _trained, config, 4) if tp * dp > 1 else [_trained(0, config, 4)]
    _equal(results, train(0, torch_config(config), 4))
    recipe = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling"}[fp8]
    world = tp * dp if tp * dp > 1 else None
    for _, _, events in results:
        linear, regions = ([e for e in events if e["event"] == kind] for kind in ("linear", "region"))
        assert all(e["fp8"] and e["recipe"] == recipe and e["group"] == world for e in linear)
        assert [(e["recipe"], e["group"], e["modules"]) for e in regions] == [
            (recipe, world, 4 * config.model.num_layers)
        ] * (4 * config.grad_accum(tp * dp)), "one region a forward, over the world, around all layers"
    largest = [[e.get("largest") for e in events if e["event"] == "region"] for _, _, events in results]
    assert all(values == largest[0] for values in largest), "all ranks scale alike"
    assert (largest[0][0] is None) == (fp8 == "current")


def test_evaluation_is_not_in_fp8_and_keeps_no_copy() -> None:
    """Also right after a training step, whose copies of the weights are those before its update."""
    config = te_config(kernels__fp8="current")
    ctx = ParallelContext.single()
    with te_double.installed() as events:
        model, optimizer = build(config, ctx)
        batches = rank_batches(config, 1, ctx)
        train_step(model, optimizer, batches, config, 1, ctx)
        events.clear()
        with torch.no_grad():
            loss = model(batches[0].tokens, batches[0].labels).mean()
        assert not any(e["fp8"] or e["first"] is not None for e in events if e["event"] == "linear")
        assert not [e for e in events if e["event"] == "region"]
    reference, other = build(torch_config(config), ctx)
    train_step(reference, other, batches, config, 1, ctx)
    assert float(loss) == pytest.approx(
        float(reference(batches[0].tokens, batches[0].labels).mean().detach()), rel=1e-5
    )


def test_bf16_is_within_its_rounding() -> None:
    """The library's norm rounds once where the torch one rounds twice."""
    config = te_config(train__precision="bf16")
    expected, _ = train(0, torch_config(config), 5)
    reports, _, _ = _trained(0, config, 5)
    assert [r[0] for r in reports] == pytest.approx([r[0] for r in expected], rel=1e-2)


def test_gradients_overwrite_first_and_then_add_in_fp32() -> None:
    """Three equal micro-batches are exactly three times one, and nothing of before the step is left."""
    config = te_config(train__precision="bf16")
    ctx = ParallelContext.single()
    with te_double.installed():
        model, optimizer = build(config, ctx)
        batch = rank_batches(config, 1, ctx)[0]
        sums = {}
        for count in (3, 1):
            optimizer.store.grads.fill_(1e4)
            for i in range(count):
                optimizer.store.begin(first=i == 0, last=i == count - 1)
                model(batch.tokens, batch.labels).mean().backward()
            optimizer.store.reduce()
            sums[count] = {
                p.name: gradient.main_grad.clone()
                for p, gradient in zip(optimizer.store.table, optimizer.store.gradients, strict=True)
            }
    for name, once in sums[1].items():
        assert once.dtype == torch.float32 and 0 < once.norm() < 1e2, name
        assert torch.equal(sums[3][name], once + once + once), name
    for weight, gradient in zip(optimizer.store.weights, optimizer.store.gradients, strict=True):
        assert weight.grad is None
        assert gradient.main_grad.untyped_storage().data_ptr() == optimizer.store.grads.untyped_storage().data_ptr()


def _saved_by_one_and_loaded_by_the_other(rank: int, tp: int, sp: bool, first: str, folder: str) -> list[float]:
    """Two steps, save, load into the other kind of layers, two more; the same without the break must give the same."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    other = "torch" if first == "te" else "te"
    with te_double.installed():
        for broken in (True, False):
            config = te_config(tp, sp, kernels__layers=first)
            ctx = make_context(config)
            model, optimizer = build(config, ctx)
            for step in range(1, 5):
                if broken and step == 3:
                    path = save_checkpoint(folder, 2, optimizer.shards(), model=config.model, ctx=ctx,
                                           config_tree=config_tree(config.model), state=optimizer.scalar_state(),
                                           tokenizer=None)  # fmt: skip
                    model, optimizer = build(te_config(tp, sp, kernels__layers=other, train__seed=99), ctx)
                    manifest = read_manifest(path)
                    load_shards(manifest, optimizer.shards(), model=config.model, kinds=KINDS, ctx=ctx)
                    optimizer.load_scalar_state(manifest.state)
                    optimizer.copy_params_from_masters()
                report = train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx)
                losses[broken].append(float(report.loss))
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    return losses[True]


@pytest.mark.parametrize("first", ["te", "torch"])
def test_checkpoints_are_interchangeable(first: str, tmp_path: Path) -> None:
    alone = _saved_by_one_and_loaded_by_the_other(0, 1, False, first, str(tmp_path / "one"))
    sharded = run_distributed(2, _saved_by_one_and_loaded_by_the_other, 2, True, first, str(tmp_path / "two"))
    assert sharded[0] == pytest.approx(alone, rel=1e-5) and alone[-1] < alone[0]
    one, two = (read_manifest(tmp_path / name / "step-00000002") for name in ("one", "two"))
    assert one.index.keys() == two.index.keys()


def test_both_kinds_of_layers_have_one_tree_of_names() -> None:
    """Parameters, state dict and initial weights: the library's modules and their extra state stay out of sight."""
    config, ctx = te_config(), ParallelContext.single()
    with te_double.installed():
        ours, _ = build(config, ctx)
        raw = build_stage(config.model, ctx, kernels=config.kernels)
    theirs, _ = build(torch_config(config), ctx)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [*dict(ours.named_modules())] == [*dict(theirs.named_modules())]
    assert all(not w.any() for w in raw.parameters()), "weights are zero until they are initialised or loaded"
    for (name, a), (_, b) in zip(logical_parts(ours, config, ctx).items(), logical_parts(theirs, config, ctx).items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2), (4, 1)])
def test_attention_equals_the_reference(heads: int, groups: int) -> None:
    """Outputs and gradients, samples and documents; queries and keys come out of RoPE, values are a view."""
    lengths = [5, 1, 17, 9]
    documents = PackedSequences.from_cu_seqlens(np.cumsum([0, *lengths]).astype(np.int32), torch.device("cpu"))
    for shape, given in (((16, 2), None), ((32, 1), documents)):
        fused = torch.randn(*shape, heads + 2 * groups, 8, dtype=torch.float64, requires_grad=True)
        results = []
        with te_double.installed():
            for function in (te.attention, each_document if given else lambda q, k, v, _: causal_attention(q, k, v)):
                out = function(*fused.split((heads, groups, groups), dim=2), given)
                results.append((out, *torch.autograd.grad(out, fused, torch.ones_like(out).cumsum(-1))))
        for mine, reference in zip(*results, strict=True):
            assert torch.allclose(mine, reference, atol=1e-12), (heads, groups, given)


# ---- on the library's own Python code -----------------------------------------------------------------------------


def _on_sources(rank: int, root: Path, layouts: list[tuple[int, bool]], kinds: list[str]) -> list[Trained]:
    """Train on each layout, with one import of the library."""
    results: list[Trained] = []
    with te_sources.imported(root) as library:
        assert te.missing_names(library, te.USED) == [], "what a start would find"
        for (tp, sp), kind in zip(layouts, kinds, strict=True):
            reports, parts = train(rank, te_config(tp, sp, **VARIANTS[kind]), 4)
            results.append((reports, parts, []))
    return results


@pytest.mark.parametrize("world, layouts, kinds", [
    (2, [(1, False), (2, False), (2, True)], ["qwen2", "qwen3", "biases"]),
    (4, [(4, False), (2, True)], ["biases", "qwen3"]),
])  # fmt: skip
def test_training_on_the_library_s_own_code(
    world: int, layouts: list[tuple[int, bool]], kinds: list[str], sources: Path
) -> None:
    """Its Linear (autograd, collectives, main_grad) and RMSNorm, fp32, several micro-batches a step; each layout with
    another kind of model."""
    ranks = run_distributed(world, _on_sources, sources, layouts, kinds)
    for i, kind in enumerate(kinds):
        expected = train(0, torch_config(te_config(**VARIANTS[kind])), 4)
        _equal([results[i] for results in ranks], expected)


def _bf16_on_sources(rank: int, root: Path, config: Config) -> tuple[list[float], Tensor]:
    """Losses of 4 steps, and a weight's gradient in the optimizer's buffer."""
    with te_sources.imported(root):
        reports, _ = train(rank, config, 4)
        model, optimizer = build(config, ParallelContext.single())
        optimizer.store.begin(first=True, last=True)
        batch = rank_batches(config, 1, ParallelContext.single())[0]
        model(batch.tokens, batch.labels).mean().backward()
        return [r[0] for r in reports], model.layers["0"].mlp.down.gradient.main_grad.clone()


def test_bf16_on_the_library_s_own_code(sources: Path) -> None:
    """The weight's gradient reaches the buffer unrounded: fp32 sums of bf16 products."""
    config = te_config(train__precision="bf16")
    expected, _ = train(0, torch_config(config), 4)
    # In a process of the pool: this one has imported what the sources must not find (pydantic, by way of Ray).
    [(losses, gradient)] = run_distributed(1, _bf16_on_sources, sources, config)
    assert losses == pytest.approx([r[0] for r in expected], rel=1e-2)
    assert not torch.equal(gradient, gradient.bfloat16().float())


def _fp8_on_sources(rank: int, root: Path, config: Config) -> tuple[list[float], list[int], list[float]]:
    """Losses of 6 steps, sizes of the groups that reduced a tensor's own largest value, delayed scales at the end."""
    with te_sources.imported(root):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

        te_sources.AMAX_GROUPS.clear()
        reports, _ = train(rank, config, 6)
        scales = [x for buffer in State.quantization_state.global_scale_buffer.values() for x in buffer]
        return [r[0] for r in reports], sorted(set(te_sources.AMAX_GROUPS)), torch.cat([*scales, Tensor()]).tolist()


@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_fp8_on_the_library_s_own_code(fp8: str, sources: Path) -> None:
    """Its recipes, quantizers, copies of weights and reductions; the cast itself is ours, to torch's 8-bit types.

    A task that is learnt, within 3 % of bf16 and, divided over ranks, within 2 % of one rank: an 8-bit rounding is
    6 %, averaged over the terms of a product.
    """
    config = te_config(train__precision="bf16", kernels__fp8=fp8)
    config.validate(1)
    bf16, _ = train(0, torch_config(config), 6)
    [(losses, groups, _)] = run_distributed(1, _fp8_on_sources, sources, config)
    assert losses == pytest.approx([r[0] for r in bf16], rel=0.03) and losses != [r[0] for r in bf16] and not groups
    config = te_config(2, True, train__precision="bf16", kernels__fp8=fp8)
    config.validate(4)
    ranks = run_distributed(4, _fp8_on_sources, sources, config)
    assert ranks[0][0] == pytest.approx(losses, rel=0.02)
    tensor_parallel = [2] if fp8 == "current" else []  # gathered shards of one tensor have one scale
    assert all(groups == tensor_parallel for _, groups, _ in ranks)
    assert all(scales == ranks[0][2] for _, _, scales in ranks), "over the world, so on every rank the same"
    assert (len(set(ranks[0][2])) > 10) == (fp8 == "delayed")


def _region_on_sources(rank: int, root: Path, fp8: str) -> list[bool]:
    """What the library itself believes inside and outside of our region."""
    ctx = make_context(te_config(2))
    with te_sources.imported(root):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

        region = te.fp8_region(fp8, ctx.world)
        seen = [State.is_fp8_enabled()]
        for _ in range(2):  # entered once a forward
            with region():
                seen += [State.is_fp8_enabled(), State.get_fp8_group() is torch.distributed.group.WORLD]
                seen.append(State.get_fp8_recipe().delayed() == (fp8 == "delayed"))
        with torch.no_grad(), region():
            seen.append(State.is_fp8_enabled())
        return [*seen, State.is_fp8_enabled()]


@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_the_region_in_the_library_s_own_state(fp8: str, sources: Path) -> None:
    for seen in run_distributed(2, _region_on_sources, sources, fp8):
        assert seen == [False, *[True] * 6, False, False]


# ---- at start ---------------------------------------------------------------------------------------------------


def test_the_row_in_the_table_of_attention_backends() -> None:
    """By name only, on a GPU in 16 bits, for either mask; a run without it never pays for its import."""
    row, gpu = next(row for row in BACKENDS if row.name == "te"), torch.device("cuda")
    for mask in ("causal", "document"):
        assert "is not installed" in row.unusable(Requirements(gpu, torch.bfloat16, mask, 8, 2))
        with te_double.installed():
            assert row.unusable(Requirements(gpu, torch.bfloat16, mask, 8, 2)) == ""
            assert "float32" in row.unusable(Requirements(gpu, torch.float32, mask))
        assert select("attention", "auto", BACKENDS, Requirements(mask=mask)).name != "te"
    with pytest.raises(ConfigError, match=r"E209.*does not run on cpu"):
        select("attention", "te", BACKENDS, Requirements())


def test_what_stands_in_the_way_is_said_in_the_library_s_words() -> None:
    assert "transformer_engine" in te.unavailable()  # ModuleNotFoundError here
    with te_double.installed():
        assert te.unavailable() == "torch sees no GPU"
        module = sys.modules["transformer_engine.pytorch"]
        assert te.missing_names(module, te.USED) == []
        assert te.missing_names(module, {"Linear": ("bias", "tp_grup"), "Linear.forward": ("first",), "X": ()}) == [
            "Linear(tp_grup)", "Linear.forward(first)", "X"]  # fmt: skip
        module.is_fp8_available = lambda *args, **kwargs: True  # as behind a decorator that keeps no signature
        assert te.missing_names(module, te.USED) == []
        del module.autocast  # as in a version of two years ago
        assert te.unavailable() == "the installed version has no autocast"


def _package(folder: Path, text: str) -> str:
    """A ``transformer_engine`` that does this when it is imported."""
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text(text)
    return str(folder)


BROKEN = [
    ("raise RuntimeError('Found empty `transformer-engine` meta package installed.\\nInstall it.')",
     "RuntimeError: Found empty `transformer-engine` meta package installed. Install it."),
    ("raise OSError('libnccl.so.2: cannot open shared object file')", "OSError: libnccl.so.2"),
    ("import os\nos._exit(3)", "its import ended with exit code 3"),
]  # fmt: skip


@pytest.mark.parametrize("text, said", BROKEN, ids=["meta package", "no library", "no process left"])
def test_a_broken_library_is_refused_before_ranks_start(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([_package(tmp_path, text), str(Path.cwd())]))
    with pytest.raises(ConfigError) as caught:
        te.check_before_start(te_config())
    assert str(caught.value).startswith("error[E212]: kernels.layers=te needs Transformer Engine")
    assert said in str(caught.value) and "kernels.layers=torch" in str(caught.value)
    te.check_before_start(tiny_config())  # asks nobody
    with pytest.raises(ConfigError, match=r"E212.*kernels\.attention=te.*use kernels\.attention=auto"):
        te.refuse(te_config(kernels__layers="torch", kernels__attention="te"), "why")


def test_the_launcher_says_why_and_starts_nothing(tmp_path: Path) -> None:
    for name in "abxy":
        write_dataset(tmp_path / name, 20, 0)
    arguments = overrides(tmp_path, tmp_path / "run", "kernels.layers=te")
    with pytest.raises(ConfigError, match=r"E212.*No module named"):
        prepare(config_for(arguments), 2)  # what the launcher does before it starts ranks
    prepare(config_for(arguments), 2, check_data=False)  # a rank asks in its own process, below
    with pytest.raises(ConfigError, match=r"E212.*No module named"):
        run_rank(config_for(arguments), 0, 0, 1, None, check_data=False)
    done = run(2, arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error[E212]: kernels.layers=te") and "No module named" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, number, named", [
    ({"kernels.layers": "te", "train.device": "cpu"}, "E212", "does not run with train.device=cpu"),
    ({"kernels.attention": "te", "train.device": "cpu"}, "E212", "kernels.attention=te"),
    ({"kernels.fp8": "delayed"}, "E213", "is not for kernels.layers=torch"),
    ({"kernels.fp8": "current", "train.device": "cpu"}, "E213", "does not run with train.device=cpu"),
    ({"kernels.fp8_head": "true"}, "E213", "needs kernels.fp8"),
    ({"kernels.fp8": "current", "kernels.fp8_head": "true", "kernels.loss_chunk_tokens": 100}, "E213", "chunk_tokens"),
    ({"kernels.fp8": "delayed", "kernels.layers": "te", "train.precision": "fp32"}, "E213", "train.precision=fp32"),
    ({"kernels.fp8": "current", "kernels.layers": "te", "data.seq_length": 40, "train.micro_batch_size": 1}, "E213",
     r"a multiple of 16 for train.micro_batch_size x data.seq_length \(40\)"),
    ({"kernels.fp8": "current", "kernels.layers": "te", "model.ffn_hidden_size": 200}, "E213", "ffn_hidden_size"),
    ({"kernels.fp8": "fast"}, "E203", "kernels.fp8"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_the_config(changes: dict[str, Any], number: str, named: str) -> None:
    changes = {"train.precision": "bf16", **changes}
    with pytest.raises(ConfigError, match=f"{number}.*{named}"):
        config_for([f"{key}={value}" for key, value in changes.items()]).validate(1)


def test_fp8_s_multiple_is_of_one_rank_s_part() -> None:
    """What one rank could do in 8 bits, two cannot: 208 / 2 and 16 / 2 are no multiples of 16."""
    fp8: dict[str, Any] = {"kernels__fp8": "current", "train__precision": "bf16", "train__micro_batch_size": 1}
    for changes, named in (
        ({"model__ffn_hidden_size": 208}, r"ffn_hidden_size \(104, one rank's part\)"),
        ({"data__seq_length": 16}, r"seq_length \(8, one rank's part\)"),
    ):
        te_config(**fp8, **changes).validate(1)
        with pytest.raises(ConfigError, match=f"E213.*{named}"):
            te_config(2, True, **fp8, **changes).validate(2)


def test_delayed_scaling_says_what_a_restart_costs() -> None:
    for fp8, expected in (("off", 0), ("current", 0), ("delayed", 1)):
        said = [note for note in te_config(kernels__fp8=fp8).notes() if "not bit-equal" in note]
        assert len(said) == expected


def test_fp8_on_a_gpu_that_cannot_is_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with te_double.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        te.check_here(te_config())
        with pytest.raises(ConfigError, match=r"E213.*kernels\.fp8=current cannot run here \(Device compute"):
            te.check_here(te_config(kernels__fp8="current"))
