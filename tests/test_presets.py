"""Every preset reads, validates and says what it claims to be."""

from __future__ import annotations

import dataclasses
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
    config.validate(config.parallel.tensor_model_parallel_size)
    assert config.tokenizer.path is None and config.data.train is None and config.data.valid is None
    assert config.model.vocab_size is None, "a preset fits any tokenizer"
    assert path.read_text().startswith("# ")


def test_hammerllm_has_its_published_size() -> None:
    model = dataclasses.replace(preset("hammerllm_1b4.yaml").model, vocab_size=HAMMERLLM_PIECES)
    assert count_parameters(model) == 1_402_288_128
    assert (model.head_size, model.query_groups, model.num_layers) == (64, 4, 22)


def test_hammerllm_is_the_published_recipe() -> None:
    config = preset("hammerllm_1b4.yaml")
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
    quick, full = preset("quick_start.yaml"), preset("hammerllm_1b4.yaml")
    assert (quick.schedule.style, quick.train.precision) == (full.schedule.style, full.train.precision)
    assert quick.parallel.tensor_model_parallel_size == 2 and quick.parallel.sequence_parallel
    assert quick.grad_accum(2) > 1, "accumulation takes part"
    single = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    preset("quick_start.yaml", *single).validate(1)
