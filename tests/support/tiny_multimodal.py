"""Tiny multimodal checkpoints, whose language models are those of tiny.py. Imported by make_golden.py, too."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny import random_weights, seed_of, tiny_configs


@dataclass(frozen=True)
class Multimodal:
    """A checkpoint as on the hub: config.json and the prefixes of its tensors."""

    text: str  # case of tiny.py
    config: dict[str, Any]
    layers: str = "model.language_model."  # instead of "model."
    head: str = "lm_head."
    others: tuple[str, ...] = ("model.visual.patch_embed.proj.weight",)  # tensors for images

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Of the file."""
        return self.text_tensors() | {name: np.ones((3, 5), np.float32) for name in self.others}

    def text_tensors(self) -> dict[str, NDArray[np.float32]]:
        return {self._renamed(name): values for name, values in self.weights().items()}

    def weights(self) -> dict[str, NDArray[np.float32]]:
        return random_weights(tiny_configs()[self.text], seed_of(self.text))

    def _renamed(self, name: str) -> str:
        is_head = name.startswith("lm_head.")
        return self.head + name.removeprefix("lm_head.") if is_head else self.layers + name.removeprefix("model.")


_PIXTRAL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def _text(case: str, model_type: str, **changes: Any) -> dict[str, Any]:
    config = {**tiny_configs()[case], "model_type": model_type, **changes}
    return {key: value for key, value in config.items() if key != "architectures" and value is not ...}


def multimodal() -> dict[str, Multimodal]:
    """By the name of the architecture."""
    axes = {"mrope_section": [2, 1, 1], "rope_type": "default", "type": "mrope"}
    flat = _text("qwen2", "qwen2_5_vl", rope_scaling=axes, rope_theta=1e6, rope_parameters=...)
    interleaved = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
    old = {"layers": "language_model.model.", "head": "language_model.lm_head."}
    old_others = ("vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight")
    smol = {"neftune_noise_alpha": 0.0, "perceiver_config": {"resampler_depth": 6}, "qk_layer_norms": False}
    return {
        "Gemma3": Multimodal(
            "gemma3",
            {
                "model_type": "gemma3",
                "text_config": _text("gemma3", "gemma3_text"),
                "vision_config": {"model_type": "siglip_vision_model", **_PIXTRAL, "image_size": 8, "patch_size": 4},
                "mm_tokens_per_image": 4,
                "image_token_index": 5,
            },
            **old,
            others=old_others,
        ),
        "Mistral3": Multimodal(
            "mistral",
            {
                "model_type": "mistral3",
                "text_config": _text("mistral", "mistral"),
                "vision_config": {"model_type": "pixtral", **_PIXTRAL, "head_dim": 8, "rope_theta": 10000.0},
                "spatial_merge_size": 2,
            },
            **old,
            others=old_others,
        ),
        "Qwen2_5_VL": Multimodal(
            "qwen2",
            {**flat, "vision_config": {"model_type": "qwen2_5_vl", **_QWEN, "out_hidden_size": 56}},
            layers="model.",
            others=("visual.merger.mlp.0.weight", "visual.blocks.0.norm1.weight"),
        ),
        "Qwen3VL": Multimodal(
            "qwen3",
            {
                "model_type": "qwen3_vl",
                "text_config": _text("qwen3", "qwen3_vl_text", rope_scaling=interleaved, tie_word_embeddings=...),
                "vision_config": {
                    **_QWEN,
                    "model_type": "qwen3_vl",
                    "out_hidden_size": 48,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
                "tie_word_embeddings": False,
            },
        ),
        "SmolVLM": Multimodal(
            "llama",
            {
                "model_type": "smolvlm",
                "text_config": _text("llama", "llama") | smol,
                "vision_config": {"model_type": "smolvlm_vision", **_PIXTRAL, "image_size": 8, "patch_size": 4},
                "vocab_size": 131,
                "scale_factor": 1,
            },
            layers="model.text_model.",
            others=("model.vision_model.embeddings.patch_embedding.weight", "model.connector.modality_projection.proj"),
        ),
    }


def architecture(name: str) -> dict[str, Any]:
    return {"architectures": [f"{name}ForConditionalGeneration"]}
