"""Keys of config.json by their effect on the arithmetic. All others are refused: no setting is ignored silently."""

from typing import Any

# Read for every family; those of some families are in `Family.hf_defaults`.
READ = frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "hidden_activation"),
        *("tie_word_embeddings", "max_position_embeddings", "original_max_position_embeddings", "layer_types"),
        *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "quantization_config"),
    )
)
# Without effect: written by transformers 4 and 5 for bookkeeping, training and generation, or by common tools.
IGNORED = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash"),
        *("_experts_implementation_internal", "_flash_attn_2_enabled", "_name_or_path", "_output_attentions"),
        *("_sliding_window_pattern", "attn_implementation", "auto_map", "cache_implementation", "dtype"),
        *("experts_implementation", "finetuning_task", "id2label", "initializer_range", "is_decoder"),
        *("is_llama_config", "label2id", "max_window_layers", "name_or_path", "num_labels", "output_attentions"),
        *("output_hidden_states", "prefix", "problem_type", "return_dict", "task_specific_params", "tf_legacy_loss"),
        *("tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config"),
        *("transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache"),
        # training
        *("attention_dropout", "chunk_size_feed_forward", "embd_pdrop", "pretraining_tp", "resid_pdrop"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        # generation
        *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
        *("bos_token_id", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id"),
        *("epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "min_p"),
        *("no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups"),
        *("num_beams", "num_return_sequences", "output_scores", "pad_token_id", "remove_invalid_values"),
        *(
            "repetition_penalty",
            "return_dict_in_generate",
            "sep_token_id",
            "suppress_tokens",
            "unk_token_id",
            "target_lookbehind",
        ),
        *("temperature", "top_k", "top_p", "typical_p"),
    )
)
# Values at which keys that are not supported have no effect.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_encoder_decoder": False,
    "lm_head_bias": False,
    "mlp_bias": False,
    "pruned_heads": {},
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
# The same for the objects `rope_parameters` and `rope_scaling`.
ROPE_READ = frozenset(
    (
        *("rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor"),
        *("low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
    )
)
