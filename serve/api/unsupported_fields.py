"""Fields to which other servers give a meaning that this one does not implement. Ignoring one would change the answer.

A field is refused unless its value is null or among those listed for it, which are off or the default there. Sources:
OpenAI, openai-python's `types/chat/completion_create_params.py`, and for `max_output_tokens` and the like its
`types/responses`; vLLM, `entrypoints/openai/{chat_completion,completion}/protocol.py` (`guided_*`: before 0.12);
SGLang, `srt/entrypoints/openai/protocol.py`, `srt/managers/io_struct.py`, `srt/sampling/sampling_params.py`; llama.cpp,
`tools/server/server-schema.cpp` and `README.md`; TGI, `docs/openapi.json`; Anthropic, POST /v1/messages, which vLLM,
SGLang and llama.cpp also serve; Alibaba's Model Studio, its OpenAI-compatible chat; Ollama, `docs/api.md`;
text-generation-webui, `extensions/openai/typing.py`.
"""

from typing import Any

type NeutralValues = tuple[Any, ...]

# Server -> pairs of fields and their values without effect. A field of several servers is listed for the first of them.
_FIELDS: dict[str, tuple[tuple[str, NeutralValues], ...]] = {
    "OpenAI": (
        ("functions", ([],)),
        ("function_call", ("none", "auto")),
        ("suffix instructions", ("",)),
        ("modalities", (["text"],)),
        ("audio prediction web_search_options moderation input max_output_tokens previous_response_id", ()),
        ("conversation max_tool_calls background_options context_management access_programs image", ()),
        ("truncation", ("disabled",)),
        ("verbosity", ("medium",)),
        ("background", (False,)),
    ),
    "vLLM": (
        ("use_beam_search early_stopping watermarking return_token_offsets", (False,)),
        ("length_penalty", (1,)),
        ("prompt_embeds repetition_detection", ()),
        ("logits_processors", ([],)),
        ("vllm_xargs kv_transfer_params ec_transfer_params mm_processor_kwargs media_io_kwargs", ({},)),
        ("joint", (False,)),
        ("videos", ([],)),
    ),
    "SGLang": (
        ("max_new_tokens sampling_seed input_ids input_embeds", ()),
        ("max_dynamic_patch min_dynamic_patch lora_path lora_id custom_logit_processor extra_key reasoning", ()),
        ("task token_ids_logprob", ()),
        ("stop_regex image_data video_data audio_data", ([],)),
        ("no_stop_trim use_audio_in_video require_reasoning no_logs return_logprob return_text_in_logprobs", (False,)),
        ("return_prompt_token_ids return_hidden_states return_cached_tokens_details", (False,)),
        ("return_meta_info return_sampling_mask return_entropy", (False,)),
        ("stream_reasoning", (True,)),
        ("min_new_tokens top_logprobs_num routed_experts_start_len", (0,)),
        ("sampling_params images_config custom_params session_params", ({},)),
        ("logprob_start_len", (-1,)),
        ("score_extraction_token embed_override_token_id query_embed_overrides item_embed_overrides", ()),
        ("return_pooled_hidden_states", (False,)),
        ("prompt_format_version", (1,)),
    ),
    "llama.cpp": (
        ("n_predict samplers generation_prompt reasoning_budget_start_tag reasoning_budget_end_tag", ()),
        ("reasoning_budget_end_tags add_special", ()),
        ("n_probs n_discard n_indent n_cache_reuse min_keep xtc_probability dynatemp_range dry_multiplier", (0,)),
        ("mirostat", (0,)),
        ("post_sampling_probs penalize_nl grammar_lazy reasoning_control return_tokens return_progress", (False,)),
        ("timings_per_token verbose with_pieces", (False,)),
        ("n_keep t_max_predict_ms t_max_prompt_ms", (0, -1)),
        ("n_cmpl typical_p tfs_z dynatemp_exponent repeat_penalty", (1,)),
        ("top_n_sigma dry_penalty_last_n", (-1, 0)),
        ("xtc_threshold mirostat_eta", (0.1,)),
        ("repeat_last_n adaptive_target", (-1,)),
        ("dry_base", (1.75,)),
        ("dry_allowed_length", (2,)),
        ("dry_sequence_breakers", (["\n", ":", '"', "*"],)),
        ("mirostat_tau", (5,)),
        ("adaptive_decay", (0.9,)),
        ("input_prefix input_suffix reasoning_budget_message", ("",)),
        ("grammar_triggers preserved_tokens lora multimodal_data input_extra response_fields", ([],)),
        ("parse_special", (True,)),
    ),
    "TGI": (
        ("inputs adapter_id truncate", ()),
        ("parameters", ({},)),
        ("do_sample", (True,)),
        ("watermark details decoder_input_details return_full_text", (False,)),
        ("top_n_tokens", (0,)),
        ("guideline tool_prompt", ("",)),
    ),
    "Anthropic": (
        ("system", ("",)),
        ("stop_sequences", ([],)),
        ("thinking", ({"type": "disabled"},)),
        ("max_tokens_to_sample container mcp_servers inference_geo diagnostics output_config output_format", ()),
        ("speed", ("standard",)),
    ),
    "Model Studio": (("enable_search", (False,)),),
    "TypeSafe": (("assets", ({},)),),
    "Ollama": (
        ("options", ({},)),
        ("format template", ("",)),
        ("context images", ([],)),
        ("raw think", (False,)),
        ("num_predict", ()),
    ),
    "text-generation-webui": (
        ("tfs smoothing_curve dynatemp_low dynatemp_high guidance_scale encoder_repetition_penalty num_beams", (1,)),
        ("top_a epsilon_cutoff eta_cutoff smoothing_factor mirostat_mode penalty_alpha repetition_penalty_range", (0,)),
        ("no_repeat_ngram_size min_length truncation_length max_tokens_second", (0,)),
        ("dynamic_temperature temperature_last ban_eos_token auto_max_new_tokens", (False,)),
        ("negative_prompt custom_token_bans grammar_string", ("",)),
        ("sampler_priority", ()),
        ("add_bos_token", (True,)),
        ("preset", ("None",)),
    ),
}
UNSUPPORTED_BY_SERVER: dict[str, dict[str, NeutralValues]] = {
    server: {name: values for names, values in groups for name in names.split()} for server, groups in _FIELDS.items()
}
UNSUPPORTED = {name: values for fields in UNSUPPORTED_BY_SERVER.values() for name, values in fields.items()}
# Known fields that concern the caller or the transport and never change an answer: accepted and ignored.
WITHOUT_EFFECT = frozenset(
    (
        # OpenAI
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_options", "prompt_cache_retention"),
        # vLLM
        *("spaces_between_special_tokens", "session_id", "stream_interval", "guided_decoding_backend"),
        "return_mm_kwargs",
        # Anthropic
        *("messages[].content[].cache_control", "cache_control", "user_profile_id", "workspace_id"),
        # SGLang
        *("rid", "bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank", "data_parallel_rank"),
        *("disagg_prefill_dp_rank", "routing_key", "conversation_id", "ngram_corpus_id", "custom_labels"),
        "log_metrics",
        # llama.cpp
        *("id_slot", "slot_id", "cache_prompt", "sse_ping_interval", "backend_sampling", "parse_tool_calls"),
        # Ollama, text-generation-webui
        *("keep_alive", "static_cache", "prompt_lookup_num_tokens"),
    )
)
