"""Which unknown keys of a ``config.json`` are harmless, and which change what the model computes.

People and programs write much into a model's config: notes, what a training library has set, what generation should
do. None of it changes the function that the weights compute. A few keys do change it, and a reader that passes over one
of them has another model. ``judge_key`` tells the two apart, by lists of what is known; a key that is in none of them
is suspected if its name speaks of a part of the model, and is harmless otherwise.

Needs no torch.
"""

from __future__ import annotations

import enum
import re


class Judgement(enum.Enum):
    """What passing over a key would mean."""

    USUAL = "in most configs, without effect: not worth a word"
    HARMLESS = "has no effect, but the user should know that it was passed over"
    SUSPECT = "unknown, and by its name about the model itself"
    CHANGES = "changes what the model computes"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_USUAL = _names(
    """
    torch_dtype dtype transformers_version use_cache tie_word_embeddings return_dict bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id id2label label2id num_labels
    task_specific_params problem_type finetuning_task use_return_dict output_attentions output_hidden_states
    tokenizer_class prefix is_decoder chunk_size_feed_forward max_length min_length do_sample temperature top_k
    top_p typical_p num_beams num_beam_groups num_return_sequences repetition_penalty length_penalty
    diversity_penalty early_stopping no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id decoder_start_token_id remove_invalid_values return_dict_in_generate
    output_scores torchscript use_bfloat16 tf_legacy_loss
    """
)

_CHANGES = _names(
    """
    quantization_config compression_config pruned_heads is_encoder_decoder add_cross_attention
    cross_attention_hidden_size use_bidirectional_attention bidirectional sliding_window use_sliding_window
    sliding_window_pattern sliding_windows max_window_layers attention_window attention_chunk_size
    global_attn_every_n_layers layer_window attention_sink attention_sinks num_local_experts num_experts
    n_routed_experts n_shared_experts num_shared_experts num_experts_per_tok num_experts_per_token
    moe_intermediate_size shared_expert_intermediate_size first_k_dense_replace moe_layer_freq decoder_sparse_step
    router_scaling_factor routed_scaling_factor interleave_moe_layer_step attn_logit_softcapping
    final_logit_softcapping attn_logit_softcap final_logit_softcap logit_softcap logit_scale logits_scaling
    logit_cap output_multiplier output_multiplier_scale lm_head_multiplier embedding_multiplier embedding_scale
    embed_scale scale_embeddings scale_embedding scale_emb normalize_embedding residual_multiplier residual_scale
    scale_depth dim_model_base attention_multiplier attention_scale attention_scaling key_multiplier
    query_pre_attn_scalar attn_scale floor_scale attn_temperature_tuning mlp_multipliers width_multiplier
    depth_multiplier mup_width_scale mup_base_width qk_norm use_qk_norm qk_layernorm use_qk_layernorm qk_norm_type
    q_norm k_norm clip_qkv no_rope_layers no_rope_layer_interval nope_layers nope_layer_interval alibi use_alibi
    alibi_bias_max rotary_pct rotary_percentage rotary_dim rotary_emb_base partial_rotary_dim rope_ratio
    rope_local_base_freq rope_interleave rope_interleaved rotary_interleaved use_rope position_embedding_type
    mrope_section qkv_bias use_qkv_bias use_bias bias add_bias_linear add_qkv_bias o_proj_bias lm_head_bias
    attention_out_bias use_parallel_residual parallel_attn parallel_residual parallel_block multi_query_attention
    kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim cross_layer_kv_sharing
    num_kv_shared_layers kv_sharing layer_share use_post_norm post_norm use_sandwich_norm sandwich_norm norm_after
    norm_type add_unit_offset rms_norm_add_unit_offset block_configs layers_block_type hybrid_override_pattern
    attn_layer_indices medusa_num_heads num_nextn_predict_layers adapter_layers adapter_len gated_attention
    attention_output_gate mlp_only_layers activation_sparsity_pattern vision_config text_config audio_config
    """
)

_WITHOUT_EFFECT = _names(
    """
    attn_implementation use_flash_attn use_flash_attention use_flash_attention_2 flash_attention flash_attn use_sdpa
    use_memory_efficient_attention use_xformers xformers memory_efficient_attention fused_rms_norm fused_rope
    use_fused_rope use_fused_rms_norm use_fused_swiglu use_fused_cross_entropy fuse_cross_entropy fuse_norm
    fuse_swiglu fuse_linear_cross_entropy use_liger_kernel gradient_checkpointing use_gradient_checkpointing
    recompute_granularity keys_to_ignore_at_inference base_model_tp_plan base_model_pp_plan pad_token eos_token
    bos_token original_vocab_size router_aux_loss_coef cache_implementation kv_cache_dtype use_cache_quantization
    block_size logits_to_keep num_logits_to_keep
    """
)
_HARMLESS_BEGINNING = ("_", "unsloth", "transformers.js", "transformers_js", "init_", "initializer", "tokenizer")

# Words of names that are about the layers themselves.
_PARTS_OF_A_MODEL = _names(
    """
    attention attn head heads norm norms layernorm rmsnorm rope rotary position positions positional embedding
    embeddings embed emb expert experts moe router routed gate gated gating window windows bias biases scale scales
    scaling multiplier multipliers softcap softcapping cap clip logit logits residual residuals quant quantization
    quantized quantize bits alibi layer layers block blocks hidden intermediate mlp ffn activation act dim
    size_per_head kv qk qkv query proj projection mup dropout pdrop causal mask sparse sparsity lora adapter skip
    shared sharing ssm conv recurrent temperature theta freq factor yarn ntk longrope
    """
)


def judge_key(name: str) -> Judgement:
    """What passing over this key of a Llama's config would mean."""
    if name in _CHANGES:
        return Judgement.CHANGES
    if name in _USUAL or name.startswith("_attn_implementation") or name in ("_name_or_path", "_commit_hash"):
        return Judgement.USUAL
    if name in _WITHOUT_EFFECT or name.startswith(_HARMLESS_BEGINNING):
        return Judgement.HARMLESS
    words = re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return Judgement.SUSPECT if _PARTS_OF_A_MODEL.intersection(words) else Judgement.HARMLESS
