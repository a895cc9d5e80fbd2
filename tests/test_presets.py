"""Every preset reads, validates and says what it claims to be."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest

from megatron_hammer.config import Config, load_config
from megatron_hammer.model.parameters import count_parameters

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
HAMMERLLM_PIECES = 105_789


def preset(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / name, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_preset_is_valid_and_introduces_itself(path: Path) -> None:
    config = load_config(path)
    config.validate(config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size)
    assert config.tokenizer.path is None and config.data.train is None and config.data.valid is None
    assert config.model.vocab_size is None, "a preset fits any tokenizer"
    assert path.read_text().startswith("# ")


def test_hammerllm_has_its_published_size() -> None:
    model = dataclasses.replace(preset("hammerllm_1b4_faithful.yaml").model, vocab_size=HAMMERLLM_PIECES)
    assert count_parameters(model) == 1_402_288_128
    assert (model.head_size, model.query_groups, model.num_layers) == (64, 4, 22)


def test_hammerllm_is_the_published_recipe() -> None:
    config = preset("hammerllm_1b4_faithful.yaml")
    assert preset("hammerllm_1b4.yaml") == config, "its former name"
    config.validate(8)
    assert config.tokens_per_step == 2_097_152 and config.grad_accum(8) == 16
    o, s, t, c = config.optimizer, config.schedule, config.train, config.checkpoint
    assert (o.lr, o.min_lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_grad) == (
        5e-4,
        5e-5,
        0.9,
        0.999,
        1e-8,
        0,
        1,
    )
    assert (s.style, s.warmup_steps, s.decay_steps) == ("cosine-clamped", 2000, 1_000_000)
    assert (t.micro_batch_size, t.seed, t.precision, t.eval_interval_steps) == (8, 3407, "bf16", 500)
    assert (c.save_interval_steps, c.keep_last, config.log.interval_steps) == (500, 50, 10)
    assert (config.model.norm_eps, config.model.rope_theta, config.model.init_std) == (1e-5, 10000, 0.02)
    assert config.data.seq_length == 2048 and not config.model.tie_word_embeddings


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 11, 10**6])
def test_tiny_takes_any_number_of_steps(num_steps: int) -> None:
    config = preset("tiny.yaml", f"train.num_steps={num_steps}")
    config.validate(1)
    assert any("clamped" in note for note in config.notes()) == (num_steps < 10)
    assert any("data.valid" in note for note in config.notes())


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tiny_fits_every_layout(tp: int, sequence_parallel: bool) -> None:
    assert preset("tiny.yaml").parallel.tensor_model_parallel_size == 1
    assert not preset("tiny.yaml").parallel.sequence_parallel
    if tp > 1 or not sequence_parallel:
        layout = (
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.sequence_parallel={str(sequence_parallel).lower()}",
        )
        preset("tiny.yaml", *layout).validate(tp)
        preset("tiny.yaml", *layout).validate(2 * tp)


def test_quick_start_differs_from_the_recipe_in_numbers_only() -> None:
    """The same schedule, precision and optimizer; TP 2 with sequence parallelism, and TP 1 for a single GPU."""
    quick, full = preset("quick_start.yaml"), preset("hammerllm_1b4_faithful.yaml")
    assert (quick.schedule.style, quick.train.precision) == (full.schedule.style, full.train.precision)
    assert quick.parallel.tensor_model_parallel_size == 2 and quick.parallel.sequence_parallel
    assert quick.grad_accum(2) > 1, "accumulation takes part"
    single = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    preset("quick_start.yaml", *single).validate(1)


def test_the_modern_recipe_is_of_the_same_size_and_the_table_says_all_that_differs() -> None:
    """Both pages have what compare_presets.py makes of the two files; the sizes of the model are no part of it."""
    ours, theirs = (f"hammerllm_1b4_{name}.yaml" for name in ("faithful", "modern"))
    faithful, modern = preset(ours), preset(theirs)
    modern.validate(8)
    assert modern.tokens_per_step == faithful.tokens_per_step and modern.model.family == "qwen3"
    assert modern.train.num_steps * modern.tokens_per_step == pytest.approx(445e9, rel=0.01)
    make = runpy.run_path(str(CONFIGS.parent / "compare_presets.py"))["table"]
    for page, chinese in (("README.md", False), ("README.zh-CN.md", True)):
        lines = make(CONFIGS / ours, CONFIGS / theirs, chinese)
        assert "\n".join(lines) in (CONFIGS.parent / page).read_text(encoding="utf-8")
        assert len(lines) > 15 and not any("_size` | 2048" in line or "num_layers" in line for line in lines)
        assert "| `optimizer.beta2` | 0.999 | 0.95 |" in lines
    reasons = (CONFIGS / theirs).read_text(encoding="utf-8").splitlines()
    fields = {line.split("`")[1].partition(".")[2] for line in lines[2:]}
    told = {line.split(":")[0].strip() for line in reasons if "#" in line}
    assert fields <= told | {"decay_steps", "num_steps"}, "each line that differs says why"


def test_llama_8b_has_its_size_and_fits_its_layouts() -> None:
    config = preset("llama_8b.yaml")
    for world_size in (8, 64, 512):
        config.validate(world_size)
    assert count_parameters(dataclasses.replace(config.model, vocab_size=128_256)) == 8_030_261_248
    parallel = config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.shard) == (2, 2, "weights")
    assert config.tokens_per_step == 2**22
