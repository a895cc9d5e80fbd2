"""The config mapping: what transformers reads is what we mean, and what we do not have is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.checkpoint.fit import architecture
from megatron_hammer.config import ModelConfig, RopeScaling
from megatron_hammer.huggingface.config import hf_config_from_model, model_config_from_hf, read_json
from megatron_hammer.huggingface.export import parse_size
from megatron_hammer.model.rope import rope_frequencies
from tests.checkpoint.layouts import LLAMA3_ROPE, tiny_model

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
PLAIN = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 131}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
ROPES = [
    RopeScaling(2.0, rope_type="linear"),
    RopeScaling(4.0, original_max_position_embeddings=32, rope_type="yarn"),
    RopeScaling(4.0, original_max_position_embeddings=32, rope_type="yarn", beta_fast=16.0, beta_slow=2.0,
                attention_factor=1.5, truncate=False),
    RopeScaling(2.0, rope_type="dynamic"),
]  # fmt: skip
BOTH = {"qkv_bias": True, "attention_output_bias": True}
VARIANTS = [{}, BOTH, BOTH | {"mlp_bias": True}, {"mlp_bias": True}, {"qkv_bias": True}, {"qk_norm": True},
            BOTH | {"qk_norm": True}]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4), st.integers(0, 2), st.booleans(), st.floats(1e-8, 1e-2), st.floats(1e2, 1e7),
    st.sampled_from([None, LLAMA3_ROPE, *ROPES]), st.sampled_from(VARIANTS),
)  # fmt: skip
def test_our_config_survives_the_way_there_and_back(groups, factor, tied, eps, theta, scaling, flags):
    model = ModelConfig(hidden_size=48, ffn_hidden_size=40, num_layers=2, num_attention_heads=groups * 2**factor,
                        num_query_groups=groups, head_dim=6, vocab_size=301, norm_eps=eps, rope_theta=theta,
                        rope_scaling=scaling, max_position_embeddings=99,
                        tie_word_embeddings=tied, init_std=0.01, **flags)  # fmt: skip
    model.check()
    tree = json.loads(json.dumps(hf_config_from_model(model, IDS, "bfloat16")))
    back = model_config_from_hf(tree)
    assert (back, back.head_size) == (replace(model, head_dim=back.head_dim), 6)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 6}, {"rope_theta": 500000.0},
    {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}, *({"rope_scaling": rope} for rope in ROPES), *VARIANTS[1:],
    {"qk_norm": True, "head_dim": 6, "rope_scaling": ROPES[1]},
], ids=str)  # fmt: skip
def test_transformers_reads_what_we_mean(changes):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = tiny_model(**changes)
    tree = hf_config_from_model(model, IDS, "bfloat16")
    for words in (tree, {k: v for k, v in tree.items() if k != "rope_parameters"}):  # both forms, and the older alone
        theirs = AutoConfig.for_model(**json.loads(json.dumps(words)))
        rotary = LlamaRotaryEmbedding(theirs)
        assert torch.allclose(rotary.inv_freq, rope_frequencies(model), rtol=1e-6)
        factor = 1.0 if model.rope_scaling is None else model.rope_scaling.cos_sin_factor
        assert rotary.attention_scaling == pytest.approx(factor, rel=1e-12)
        saved = json.loads(theirs.to_json_string(use_diff=False))
        assert architecture(model_config_from_hf(saved)) == architecture(model)
        head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        assert (head_dim, theirs.num_key_value_heads) == (model.head_size, model.query_groups)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, None)


FAMILY_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILY_CLASSES)
def test_absent_keys_mean_what_transformers_assumes(kind):
    from transformers import AutoConfig

    tree = {**PLAIN, "num_attention_heads": 32, "hidden_size": 64, "model_type": kind,
            "architectures": [FAMILY_CLASSES[kind]], "sliding_window": None}  # fmt: skip
    ours, theirs = model_config_from_hf(tree), AutoConfig.for_model(**tree)
    assert (ours.norm_eps, ours.init_std) == (theirs.rms_norm_eps, theirs.initializer_range)
    head_dim = getattr(theirs, "head_dim", None) or 2
    assert (ours.query_groups, ours.head_size) == (theirs.num_key_value_heads, head_dim)
    assert (ours.max_position_embeddings, ours.tie_word_embeddings) == (theirs.max_position_embeddings, False)
    assert (ours.rope_theta, ours.rope_scaling) == (10000.0, None)
    assert ours.qkv_bias == (kind == "qwen2") and ours.qk_norm == (kind == "qwen3")
    assert not (ours.attention_output_bias or ours.mlp_bias)
    assert model_config_from_hf({k: v for k, v in tree.items() if k != "model_type"}) == ours
    assert model_config_from_hf({k: v for k, v in tree.items() if k != "architectures"}) == ours


@pytest.mark.parametrize("kind, window, refused", [
    ("mistral", {}, True), ("mistral", {"sliding_window": 4096}, True), ("mistral", {"sliding_window": None}, False),
    ("mistral", {"sliding_window": 131072}, False), ("mistral", {"sliding_window": 131071}, True),
    ("qwen2", {}, False), ("qwen2", {"sliding_window": 4096, "max_window_layers": 28}, False),
    ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, False),
    ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, True),
    ("qwen3", {"sliding_window": None, "use_sliding_window": True}, False),
    ("qwen3", {"sliding_window": "wide", "use_sliding_window": True}, True),
    ("llama", {"use_sliding_window": True}, True), ("llama", {"max_window_layers": 3}, True),
])  # fmt: skip
def test_attention_in_a_window_is_refused_where_it_would_be_used(kind, window, refused):
    tree = {**PLAIN, "num_attention_heads": 32, "hidden_size": 64, "model_type": kind,
            "architectures": [FAMILY_CLASSES[kind]], **window}  # fmt: skip
    if not refused:
        assert model_config_from_hf(tree).num_attention_heads == 32
        return
    with pytest.raises(CheckpointError, match=r"E421.*(sliding_window|max_window_layers)="):
        model_config_from_hf(tree)


def test_a_class_of_another_family_is_refused():
    with pytest.raises(CheckpointError, match=r'E421.*architectures=.*only \["Qwen3ForCausalLM"\]'):
        model_config_from_hf({**PLAIN, "model_type": "qwen3"})
    with pytest.raises(CheckpointError, match=r"E421.*architectures=.*llama, mistral, qwen2, qwen3"):
        model_config_from_hf({**PLAIN, "model_type": None, "architectures": ["GPT2LMHeadModel"]})


def test_temperatures_of_yarn_become_its_factor():
    """As DeepSeek writes them: what transformers computes of the two is written out."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.2,
            "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
    ours = model_config_from_hf({**PLAIN, "rope_scaling": yarn})
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**PLAIN, rope_scaling=yarn))
    assert ours.rope_scaling is not None
    assert ours.rope_scaling.cos_sin_factor == pytest.approx(theirs.attention_scaling, rel=1e-12) != 1.0


@pytest.mark.parametrize("rope", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
])  # fmt: skip
def test_llama3_rope_is_read_from_either_form(rope):
    model = model_config_from_hf({**PLAIN, **rope})
    assert model.rope_theta == 5e5
    assert model.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


def test_rope_forms_that_disagree_are_refused():
    for rope in (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}},
        {"rope_scaling": {**LLAMA3}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ):
        with pytest.raises(CheckpointError, match=r"E422.*rope_parameters.*disagrees"):
            model_config_from_hf({**PLAIN, **rope})


@pytest.mark.parametrize("feature", [
    {"hidden_act": "gelu"}, {"pretraining_tp": 2},
    {"attention_dropout": 0.1},
    {"model_type": "gemma"}, {"architectures": ["LlamaForSequenceClassification"]}, {"sliding_window": 4096},
    {"quantization_config": {"bits": 4}}, {"is_causal": False}, {"partial_rotary_factor": 0.5},
    {"layer_types": ["sliding_attention"]}, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
    {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1.0}},
    {"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, {"rope_parameters": {"full_attention": LLAMA3}},
    {"num_local_experts": 8}, {"original_max_position_embeddings": 8192}, {"qk_norm": True},
], ids=str)  # fmt: skip
def test_a_feature_that_we_do_not_have_is_refused_by_its_name(feature):
    with pytest.raises(CheckpointError, match=r"E421") as caught:
        model_config_from_hf({**PLAIN, **feature}, "folder/config.json")
    assert next(iter(feature)) in str(caught.value) and "folder/config.json" in str(caught.value)


@pytest.mark.parametrize("harmless", [
    {"attention_bias": False, "mlp_bias": None, "attention_dropout": 0.0, "pretraining_tp": 1, "hidden_act": "silu"},
    {"sliding_window": None, "quantization_config": None, "layer_types": ["full_attention"], "new_feature": False},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.31.0", "bos_token_id": [1, 2]},
], ids=str)  # fmt: skip
def test_a_feature_that_is_off_is_no_feature(harmless):
    assert model_config_from_hf({**PLAIN, **harmless}) == model_config_from_hf(PLAIN)


HARMLESS = {
    "is_llama_config": True, "unsloth_fixed": True, "unsloth_version": "2025.3", "_comment": "mine", "num_labels": 2,
    "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}, "transformers.js_config": {"dtype": "q4"},
    "torchscript": True, "model_max_length": 4096, "max_sequence_length": 2048, "use_flash_attn": True,
    "license": "mit", "base_model_name_or_path": "x/y", "tensor_parallel_size": 2,
    "attn_implementation": "sdpa", "created": "2024-05-01", "tokenizer_model": "x", "padding_side": "left",
    "use_liger_kernel": True, "_flash_attn_2_enabled": True, "training_args": {"lr": 1e-3}, "wandb_run": "x",
}  # fmt: skip


def test_keys_without_effect_are_passed_over_and_named():
    """transformers loads every one of these; most programs leave a few behind."""
    told: list[str] = []
    assert model_config_from_hf({**PLAIN, **HARMLESS}, note=told.append) == model_config_from_hf(PLAIN)
    assert len(told) == 1 and set(HARMLESS) - {"num_labels", "torchscript"} == set(told[0].split(": ")[-1].split(", "))
    assert model_config_from_hf({**PLAIN, **hf_config_from_model(tiny_model(), IDS, "bfloat16")}, note=pytest.fail)


@pytest.mark.parametrize("key, value", [("head_dropout", 0.1), ("vNormScale", 2.0), ("num_memory_layers", 2)])
def test_an_unknown_key_about_the_model_is_passed_over_when_it_is_named(key, value):
    tree = {**PLAIN, key: value}
    with pytest.raises(CheckpointError, match=rf"E421.*config\.json: {key}=.*pass --ignore {key}"):
        model_config_from_hf(tree)
    told: list[str] = []
    assert model_config_from_hf(tree, ignore=[key], note=told.append) == model_config_from_hf(PLAIN)
    assert told[0].endswith(f": {key}")


def test_what_changes_the_mathematics_cannot_be_ignored():
    for key in ("sliding_window", "logit_scale", "hidden_act"):
        with pytest.raises(CheckpointError, match=rf"E421.*{key}"):
            model_config_from_hf({**PLAIN, key: 2}, ignore=[key])
    with pytest.raises(ConfigError, match=r"E282.*--ignore qk_nrom is no key"):
        model_config_from_hf(PLAIN, ignore=["qk_nrom"])


@pytest.mark.parametrize("name, value", [
    ("hidden_size", None), ("hidden_size", "16"), ("hidden_size", 0), ("hidden_size", 2**40), ("vocab_size", True),
    ("num_key_value_heads", 3), ("num_hidden_layers", 1.5), ("rms_norm_eps", "small"), ("rms_norm_eps", -1.0),
    ("rope_theta", float("nan")), ("head_dim", 3), ("tie_word_embeddings", "yes"), ("rope_scaling", "llama3"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 8.0, "truncate": "no"}), ("attention_bias", 1),
    ("rope_scaling", {"rope_type": "yarn", "factor": 0.5}), ("mlp_bias", "false"),
])  # fmt: skip
def test_an_impossible_value_is_refused_by_its_name(name, value):
    with pytest.raises(CheckpointError, match=r"E422"):
        model_config_from_hf({**PLAIN, name: value})


def test_something_that_is_no_model_config_is_refused():
    with pytest.raises(CheckpointError, match=r"E422.*model_type"):
        model_config_from_hf({"hidden_size": 16})


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(t) for t in ("5GB", "1.5 MB", "512MiB", "1000", "2kb")] == [
        5 * 10**9,
        1500000,
        2**29,
        1000,
        2000,
    ]
    for text in ("", "GB", "-1", "5TB", "0", "5GBs", "1e9", "5"):
        with pytest.raises(ConfigError, match=r"E280"):
            parse_size(text)


def test_a_folder_that_is_no_model_names_what_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"E408.*is a run of ours.*checkpoint_to_hf.py first"):
        read_json(tmp_path / "run" / "config.json")
    (tmp_path / "run" / "hf").mkdir()
    (tmp_path / "run" / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"E408.*name the folder of the model: .*run/hf"):
        read_json(tmp_path / "run" / "config.json")
