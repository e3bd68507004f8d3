"""The language models of multimodal checkpoints: their part of config.json and the names of their tensors.

Images and audio are not served. Rotary embedding over three axes ("mrope") is the usual one for text, whose positions
are equal on all axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.config import ConfigError, check_keys, mapping_of, short_repr
from model.hf_keys import IGNORED


@dataclass(frozen=True, slots=True, kw_only=True)
class TextHalf:
    """The language model of one multimodal architecture."""

    hf_architecture: str
    model_type: str
    families: Mapping[str, str]  # model_type of `text_config`, the usual one first -> architecture of the family
    tied: bool = False  # default of tie_word_embeddings
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of transformers for keys that `text_config` lacks
    is_flat: bool = False  # older files have the keys of `text_config` at the top


_QWEN_VL: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
_LLAMA: dict[str, Any] = {"num_attention_heads": 32, "max_position_embeddings": 2048}

TEXT_HALVES = (
    TextHalf(
        hf_architecture="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        families={"gemma3_text": "Gemma3ForCausalLM"},
        tied=True,
        defaults={"vocab_size": 262208, "num_attention_heads": 8},
    ),
    TextHalf(
        hf_architecture="Mistral3ForConditionalGeneration",
        model_type="mistral3",
        families={"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
        tied=True,
    ),
    TextHalf(
        hf_architecture="Qwen2VLForConditionalGeneration",
        model_type="qwen2_vl",
        families={"qwen2_vl_text": "Qwen2ForCausalLM", "qwen2_vl": "Qwen2ForCausalLM"},
        defaults=_QWEN_VL,
        is_flat=True,
    ),
    TextHalf(
        hf_architecture="Qwen2_5_VLForConditionalGeneration",
        model_type="qwen2_5_vl",
        families={"qwen2_5_vl_text": "Qwen2ForCausalLM", "qwen2_5_vl": "Qwen2ForCausalLM"},
        defaults=_QWEN_VL,
        is_flat=True,
    ),
    TextHalf(
        hf_architecture="Qwen3VLForConditionalGeneration",
        model_type="qwen3_vl",
        families={"qwen3_vl_text": "Qwen3ForCausalLM"},
        defaults={"rope_theta": 5e5, "max_position_embeddings": 128000},
    ),
    TextHalf(
        hf_architecture="Idefics3ForConditionalGeneration",
        model_type="idefics3",
        families={"llama": "LlamaForCausalLM"},
        defaults=_LLAMA,
    ),
    TextHalf(
        hf_architecture="SmolVLMForConditionalGeneration",
        model_type="smolvlm",
        families={"llama": "LlamaForCausalLM"},
        defaults=_LLAMA,
    ),
)

# Keys at the top that concern images, video and audio only.
_OTHER_HALF = frozenset(
    (
        *("text_config", "vision_config", "audio_config", "image_token_id", "image_token_index", "video_token_id"),
        *("vision_start_token_id", "vision_end_token_id", "vision_token_id", "boi_token_index", "eoi_token_index"),
        *("mm_tokens_per_image", "projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size"),
        *("vision_feature_layer", "scale_factor", "_pad_token_id", "use_reentrant_checkpointing"),
    )
)
# Keys of `text_config` that concern the other half, or training.
_UNUSED = ("neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor")
_NEUTRAL = {"qk_layer_norms": False, "use_resampler": False}
_AXES = ("mrope_section", "mrope_interleaved")  # of rotary parameters; without effect on text
_NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
)
_SKIPPED = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "audio_tower")


def text_half_of(config: Mapping[str, Any]) -> TextHalf | None:
    """The row of a multimodal config.json; None if it is that of a language model."""
    names, kind = config.get("architectures"), config.get("model_type")
    if isinstance(names, list) and names:
        return next((half for half in TEXT_HALVES if half.hf_architecture in names), None)
    return next((half for half in TEXT_HALVES if half.model_type == kind), None)


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the language model alone; the same mapping if it already is one.

    Raises:
        ConfigError: names the key that is missing or not supported.
    """
    half = text_half_of(config)
    if half is None:
        return config
    if config.get("model_type") not in (None, half.model_type):
        raise ConfigError(f"model_type {short_repr(config['model_type'])} is not that of {half.hf_architecture}")
    text = dict(mapping_of(config, "text_config"))
    outer = {key: value for key, value in config.items() if key not in _OTHER_HALF}
    if not text and half.is_flat:
        text, outer = outer, {}
    if not text:
        raise ConfigError("text_config is missing: the checkpoint has no language model")
    shared = ("tie_word_embeddings", "quantization_config")
    check_keys(outer, {*IGNORED, "architectures", "model_type", *shared}, text)
    usual = next(iter(half.families))
    kind = text.pop("model_type", usual)
    if kind not in half.families:
        known = ", ".join(half.families)
        raise ConfigError(f"text_config.model_type {short_repr(kind)} is not supported; known: {known}")
    check_keys({key: text.pop(key, None) for key in _NEUTRAL}, (), _NEUTRAL, "text_config.")
    text = {key: value for key, value in text.items() if key not in _UNUSED}
    text |= {key: _without_axes(text[key]) for key in ("rope_scaling", "rope_parameters") if key in text}
    text |= {key: outer[key] for key in shared if outer.get(key) is not None}
    return {**half.defaults, "tie_word_embeddings": half.tied, **text, "architectures": [half.families[kind]]}


def _without_axes(parameters: Any) -> Any:
    """Rotary parameters for text."""
    if not isinstance(parameters, Mapping) or not any(key in parameters for key in _AXES):
        return parameters
    kept = {key: value for key, value in parameters.items() if key not in _AXES}
    return kept | {key: "default" for key in ("rope_type", "type") if kept.get(key) == "mrope"}


def text_tensor(name: str) -> str | None:
    """The name of a multimodal checkpoint's tensor in a language model alone; None if it is not part of that."""
    if name.removeprefix("model.").split(".", 1)[0] in _SKIPPED:
        return None
    prefix, new = next(((prefix, new) for prefix, new in _NAMES if name.startswith(prefix)), ("", ""))
    return new + name.removeprefix(prefix)
