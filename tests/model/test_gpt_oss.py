"""gpt-oss: its MXFP4 checkpoints have the values of their floats, and a token has the same bits in every split."""

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from model.config import ConfigError
from model.config_hf import config_from_hf
from model.kernels import cpu
from model.kernels.dispatch import load_kernels
from model.weights.checkpoint import ModelLoadError
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import Storage, check_headers, open_checkpoint
from tests.model.test_family_gguf import of_checkpoint, write_gguf
from tests.model.test_parity import empty_cache
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

X, D, F, LAYERS, TOKENS = 4, 64, 32, 2, 70
CONFIG: dict[str, Any] = tiny_configs()["gpt_oss"] | {
    "hidden_size": D,
    "intermediate_size": F,
    "num_local_experts": X,
}
QUANTIZED: dict[str, Any] = CONFIG | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
STEPS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def checkpoints() -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The tensors of one model with experts in MXFP4, and as floats."""
    floats = random_weights(CONFIG, 1)
    coded, random = dict[str, NDArray[Any]](floats), np.random.default_rng(2)
    for i in range(LAYERS):
        for matrix, n, k in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            name = f"model.layers.{i}.mlp.experts.{matrix}"
            codes = random.integers(0, 256, (X, n, k // 32, 16), np.uint8)
            scales = random.integers(122, 126, (X, n, k // 32), np.uint8)
            coded |= {f"{name}_blocks": codes, f"{name}_scales": scales}
            del coded[name]
            values = STEPS[np.stack([codes & 15, codes >> 4], axis=-1).reshape(X, n, k // 32, 32)]
            values = (values * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(X, n, k)
            floats[name] = np.ascontiguousarray(values.swapaxes(1, 2))
    return coded, floats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mxfp4")
    write_checkpoint(path, QUANTIZED, checkpoints()[0])
    return path


def test_mxfp4_checkpoints_have_the_values_of_floats(folder: Path, tmp_path: Path) -> None:
    floats = checkpoints()[1]
    (tmp_path / "floats").mkdir()
    write_checkpoint(tmp_path / "floats", CONFIG, floats)
    with closing(open_checkpoint(ModelSource("m", tmp_path / "floats"))) as checkpoint:
        expected, config = of_checkpoint(checkpoint), checkpoint.config
    file = write_gguf(tmp_path / "m.gguf", CONFIG, floats, config, experts_as=GGMLQuantizationType.MXFP4)
    for path in (folder, file):
        with closing(open_checkpoint(ModelSource("m", path))) as checkpoint:
            found, stored = of_checkpoint(checkpoint), checkpoint.names()
            formats = {
                target.path.rsplit(".", 2)[1]: {
                    item.name for item in Storage(np.dtype(np.float32), packs=True).formats(target, stored)
                }
                for target in check_headers(checkpoint)
                if target.role == "experts"
            }
        assert formats == {name: {"MXFP4"} for name in ("gate", "up", "down")}
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_has_the_same_bits_in_every_split(folder: Path, kernels: cpu.CpuKernels, dtype: str) -> None:
    """One chunk, three chunks, and decode steps in a batch: router, sinks, windows and MXFP4 experts."""
    del kernels
    with closing(open_checkpoint(ModelSource("m", folder))) as checkpoint:
        model = load_model(checkpoint, dtype, kernels=load_kernels())
    step = jax.jit(lambda leaves, *inputs: model.merge(leaves)(*inputs))
    tokens = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], TOKENS).astype(np.int32)

    def run(lengths: tuple[int, ...], rows: int, size: int) -> NDArray[np.float32]:
        """Final hidden states of the last of several rows, of which the others are shifted copies."""
        batch = np.stack([np.roll(tokens, rows - 1 - row) for row in range(rows)])
        tables = jnp.array([[2 * row + 2, 2 * row + 1] for row in range(rows)])
        cache, start, parts = empty_cache(model), 0, []
        for length in lengths:
            padding = ((0, 0), (0, size - length))
            positions = np.tile(np.arange(start, start + length, dtype=np.int32), (rows, 1))
            inputs = np.pad(batch[:, start : start + length], padding), np.pad(positions, padding, constant_values=-1)
            hidden, cache = step(model.leaves, *inputs, tables, cache)
            parts.append(np.asarray(hidden, np.float32)[-1, :length])
            start += length
        return np.concatenate(parts)

    full = run((TOKENS,), 1, TOKENS + 2)
    assert np.isfinite(full).all()
    np.testing.assert_array_equal(run((32, 32, 6), 1, TOKENS + 2), full)
    np.testing.assert_array_equal(run((1,) * TOKENS, 3, 1), full)


def test_published_configuration() -> None:
    """The keys and values of gpt-oss-20b, with fewer layers."""
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    published = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling | {"rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    }
    config = config_from_hf(published)
    assert [kind.window for kind in config.layers] == [128, 0, 128, 0]
    assert config == config_from_hf({key: value for key, value in published.items() if key != "layer_types"})
    assert config.layers[0].rope is not None
    assert config.layers[0].rope.scale == pytest.approx(0.1 * np.log(32) + 1)
    truncated = config_from_hf(published | {"rope_scaling": scaling | {"rope_type": "yarn"}})
    assert truncated.layers != config.layers
    for key, value in (("swiglu_limit", 5.0), ("swiglu_alpha", 1.5), ("norm_topk_prob", False)):
        with pytest.raises(ConfigError, match=f"{key} {value} is not supported"):
            config_from_hf(published | {key: value})


def test_parts_of_experts_that_are_missing_or_misshapen_are_listed(tmp_path: Path) -> None:
    coded, _ = checkpoints()
    name = "model.layers.1.mlp.experts"
    del coded[f"{name}.down_proj_scales"]
    del coded[f"{name}.down_proj_bias"]
    coded[f"{name}.gate_up_proj_bias"] = np.zeros((X, F), np.float32)
    coded["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
    write_checkpoint(tmp_path, QUANTIZED, coded)
    with closing(open_checkpoint(ModelSource("m", tmp_path))) as checkpoint, pytest.raises(ModelLoadError) as caught:
        check_headers(checkpoint)
    assert sorted(line.strip() for line in str(caught.value).split("\n")[1:]) == [
        "model.layers.0.self_attn.sinks: has shape [4], must be [6]",
        f"{name}.down_proj: missing",
        f"{name}.down_proj_bias: missing",
        f"{name}.down_proj_blocks: unexpected",
        f"{name}.gate_up_proj_bias: has shape [4, 32], must be [4, 64]",
    ]
