"""Each family's tiny model as a GGUF file gives the network and the weights of its Hugging Face directory."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from model.config import ModelConfig
from model.weight_specs import ExpertSlice, TensorSpec
from model.weights.checkpoint import Checkpoint
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, load_weights, open_checkpoint
from tests.support.tiny import latent_configs, random_weights, tiny_configs, write_checkpoint

# Mistral's GGUF files are llama's; those of latent attention are tested in test_latent.py.
CASES = sorted(tiny_configs().keys() - {"mistral", "apertus", "helium"} - latent_configs().keys())


def of_expert(weights: dict[str, NDArray[Any]], tensor: TensorSpec) -> NDArray[Any]:
    values, place = weights[tensor.hf], tensor.hf_slice
    if place is None:
        return values
    assert isinstance(place, ExpertSlice)
    own = (
        values[place.expert].T if place.interleaved or tensor.hf.endswith("experts.down_proj") else values[place.expert]
    )
    part: NDArray[Any] = own[place.part :: place.parts] if place.interleaved else np.split(own, place.parts)[place.part]
    return part


def expressible(case: str) -> dict[str, Any]:
    """The `config.json` of a case, changed where it has what GGUF files cannot say."""
    hf = tiny_configs()[case]
    if case == "smollm3":  # every fourth layer has no rotary embedding
        hf = hf | {"num_hidden_layers": 4, "no_rope_layers": None}
    if case == "gemma3":  # every sixth layer has full attention, and scores are scaled by the head size
        kinds = [*["sliding_attention"] * 5, "full_attention"]
        hf = hf | {"num_hidden_layers": 6, "layer_types": kinds, "query_pre_attn_scalar": 16}
    if case == "gemma2":
        hf = hf | {"query_pre_attn_scalar": 16}
    if case == "qwen3moe":  # all layers have experts
        hf = hf | {"mlp_only_layers": []}
    return hf


def write_gguf(
    path: Path,
    hf: dict[str, Any],
    weights: dict[str, NDArray[np.float32]],
    config: ModelConfig,
    *,
    experts_as: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokens: Sequence[str] = (),
) -> Path:
    """Write the file as llama.cpp's converter does. The last of `tokens`, if any, is "ab"."""
    family = config.traits
    expert_arch = family.experts and family.experts.gguf_architecture
    arch = {"olmo3": "olmo2"}.get(family.name, expert_arch or family.name)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if family.norm == "layer":
        writer.add_layer_norm_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family.partial_rotary:
        writer.add_rope_dimension_count(config.rotated_dims)
    if family.name in ("granite", "granitemoe", "cohere2"):
        writer.add_logit_scale(hf["logits_scaling"] if family.name != "cohere2" else config.logit_scale)
    if family.name in ("granite", "granitemoe"):
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_attention_scale(config.attention_scale)
    if family.name in ("olmo3", "exaone4", "cohere2"):
        writer.add_sliding_window_pattern([kind.window > 0 for kind in config.layers])
    if growth := config.layers[0].query_growth:
        writer.add_attn_temperature_scale(growth[0])
        writer.add_rope_scaling_yarn_log_mul(1.0)
    writer.add_vocab_size(config.vocab_size)
    rope = next(kind.rope for kind in reversed(config.layers) if kind.rope is not None)
    writer.add_rope_freq_base(rope.theta)
    if window := max(kind.window for kind in config.layers):
        writer.add_sliding_window(window)
    for key, cap in (("attn_logit_softcapping", config.attention_cap), ("final_logit_softcapping", config.logit_cap)):
        if cap:
            writer.add_float32(f"{arch}.{key}", cap)
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        writer.add_expert_feed_forward_length(config.experts.size)
    _add_rope(writer, hf, rope)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
        writer.add_token_merges(["a b"])
    for weight in config.weights().values():
        if weight.tensors[0].gguf_slice is not None:
            values = np.stack([of_expert(weights, tensor) for tensor in weight.tensors])
            kind = experts_as if weight.role == "experts" else GGMLQuantizationType.F32
            writer.add_tensor(weight.tensors[0].gguf, gguf.quants.quantize(values, kind), raw_dtype=kind)
            continue
        for tensor in weight.tensors:
            values = np.atleast_1d(weights[tensor.hf])
            if tensor.is_norm:
                values = values + np.float32(family.hf_norm_offset)
            if tensor.heads and family.gguf_interleaved_rotary:
                pairs = values.reshape(config.dims()[tensor.heads], 2, -1, *values.shape[1:])
                values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
            writer.add_tensor(tensor.gguf, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope(writer: gguf.GGUFWriter, hf: dict[str, Any], rope: Any) -> None:
    parameters = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or parameters.get("full_attention") or parameters
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(rope.divisors, np.float32))
    elif kind == "longrope":
        writer.add_tensor("rope_factors_short.weight", np.array(rope.divisors, np.float32))
        writer.add_tensor("rope_factors_long.weight", np.array(rope.long_divisors, np.float32))
        writer.add_rope_scaling_orig_ctx_len(rope.short_length)
        writer.add_rope_scaling_attn_factors(rope.scale)
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def of_checkpoint(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    return load_weights(checkpoint, Storage(np.dtype(np.float32), "none"), lambda _, rows: rows.read())


@pytest.mark.parametrize("case", CASES)
def test_gguf_file_equals_the_hf_directory(tmp_path: Path, case: str) -> None:
    hf = expressible(case)
    weights = random_weights(hf, 1)
    folder = tmp_path / "hf"
    folder.mkdir()
    write_checkpoint(folder, hf, weights)
    with closing(open_checkpoint(ModelSource("hf", folder))) as checkpoint:
        expected, config = of_checkpoint(checkpoint), checkpoint.config
    path = write_gguf(tmp_path / "m.gguf", hf, weights, config)
    with closing(open_checkpoint(ModelSource("gguf", path))) as checkpoint:
        found, read = of_checkpoint(checkpoint), checkpoint.config
    assert _rounded(read) == _rounded(config)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def _rounded(config: ModelConfig) -> ModelConfig:
    """A number rounded to float32, as GGUF stores it."""

    def short(value: float) -> float:
        return float(f"{value:.6g}")

    scales = {name: short(getattr(config, name)) for name in ("attention_scale", "logit_scale", "rms_norm_eps")}
    layers = []
    for kind in config.layers:
        rope = kind.rope
        if rope is not None:
            divisors, long = (tuple(map(short, factors)) for factors in (rope.divisors, rope.long_divisors))
            rope = replace(
                rope, theta=short(rope.theta), divisors=divisors, long_divisors=long, scale=short(rope.scale)
            )
        layers.append(replace(kind, rope=rope))
    return replace(config, layers=tuple(layers), **scales)  # type: ignore[arg-type]
