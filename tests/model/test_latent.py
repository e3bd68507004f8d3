"""Multi-head latent attention: GGUF files in both forms, the cache, and what is refused."""

import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from model.config import ConfigError, ModelConfig
from model.config_hf import config_from_hf
from model.kv_cache import PAGE_SIZE, CacheLayout
from model.sharding import TensorParallel
from model.weights.checkpoint import Checkpoint, ModelLoadError
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, check_headers, load_weights, open_checkpoint
from tests.support.tiny import latent_configs, random_weights, tiny_configs, write_checkpoint

type Tensors = dict[str, NDArray[np.float32]]
CASES = ["deepseek2", "deepseek3"]
# Of mutated configurations: (accepted here, accepted by transformers).
COUNTS = {(True, True): 72, (True, False): 2, (False, True): 61, (False, False): 15}


def loaded(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    return load_weights(checkpoint, Storage(np.dtype(np.float32), "none"), lambda _, rows: rows.read())


def write_gguf(path: Path, config: ModelConfig, weights: Tensors, *, split: bool, joined_as: str = "F32") -> Path:
    """Write the file as llama.cpp's converter does: keys and values of heads apart, or together as before 2025."""
    latent, experts = config.latent, config.experts
    assert latent is not None
    assert experts is not None
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(1 if split else config.num_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.layers[0].rope
    assert rope is not None
    assert rope.yarn is not None
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(latent.rope)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope.yarn[0])
    writer.add_rope_scaling_orig_ctx_len(rope.yarn[1])
    growth = (config.attention_scale * latent.query**0.5) ** 0.5
    writer.add_rope_scaling_yarn_log_mul((growth - 1) / np.log(rope.yarn[0]))
    writer.add_key_length(latent.cached if split else latent.query)
    writer.add_value_length(latent.rank if split else latent.value)
    if split:
        writer.add_key_length_mla(latent.query)
        writer.add_value_length_mla(latent.value)
    writer.add_kv_lora_rank(latent.rank)
    if latent.query_rank:
        writer.add_q_lora_rank(latent.query_rank)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(experts.count)
    writer.add_expert_used_count(experts.per_token)
    writer.add_expert_shared_count(experts.shared_size // experts.size)
    writer.add_expert_feed_forward_length(experts.size)
    writer.add_expert_weights_scale(experts.scale)
    writer.add_expert_weights_norm(experts.normalized)
    if experts.scoring == "sigmoid":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(experts.groups)
        writer.add_expert_group_used_count(experts.open_groups)
    for spec in config.weights().values():
        if spec.path.endswith((".k_b.weight", ".v_b.weight")):
            continue
        if spec.role == "experts":
            writer.add_tensor(spec.tensors[0].gguf, np.stack([weights[tensor.hf] for tensor in spec.tensors]))
            continue
        for tensor in spec.tensors:
            writer.add_tensor(tensor.gguf, weights[tensor.hf])
    for i in range(config.num_layers):
        kv_b = weights[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
        keys, values = np.split(kv_b.reshape(config.num_heads, -1, latent.rank), [latent.nope], axis=1)
        if split:
            writer.add_tensor(f"blk.{i}.attn_k_b.weight", np.ascontiguousarray(keys.swapaxes(1, 2)))
            writer.add_tensor(f"blk.{i}.attn_v_b.weight", np.ascontiguousarray(values))
        else:
            kind = GGMLQuantizationType[joined_as]
            writer.add_tensor(f"blk.{i}.attn_kv_b.weight", gguf.quants.quantize(kv_b, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hf_folder(folder: Path, hf: dict[str, Any], extra: Tensors | None = None) -> Tensors:
    folder.mkdir(exist_ok=True)
    weights: Tensors = random_weights(hf, 1)
    write_checkpoint(folder, hf, weights | (extra or {}))
    return weights


@pytest.mark.parametrize("split", [True, False], ids=["split", "joined"])
@pytest.mark.parametrize("case", CASES)
def test_gguf_file_equals_the_hf_directory(tmp_path: Path, case: str, split: bool) -> None:
    hf = tiny_configs()[case]
    if case == "deepseek2":  # llama.cpp has no groups of a softmax
        hf = hf | {"topk_method": "greedy"}
    weights = hf_folder(tmp_path / "hf", hf)
    with closing(open_checkpoint(ModelSource("hf", tmp_path / "hf"))) as checkpoint:
        expected, config = loaded(checkpoint), checkpoint.config
    path = write_gguf(tmp_path / "m.gguf", config, weights, split=split)
    with closing(open_checkpoint(ModelSource("gguf", path))) as checkpoint:
        found, read = loaded(checkpoint), checkpoint.config
    assert read.attention_scale == pytest.approx(config.attention_scale, rel=1e-6)
    assert replace(read, attention_scale=config.attention_scale) == config
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_keys_of_a_quantized_tensor_have_its_exact_values(tmp_path: Path) -> None:
    """Those of keys are transposed, which no block format survives; those of values keep their blocks."""
    hf = tiny_configs()["deepseek2"] | {
        "topk_method": "greedy",
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    weights = hf_folder(tmp_path / "hf", hf)
    config = config_from_hf(hf)
    path = write_gguf(tmp_path / "m.gguf", config, weights, split=False, joined_as="Q8_0")
    storage = Storage(np.dtype(np.float32), packs=True)
    with closing(open_checkpoint(ModelSource("gguf", path))) as checkpoint:
        stored = checkpoint.read("blk.1.attn_kv_b.weight").reshape(4, 64, 64)
        formats = {
            target.path: {item.name for item in storage.formats(target, checkpoint.names())}
            for target in check_headers(checkpoint)
        }
        values = loaded(checkpoint)
    assert formats["layers.1.attention.k_b.weight"] == {"F32"}
    assert formats["layers.1.attention.v_b.weight"] == {"Q8_0"}
    keys = values["layers.1.attention.k_b.weight"].reshape(4, 64, 32)
    np.testing.assert_array_equal(keys, stored[:, :32].swapaxes(1, 2))
    np.testing.assert_array_equal(values["layers.1.attention.v_b.weight"].reshape(4, 32, 64), stored[:, 32:])


def test_a_page_holds_one_latent_per_token_and_layer() -> None:
    config = config_from_hf(tiny_configs()["deepseek2"])
    layout = CacheLayout(TensorParallel(config), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    experts = config.num_layers * 3
    assert layout.bytes_per_page == PAGE_SIZE * (2 * (24 + 8) * 2 + 48 * 4 + experts)
    assert layout.shape(5).layers[0].latent.shape == (5, 1, PAGE_SIZE, 32)


def test_layers_that_predict_further_tokens_are_skipped(tmp_path: Path) -> None:
    hf = tiny_configs()["deepseek3"] | {"num_nextn_predict_layers": 1}
    extra = {"model.layers.2.eh_proj.weight": np.zeros((48, 96), np.float32)}
    hf_folder(tmp_path, hf, extra)
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint:
        assert checkpoint.skipped == {"model.layers.2.eh_proj.weight": 4 * 48 * 96}
        loaded(checkpoint)
    hf_folder(tmp_path, hf | {"num_nextn_predict_layers": 0}, extra)
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint, pytest.raises(ModelLoadError) as caught:
        loaded(checkpoint)
    assert "model.layers.2.eh_proj.weight: unexpected" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("deepseek2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("deepseek2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("deepseek2", {"topk_group": 5}, "5 of 4 groups"),
        ("deepseek2", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ("deepseek2", {"head_dim": 16}, "head_dim 16"),
        ("deepseek2", {"attention_bias": True}, "attention_bias True"),
        ("deepseek2", {"n_shared_experts": 0}, "n_shared_experts"),
        ("deepseek3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("deepseek3", {"n_group": 3}, "into 3 groups"),
        ("deepseek3", {"n_group": 8}, "into 8 groups"),
        ("deepseek3", {"num_experts": 4}, "num_experts 4"),
        ("deepseek3", {"index_topk": 64}, "index_topk 64"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace 2"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(case: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_from_hf(tiny_configs()[case] | change)


def test_layers_with_experts_follow_the_configuration() -> None:
    def sparse(case: str, **change: Any) -> list[bool]:
        return [kind.is_sparse for kind in config_from_hf(tiny_configs()[case] | change).layers]

    assert sparse("deepseek3", num_hidden_layers=4, first_k_dense_replace=2) == [False, False, True, True]
    assert sparse("glm4_moe_lite", num_hidden_layers=3) == [False, True, True]
    assert sparse("glm4_moe_lite", mlp_layer_types=["sparse", "dense"]) == [True, False]


def test_mutated_configurations_give_the_network_of_transformers() -> None:
    counts: Counter[tuple[bool, bool]] = Counter()  # accepted here, accepted by transformers
    for case in json.loads((Path(__file__).parent / "golden" / "latent_configs.json").read_text("utf-8")):
        try:
            config = config_from_hf(latent_configs()[case["name"]] | case["change"])
        except ConfigError:
            counts[False, "error" not in case] += 1
            continue
        counts[True, "error" not in case] += 1
        if "error" not in case:
            check_network(config, case)
    assert counts == COUNTS


def check_network(config: ModelConfig, case: dict[str, Any]) -> None:
    """Compare a configuration with what transformers makes of it."""
    rope = config.layers[0].rope
    assert rope is not None
    frequencies = rope.theta ** -(np.arange(0, rope.dims, 2) / rope.dims) / (rope.divisors or 1)
    np.testing.assert_allclose(frequencies, case["frequencies"], rtol=1e-5, err_msg=str(case))
    assert rope.scale == pytest.approx(case["rotary_scale"], rel=1e-6), case
    assert config.attention_scale == pytest.approx(case["scale"], rel=1e-6), case
    assert [kind.is_sparse for kind in config.layers] == case["sparse"], case
    if case["router"] is not None:
        experts = config.experts
        assert experts is not None
        *router, is_normalized = case["router"]
        ours = [experts.count, experts.per_token, experts.scale, experts.groups, experts.open_groups]
        assert ours == router, case
        assert experts.normalized == bool(is_normalized), case
