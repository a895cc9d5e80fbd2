"""The planner: layouts of a small model ranked and shown, wrong questions answered, the choice as a config."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError, HammerError, MemoryShortage
from megatron_hammer.config import Config, load_config, preset_names
from megatron_hammer.costs.gpus import GPUS
from megatron_hammer.costs.layouts import need_of, precision_of, shard_of, with_layout
from megatron_hammer.costs.plan_report import WIDTH, draw_plan, plan_table
from megatron_hammer.costs.planner import LayoutPlan, PlanRequest, chosen_config, plan_layouts, plan_to_tree
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_speed import COMPUTE, PIPELINE, Cluster
from tests.model.tiny import tiny_config
from tests.page_blocks import ROOT, blocks_of

CONFIGS = ROOT / "examples" / "configs"


def small(**changes: Any) -> Config:
    return tiny_config(**dict(train__precision="bf16", train__global_batch_size=16, model__num_layers=4) | changes)


@pytest.fixture(scope="module")
def plan() -> LayoutPlan:
    return plan_layouts(small(), PlanRequest(4, "h100", memory=0.0015, tokens=1e9, price=2.0))


def test_the_fastest_first_and_all_of_them_valid(plan: LayoutPlan) -> None:
    fitting = plan.found.fitting
    speeds = [layout.time.tokens_per_second for layout in fitting]
    assert len(fitting) > 20 and all(a >= b - 0.1 for a, b in itertools.pairwise(speeds))
    assert {layout.sizes[0] for layout in fitting} >= {1, 2} and {layout.sizes[1] for layout in fitting} >= {1, 2}
    assert {(layout.sizes[1], layout.stages) for layout in fitting} >= {(1, 1), (2, 1), (2, 2), (4, 1)}
    for layout in fitting:
        layout.config.validate(4)
        assert layout.bytes <= plan.found.limit == round(0.0015 * GIB * 0.92)
        assert layout.config.train.global_batch_size == 16, "what is computed stays"
    too_large = [rejected for rejected in plan.found.rejected if rejected.kind == "memory"]
    assert too_large and all(rejected.missing > 0 and "GiB of" in rejected.reason for rejected in too_large)


def test_interleaved_stages_wait_less_and_keep_more() -> None:
    """By the formula of parallel/pipeline.py, (p - 1) / v micro-batches; steps without whole groups are refused."""
    config = load_config(CONFIGS / "llama_8b.yaml", ["model.vocab_size=128256"])
    cluster = Cluster("H100", GPUS["H100"])
    plain, two, four = (
        need_of(with_layout(config, 2, 1, 4, stages, "optimizer", "full", 1), 8, cluster) for stages in (1, 2, 4)
    )
    waits = [layout.time.seconds[PIPELINE] for layout in (plain, two, four)]
    assert waits[1] / waits[0] == pytest.approx(1 / 2, rel=0.1) and waits[2] / waits[0] == pytest.approx(1 / 4, rel=0.3)
    assert plain.bytes < two.bytes and two.name.startswith("TP 2 PP 4x2 CP 1 DP 1")
    few = plan_layouts(small(train__global_batch_size=4), PlanRequest(4, "h100", memory=1.0)).found
    odd = [rejected for rejected in few.rejected if "stages=2 needs micro-batches" in rejected.reason]
    assert odd and all(rejected.kind == "batch" and " PP 2x2 " in rejected.layout for rejected in odd)


def test_weights_are_divided_within_a_node_too() -> None:
    """Over a slow network that is faster than among all ranks, by a copy of the states in each node."""
    plan = plan_layouts(small(), PlanRequest(4, "h100", memory=1.0, gpus_per_node=2, network=0.5, show=500))
    weights = [layout for layout in plan.found.fitting if layout.config.parallel.shard == "weights"]
    near = {shard_of(layout.config): layout for layout in reversed(weights) if layout.sizes == (1, 1, 1, 4)}
    assert near.keys() == {"weights", "weights/2"} and near["weights/2"].bytes > near["weights"].bytes
    assert near["weights/2"].time.total < near["weights"].time.total
    near["weights/2"].config.validate(4)
    lines = plan_table(plan, 500)
    assert any("weights/2" in line for line in lines) and max(map(len, lines)) <= WIDTH
    own = plan_layouts(
        small(parallel__shard="weights", parallel__shard_size=4), PlanRequest(4, "h100", gpus_per_node=2)
    )
    assert {layout.config.parallel.shard_size for layout in own.found.fitting} == {None, 4}, "as it was asked for"


def test_the_table_fits_a_terminal_and_says_what_it_rests_on(plan: LayoutPlan) -> None:
    lines = plan_table(plan, 5)
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for words in ("65% in products", "450 GB/s", "--network", "layouts fit", "too large", "memory of the rank", "cost"):
        assert words in text
    first = plan.found.fitting[0]
    assert f"{first.time.tokens_per_second:,.0f}" in text


def test_json_has_everything(plan: LayoutPlan) -> None:
    tree = json.loads(json.dumps(plan_to_tree(plan)))
    assert len(tree["layouts"]) == len(plan.found.fitting) and len(tree["rejected"]) == len(plan.found.rejected)
    first = tree["layouts"][0]
    assert sum(first["memory_bytes"].values()) == first["total_bytes"]
    hours = 1e9 / first["tokens_per_second"] / 3600 * 4
    assert first["gpu_hours"] == pytest.approx(hours) and first["cost"] == pytest.approx(2 * hours)
    assert sum(first["seconds"].values()) * first["tokens_per_second"] == pytest.approx(16 * 32)


def test_the_choice_is_a_config_that_changes_the_layout_alone(plan: LayoutPlan) -> None:
    asked = small(model__vocab_size=301)
    chosen = chosen_config(plan, asked, 2)
    assert chosen.parallel == plan.found.ranked[1].config.parallel
    same = ("model", "data", "optimizer", "schedule", "tokenizer", "checkpoint", "log")
    assert all(getattr(chosen, group) == getattr(asked, group) for group in same)
    with pytest.raises(ConfigError, match="must be from 1 to"):
        chosen_config(plan, asked, 10**6)


def test_the_picture(plan: LayoutPlan, tmp_path: Path) -> None:
    draw_plan(plan, tmp_path / "plan.png", 3)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "asked, changes, code, words",
    [
        (dict(gpu="h300"), {}, "E238", ("h100", "4090", "mi300x")),
        (dict(gpu="4090-d"), {}, "E238", ("no published peak in bf16", "log.peak_tflops")),
        (dict(gpu="a100", precision="fp8"), {}, "E238", ("bf16",)),
        (dict(gpus=0), {}, "E240", ("--gpus=0",)),
        (dict(memory=-1.0), {}, "E240", ("--memory",)),
        (dict(headroom=1.0), {}, "E240", ("--headroom",)),
        (dict(precision="int4"), {}, "E203", ("fp8",)),
        (dict(efficiency=["product=0.5"]), {}, "E240", ("products",)),
        (dict(efficiency=["products=65"]), {}, "E240", ("at most 1",)),
        (dict(gpus=3), dict(train__global_batch_size=7, model__num_layers=2), "E205",
         ("train.global_batch_size=7", "multiple of 3, such as 6")),
        (dict(memory=0.0001), {}, "E1002",
         ("the closest, TP", "GiB are missing", "(--gpus 8) or larger ones", "weights")),
        (dict(memory=0.006, gpus=1), dict(data__seq_length=2048, model__max_position_embeddings=2048), "E1002",
         ("or a shorter data.seq_length than 2048",)),
    ],
)  # fmt: skip
def test_a_question_without_an_answer_says_what_to_do(
    asked: dict[str, Any], changes: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(HammerError) as caught:
        plan_layouts(dataclasses.replace(small(**changes)), PlanRequest(**{"gpus": 4, "gpu": "h100", **asked}))
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_each_precision_has_its_own_rate() -> None:
    """fp32 presets are planned, too; log.peak_tflops is of the config's own precision."""
    long = small(train__precision="fp32", model__hidden_size=512, model__ffn_hidden_size=2048, data__seq_length=32)
    found = plan_layouts(long, PlanRequest(1, "h100", precision="fp32,bf16")).found.fitting
    compute = {precision_of(layout.config): layout.time.seconds[COMPUTE] for layout in found[::-1]}
    assert compute["fp32"] > 2 * compute["bf16"]
    slower = dataclasses.replace(long, log=dataclasses.replace(long.log, peak_tflops=6.7))
    plan = plan_layouts(slower, PlanRequest(1, "h100", precision="fp32,bf16"))
    assert (plan.cluster.gpu.peak("fp32"), plan.cluster.gpu.peak("bf16")) == (6.7, 989.0)
    assert any("6.7 in fp32" in line for line in plan_table(plan, 3))
    assert all(gpu.fp32_tflops is not None or gpu.peak_tflops is None for gpu in GPUS.values())


def test_every_preset_is_planned_as_it_is() -> None:
    """On one GPU, since that is fast; a vocabulary that nobody has named is assumed, said, and not written."""
    for preset in preset_names():
        config = load_config(preset, ["train.global_batch_size=8"])
        plan = plan_layouts(config, PlanRequest(1, "h200", memory=1000.0))
        assert plan.is_vocabulary_assumed == (config.model.vocab_size is None), preset
        assert plan.is_vocabulary_assumed == any(
            "a vocabulary of 100,000 is assumed" in line for line in plan_table(plan, 1)
        )
        assert chosen_config(plan, config, 1).model == config.model


def test_names_of_gpus_as_people_write_them() -> None:
    from megatron_hammer.costs.gpus import named_gpu

    for name, known in {"H100": "H100", "h100-pcie": "H100 PCIe", "RTX4090": "4090", "rtx 4090": "4090",
                        "A100-SXM4": "A100", "mi300x": "MI300X", "H200NVL": "H200 NVL",
                        "Ｈ100": "H100"}.items():  # fmt: skip
        assert named_gpu(name)[0] == known


def test_published_runs_are_met() -> None:
    """16,000 tokens/s of the 1.4B on an A100 by its authors, and some 24,000 of TinyLlama's 1.1B: we expect between."""
    overrides = ["model.vocab_size=105789"]
    config = load_config(CONFIGS / "hammerllm_1b4.yaml", overrides)
    plan = plan_layouts(config, PlanRequest(1, "a100"))
    assert 16_000 < plan.found.fitting[0].time.tokens_per_second < 25_000
    assert plan_layouts(config, PlanRequest(2, "a100")).found.ranked[0].config.parallel.shard == "optimizer", (
        "as docs/layout.md"
    )


def program() -> Any:
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_the_program_writes_a_config_that_training_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command of docs/planning.md, of a toy."""
    output = tmp_path / "plan.yaml"
    (block,) = blocks_of((ROOT / "docs" / "planning.md").read_text(encoding="utf-8"))
    toy = {"examples/configs/hammerllm_1b4.yaml": str(CONFIGS / "tiny.yaml"), "8": "2", "plan.yaml": str(output),
           "model.vocab_size=105789": "model.vocab_size=301", "plan.png": str(tmp_path / "plan.png")}  # fmt: skip
    called, *words = shlex.split(block.replace("\\\n", " "))[1:]
    assert called == "tools/plan.py" and set(toy) < set(words)
    words = [toy.get(word, word) for word in words] + ["--choose", "2", "train.precision=bf16"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    assert program().main() == 0
    assert "tokens/s" in capsys.readouterr().out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    written = load_config(str(output), [])
    written.validate(2)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match=r"E288.*plan.yaml is there, and would be replaced"):
        program().main()
    assert output.read_bytes() == before and capsys.readouterr().out == "", "refused before anything is computed"
    monkeypatch.setattr(sys, "argv", ["plan.py", words[0], "--gpus", "2", "--gpu", "h100", "--write", words[0]])
    with pytest.raises(ConfigError, match="is the config that is read"):
        program().main()
    for idle, reason in ((["--choose", "2"], "without --write"), (["--show=3", "--json"], "with --json")):
        monkeypatch.setattr(sys, "argv", ["plan.py", words[0], "--gpus", "2", "--gpu", "h100", *idle])
        with pytest.raises(ConfigError, match=rf"E201.*{idle[0].partition('=')[0]} does nothing {reason}"):
            program().main()


def test_nothing_fits_is_exit_code_10() -> None:
    assert MemoryShortage.exit_code == 10
