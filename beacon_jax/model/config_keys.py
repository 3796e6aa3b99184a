"""What keys of config.json mean that this package does not read.

A config may have a key that changes what its model computes, a cap on logits say, and
that only other families of decoders have. Read as a plain decoder such a model predicts
nonsense without a word. So a key that some decoder of transformers computes with, or
that is named like one (`foreign_keys`), is an error unless its value is that of a plain
decoder. Another key that nobody knows is a line of warning.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from beacon_jax.model.foreign_keys import computes, neutral
from beacon_jax.names import short

logger = logging.getLogger(__name__)

# Keys of ours -> spellings of other families, whose values mean the same.
ALIASES = {
    "hidden_size": ("d_model", "dim", "model_dim", "n_embd"),
    "num_hidden_layers": (
        "n_layer",
        "n_layers",
        "num_layers",
        "num_transformer_layers",
    ),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        *("kv_heads", "multi_query_group_num", "n_head_kv", "n_kv_head", "n_kv_heads"),
        *("n_query_groups", "num_kv_heads"),
    ),
    "intermediate_size": (
        *("d_ff", "ff_dim", "ff_intermediate_size", "ffn_dim", "ffn_hidden_size"),
        *("ffn_intermediate_size", "inner_hidden_size", "n_inner"),
    ),
    "head_dim": ("attention_head_dim", "kv_channels"),
    "hidden_act": ("activation_function", "hidden_activation"),
    "rms_norm_eps": (
        *("layer_norm_eps", "layer_norm_epsilon", "layernorm_eps", "layernorm_epsilon"),
        *("norm_eps", "norm_epsilon", "rms_eps", "rms_norm_epsilon", "rmsnorm_eps"),
    ),
    "rope_theta": (
        *("rope_base", "rope_emb_base", "rope_embedding_base", "rope_freq_base"),
        *("rope_freq_constant", "rotary_base", "rotary_emb_base"),
        *("rotary_embedding_base", "rotary_theta"),
    ),
    "tie_word_embeddings": (
        *("share_input_output_layers", "tie_embeddings", "tie_weights"),
        *("tied_embeddings", "weight_tying"),
    ),
}
# Of other programs, or of all models: Qwen2.5-1M's attention by chunks, rotary pairs
# that lie side by side, weights in another form.
OTHERS = (
    "dual_chunk_attention_config",
    "quantization_config",
    "rope_interleaved",
    "use_mrope",
)
# Of every model: training, generation, files and names, also of earlier versions.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    architectures attention_dropout auto_map bad_words_ids base_seqlen
    begin_suppress_tokens bos_token_id chunk_size_feed_forward context_length
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty
    max_context_length max_length max_position max_positions max_seq_len
    max_sequence_length min_length mlp_dropout model_max_length
    model_type n_ctx n_positions no_repeat_ngram_size num_beam_groups num_beams
    num_logits_to_keep num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id seq_length suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
# What `ModelConfig.from_hf` reads beside sizes and beacons.
READ = frozenset(
    """
    attention_bias layer_types max_position_embeddings max_window_layers mlp_bias
    original_max_position_embeddings partial_rotary_factor
    rope_parameters rope_scaling rope_theta sliding_window use_sliding_window
    vocab_size
    """.split()
)
# config.json key -> field; "" for those with a single supported value.
BEACON = {
    "beacon_window": "window",
    "beacon_stride": "",
    "beacon_attn": "",
    "beacon_attend_prev": "",
    "beacon_ratio": "ratios",
    "beacon_ratio_mix": "ratio_mix",
    "beacon_param": "param",
    "beacon_embed_init": "embed_init",
    "beacon_sink_size": "sink",
    "beacon_pos": "placement",
    "beacon_parallel_window": "parallel_window",
    "beacon_rank": "rank",
    "beacon_anchor": "anchor",
}
# Key -> its kind, of `check_value`; null stands for a key that is not given, where
# transformers' config classes take it so.
KINDS = {
    **dict.fromkeys(
        """
        beacon_parallel_window beacon_rank beacon_sink_size beacon_window head_dim
        hidden_size intermediate_size max_position_embeddings max_window_layers
        num_attention_heads num_hidden_layers num_key_value_heads
        original_max_position_embeddings sliding_window vocab_size
        """.split(),
        "whole",
    ),
    **dict.fromkeys(("partial_rotary_factor", "rms_norm_eps"), "number"),
    "rope_theta": "theta",
    **dict.fromkeys(
        """
        attention_bias beacon_attend_prev mlp_bias tie_word_embeddings
        use_sliding_window
        """.split(),
        "switch",
    ),
    **dict.fromkeys(
        """
        beacon_anchor beacon_attn beacon_embed_init beacon_pos beacon_ratio_mix
        hidden_act model_type
        """.split(),
        "text",
    ),
    **dict.fromkeys(("architectures", "beacon_param", "layer_types"), "texts"),
    **dict.fromkeys(("beacon_ratio", "beacon_stride"), "wholes"),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), "ids"),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), "object"),
}
NEEDED = ("hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
MOST = 2**31  # beyond every size and id
MOST_LAYERS = 10_000  # a name is made for every tensor of every layer
# Of the config classes of transformers' decoders; tests/model/test_config_keys.py
# derives it.
COMPUTING = frozenset(
    """
    H_cycles L_bp_cycles L_cycles _remove_final_layer_norm _sliding_window_pattern
    activation activation_sparsity_pattern adapter_layer_norm adapter_rank
    adapter_reduction_factor adapter_reuse_layer_norm add_bias_linear
    add_cross_attention add_out_norm afn alibi altup_active_idx altup_coef_clip
    altup_correct_scale altup_num_inputs apply_residual_connection_post_layernorm
    apply_spec_augment asm attention_chunk_size attention_head_size attention_heads
    attention_hidden_size attention_in_multiplier attention_k_eq_v attention_layers
    attention_multiplier attention_out_bias attention_out_multiplier
    attention_softmax_in_fp32 attention_type attention_types attention_value_scale
    attention_window_size attn_config attn_layer_indices attn_layer_offset
    attn_layer_period attn_layers attn_logit_softcapping attn_scale
    attn_temperature_tuning attn_type audio_chunk_size audio_config audio_encoder
    audio_encoder_config audio_merge_size audio_soft_tokens_per_image audio_vocab_size
    autocast_kernel_dtype axial_pos_embds axial_pos_embds_dim axial_pos_shape
    backbone_hidden_size bi_data bias block_auto_adjust_ff_dim block_ffn_dim_multiplier
    block_multiple_of block_size block_types causal cca_time0 cca_time1
    centroid_intermediate_top_k chain_hidden_post_norm chroma_length chunk_size
    chunk_size_lm_head clamp_len classifier_activation classifier_bias
    classifier_proj_size clip_qkv compress_rates compress_rope_theta concat_input
    conv1d_width conv_bias conv_kernel_size cross_attention_hidden_size cross_attn_k
    d_head d_inner d_rel decoder decoder_attention_heads decoder_bias decoder_config
    decoder_ffn_dim decoder_layers decoder_sparse_step decoder_vocab_size
    dense_intermediate_size depth_decoder_config dff dim_ff dim_head dim_model_base
    do_layer_norm_before emb_dim embedding_dim embedding_fraction embedding_multiplier
    embedding_scale embedding_size enable_bias enable_moe_block enable_moe_fp32_combine
    enable_pronunciation enable_shape encoder_attention_heads encoder_config
    encoder_ffn_dim encoder_hash_byte_group_nb_functions encoder_hash_byte_group_size
    encoder_hash_byte_group_vocab encoder_layers eps expand expansion_ratio
    expert_ffn_hidden_size expert_layer_offset expert_layer_period expert_selection_fn
    feed_forward_size ff_activation ffn_config ffn_proj_factor
    ffn_round_up_to_multiple_of final_logit_softcapping first_k_dense_replace
    floor_scale full_attn_alpha_factor full_attn_beta_factor full_attn_idxs
    gate_soft_cap gated_norm_rank gating gelu_activation global_attn_every_n_layers
    global_config hc_count hc_eps hc_lowrank hc_magnitude hc_mult hc_sinkhorn_iters
    heads_per_ngram hidden_mamba_act hidden_size_per_layer_input hybrid_layer_ids
    image_seq_length image_size index_block_size index_head_dim index_local_blocks
    index_n_heads index_topk index_topk_blocks indexer_budget indexer_compress_ratio
    indexer_head_dim indexer_kv_heads indexer_n_heads indexer_types
    inference_state_dtype input_embedding_size interleave_moe_layer_step
    intermediate_multiple_size intermediate_size_mlp is_moe kda_lower_bound
    kda_safe_gate keep_window_size key_multiplier kv_lora_rank lambda_std_dev
    laurel_rank layer_group_size layer_norm_elementwise_affine layer_rope_theta
    layernorm_embedding layers_block_type learned_pos_emb linear_a_log_max
    linear_a_log_min linear_allow_neg_eigval linear_attn_alpha_factor
    linear_attn_beta_factor linear_conv_kernel_dim linear_dt_max linear_dt_min
    linear_head_dim linear_key_head_dim linear_num_heads linear_num_key_heads
    linear_num_value_heads linear_value_head_dim lm_head_bias lm_head_multiplier
    ln_before_adapter local_attention local_attention_window_len local_attn_chunk_length
    local_layer_ids local_num_chunks_after local_num_chunks_before log_scaling_alpha
    log_scaling_n_floor logit_scale logits_mup_width_multiplier logits_scaling
    logits_soft_cap loop_gate_rank loop_layer_index_end loop_layer_index_start
    loop_num_passes lru_width lsh_attn_chunk_length lsh_num_chunks_after
    lsh_num_chunks_before make_ngram_vocab_size_divisible_by mamba_chunk_size
    mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_ssm mamba_d_state mamba_dt_rank
    mamba_expand mamba_head_dim mamba_headdim mamba_hidden_act mamba_n_groups
    mamba_n_heads mamba_ngroups mamba_norm_before_gate mamba_num_heads mamba_proj_bias
    mamba_rms_norm max_inference_chunksize max_patch_length max_source_positions
    max_target_positions median_filter_width mem_len mixer_rms_eps mlp_alpha_factor
    mlp_beta_factor mlp_gate_softcap mlp_hidden_act mlp_layer_types mlp_multipliers
    mlp_only_layers mlp_up_softcap mm_tokens_per_image mode
    moe_apply_router_weight_on_input moe_intermediate_size moe_k moe_latent_size
    moe_layer_end_index moe_layer_interval moe_layer_start_index moe_layers moe_norm_min
    moe_num_experts moe_num_shared_experts moe_renormalize moe_routed_scaling_factor
    moe_router_logit_softcapping moe_shared_expert_intermediate_size
    moe_shared_expert_overlap moe_topk mtp_hidden_states_first mtp_layer_types
    mtp_layers_block_type mtp_local_layer_ids mtp_mlp_layer_types multi_query
    mup_enabled n_group n_groups n_input_layers n_langs n_layers_per_attn_res_block
    n_mamba_heads n_output_layers n_recurrent_layers n_recurrent_loops n_routed_experts
    n_shared_experts new_decoder_architecture ngram ngram_size ngram_vocab_size_base
    no_bias no_rope_layer_interval no_rope_layers norm_bias
    norm_reduction_force_float32 norm_topk_prob norm_type num_attention_heads_per_layer
    num_blocks num_buckets num_centroids num_channels num_chroma num_codebooks
    num_decoder_attention_heads num_decoder_layers num_dense_layers
    num_encoder_attention_heads num_encoder_layers num_expert_group num_experts
    num_experts_per_tok num_experts_per_token num_hashes num_image_with_embedding
    num_kv_shared_layers num_layers_per_stack num_ln_in_parallel_attn num_local_experts
    num_mel_bins num_mem_blocks num_mtp_layers num_nextn_predict_layers num_query_groups
    num_random_blocks num_shared_experts number_of_conv_states o_groups o_lora_rank
    parallel_attn patch_in_forward patch_size patcher_config patching_batch_size
    patching_mode patching_threshold per_layer_config ple_conv_kernel_size ple_embed_dim
    ple_layer_ids pooling position_bias_max_distance position_bias_num_buckets
    position_embedding_type pre_norm prefix_dense_intermediate_size
    prefix_dense_sliding_window_pattern prefix_lm projector_bias projector_hidden_act
    projectors_bias prompt_length prompt_mid_dim prompt_types pronunciation_embed_dim
    pronunciation_vocab_size q_lora_rank qk_dim_factor qk_head_dim qk_l2_clip_threshold
    qk_layernorm qk_nope_head_dim qk_rope_head_dim qkv_bias query_pre_attn_scalar
    rel_extent rel_l2_clip_threshold relative_max_distance reorder_and_upcast_attn
    rescale_embeddings rescale_every rescale_prenorm_residual residual_in_fp32
    residual_multiplier reuse_len rms_norm_eps_moe_gate rope_interleave rotary_dim
    rotary_value route_scale routed_scaling_factor router_hidden_size
    router_scaling_factor same_length scale_attention_softmax_in_fp32
    scale_attn_by_inverse_layer_idx scale_attn_weights scale_depth scale_emb
    scale_embedding scoring_func segment_types shape_embed_dim shape_vocab_size
    share_encoder_decoder_embeddings shared_expert_combination_strategy
    shared_expert_intermediate_size shared_expert_sink shared_experts_intermediate_size
    shared_intermediate_size short_conv_kernel_size sinusoidal_embeddings
    sliding_window_pattern sliding_window_size slow_but_exact split_ngram_parts
    ssm_in_multiplier ssm_multipliers ssm_out_multiplier ssm_state_size state_size
    swa_head_dim swa_num_attention_heads swa_num_key_value_heads swiglu_alpha
    swiglu_limit task_type_vocab_size text_config text_encoder time_step_floor
    time_step_limit time_step_max time_step_min time_step_rank time_step_scale
    top_k_experts topk_group topk_method type_vocab_size unpadded_vocab_size
    use_associative_scan use_attention_gate use_bias use_bidirectional_attention
    use_conv_bias use_double_wide_mlp use_expert_bias use_lang_emb
    use_learned_position_embeddings use_long_context use_mambapy use_mem_eff_path
    use_mem_rope use_mems_eval use_mems_train use_ordered_embeddings
    use_parallel_residual use_post_norm use_prompt use_qk_norm use_qkv_bias
    use_sandwich_norm use_shared_attention_adapter use_task_id use_weighted_layer_sum
    v_dim_factor v_head_dim vision_config vision_soft_tokens_per_image
    vocab_size_per_layer_input vocabulary_map vq_config weight_mode window_size
    word_embed_proj_dim zero_expert_num
    """.split()
)


def check_types(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that is read and whose value is of another type."""
    if own := sorted(key for key in hf if key.startswith("ultragist_")):
        raise ValueError(
            f"config.json has {', '.join(own)}: this is an UltraGist model, a "
            "predecessor of Activation Beacon that computes something else (each gist "
            "attends to a part of its window only), and is not supported. Give a model "
            "of Activation Beacon, or the plain one that it was trained from."
        )
    for key, kind in KINDS.items():
        if key in hf and (hf[key] is not None or key in NEEDED):
            check_value(key, hf[key], kind)
    layers = hf.get("num_hidden_layers")
    if layers is not None and layers > MOST_LAYERS:
        raise ValueError(
            f"config.json has num_hidden_layers={layers}: at most {MOST_LAYERS} are "
            "possible. Mend or replace it."
        )


def check_value(key: str, value: Any, kind: str) -> None:
    """Raises ValueError, naming the key of config.json, if a value is of another kind.

    A number in quotes is none: transformers refuses it, too.
    """
    fits, wanted = _FITS[kind]
    if not fits(value):
        hint = ""
        if isinstance(value, str) and kind not in ("text", "texts", "object"):
            hint = ", without quotes"
        elif value is None:
            hint = ", or leave the key out"
        elif type(value) is float and value.is_integer() and fits(int(value)):
            hint = f", {int(value)} without a point"
        raise ValueError(
            f"config.json has {key}={short(repr(value))}: it must be {wanted}{hint}."
        )


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < MOST


def _id(value: Any) -> bool:
    return _whole(value) and value >= 0


def _number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


_FITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "whole": (_whole, f"a whole number below {MOST}"),
    "number": (_number, "a number"),
    "theta": (lambda x: _number(x) and x >= 1, "a number of at least 1"),
    "switch": (lambda x: isinstance(x, bool), "true or false"),
    "text": (_text, "a text"),
    "texts": (_all(_text), "a list of texts"),
    "wholes": (
        lambda x: _whole(x) or _all(_whole)(x),
        "a whole number, or a list of them",
    ),
    "ids": (
        lambda x: _id(x) or _all(_id)(x),
        "a token's id, or a list of them",
    ),
    "object": (lambda x: isinstance(x, Mapping), "an object"),
}


def spelt(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the values of other spellings under our keys, too.

    Raises:
      ValueError: two spellings differ, or a value is of another type.
    """
    result = dict(hf)
    for key, names in ALIASES.items():
        for name in names:
            if (there := hf.get(name)) is None:
                continue
            if (here := result.get(key)) is None:
                here = result[key] = there
            if here != there:
                first = next(x for x in (key, *names) if hf.get(x) == here)
                raise ValueError(
                    f"config.json has {name}={short(repr(there))} and "
                    f"{first}={short(repr(here))}, two spellings of one value: delete "
                    "the wrong one."
                )
            if hf.get(key) is None:
                check_value(name, there, KINDS[key])
    return result


def check(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that changes the computation and is not read here."""
    if (found := hf.get("quantization_config")) and not neutral("", found, hf):
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        raise ValueError(
            f"config.json has quantization_config ({method or 'of no known method'}): "
            "quantized weights in this form are not supported. Give the checkpoint "
            "that they were made of, or a GGUF file of the model."
        )
    for key, value in hf.items():
        listed = key in COMPUTING or key in OTHERS
        if not (listed or (key not in _known() and computes(key))):
            continue
        if neutral(key, value, hf):
            continue
        what = "changes what a model computes, and is not supported"
        if not listed:
            what = "is not known, and by its name changes what a model computes"
        remedy = ""
        if re.search(r"(rope|rotary).*(scal|ratio|factor|base|theta)", key):
            remedy = ", or write what it means as rope_theta or rope_scaling"
        raise ValueError(
            f"{key}={short(repr(value))} {what}. If this model was made without it, "
            f"delete it from config.json{remedy}."
        )


def warn_unknown(hf: Mapping[str, Any]) -> None:
    """Names in one line of warning the keys that nobody knows."""
    known = _known() | COMPUTING | {*OTHERS}
    unknown = [k for k in hf if k not in known and not computes(k)]
    if unknown:
        logger.warning(
            "config.json has keys that are not known here and are ignored: %s",
            ", ".join(sorted(unknown)),
        )


@functools.cache
def _known() -> frozenset[str]:
    """Returns the keys that are read, and those that no model computes with."""
    aliases = (name for names in ALIASES.values() for name in names)
    # beacon_base: of an adapter.
    return READ | HARMLESS | {*ALIASES, *aliases, *BEACON, "beacon_base"}
