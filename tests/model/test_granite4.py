"""Dense Granite 4 checkpoints: the network and the weights of Granite 3, with other names; others are refused."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import ConfigError, ModelConfig
from model.config_hf import config_from_hf
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from tests.model.test_family_gguf import of_checkpoint
from tests.support.tiny import random_weights, tiny_configs, write_checkpoint

GRANITE = tiny_configs()["granite"]
LAYERS = GRANITE["num_hidden_layers"]
GRANITE4 = GRANITE | {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "layer_types": ["attention"] * LAYERS,
    "position_embedding_type": "rope",
    "normalization_function": "rmsnorm",
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": GRANITE["intermediate_size"],
    "intermediate_size": 8192,
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
}


def loaded(folder: Path, hf: dict[str, Any], weights: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    folder.mkdir()
    write_checkpoint(folder, hf, weights)
    with closing(open_checkpoint(ModelSource("hf", folder))) as checkpoint:
        return checkpoint.config, of_checkpoint(checkpoint)


def test_dense_granite4_equals_granite3(tmp_path: Path) -> None:
    weights, renamed = random_weights(GRANITE, 1), dict[str, Any]()
    for name, values in weights.items():
        if ".up_proj" not in name:
            values = np.concatenate([values, weights[name.replace("gate", "up")]]) if ".gate_proj" in name else values
            name = name.replace("mlp.gate_proj", "shared_mlp.input_linear")
            renamed[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = values
    config, expected = loaded(tmp_path / "3", GRANITE, weights)
    config4, found = loaded(tmp_path / "4", GRANITE4, renamed)
    assert replace(config4, family="granite") == config
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported; known: 0"),
        ({"position_embedding_type": None}, "position_embedding_type None is not supported; known: rope"),
        ({"layer_types": None}, "layer_types is missing: recurrent layers are not supported"),
        ({"layer_types": ["mamba"] * LAYERS}, "layer_types must be"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
    ],
)
def test_other_granite4_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_hf(GRANITE4 | changes)
    assert message in str(caught.value)
