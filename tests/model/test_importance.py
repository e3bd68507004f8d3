"""Mean squares of the inputs of linear maps: a forward pass by numpy, chunks and padding."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.importance import CHUNK, Importance, input_importance
from model.kernels.dispatch import Kernels
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from tests.support.tiny_checkpoints import HEAD_DIM, HEADS, KV_HEADS, LAYERS, MLP, TinyModel

EPSILON = 0.0009765625  # TinyModel's


def importance_of(model: TinyModel, folder: Path, texts: list[list[int]], kernels: Kernels | None = None) -> Importance:
    with closing(open_checkpoint(ModelSource("m", model.write_hf(folder)))) as checkpoint:
        return input_importance(load_model(checkpoint, "float32", kernels=kernels), texts)


def inputs_of_a_token(model: TinyModel, token: int) -> dict[str, NDArray[np.float64]]:
    """Inputs of all linear maps for a text of one token, whose attention gives its own values."""
    weights = {name: values.astype(np.float64) for name, values in model.tensors.items()}

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        normed: NDArray[np.float64] = x / np.sqrt((x * x).mean() + EPSILON) * weights[f"{name}.weight"]
        return normed

    inputs: dict[str, NDArray[np.float64]] = {}
    x = weights["model.embed_tokens.weight"][token]
    for i in range(LAYERS):
        prefix, path = f"model.layers.{i}.", f"layers.{i}."
        inputs[path + "attention.qkv.weight"] = h = norm(x, prefix + "input_layernorm")
        values = (weights[prefix + "self_attn.v_proj.weight"] @ h).reshape(KV_HEADS, HEAD_DIM)
        inputs[path + "attention.out.weight"] = context = values.repeat(HEADS // KV_HEADS, axis=0).reshape(-1)
        x = x + weights[prefix + "self_attn.o_proj.weight"] @ context
        inputs[path + "mlp.gate_up.weight"] = h = norm(x, prefix + "post_attention_layernorm")
        gate, up = (weights[f"{prefix}mlp.{name}_proj.weight"] @ h for name in ("gate", "up"))
        inputs[path + "mlp.down.weight"] = hidden = gate / (1 + np.exp(-gate)) * up
        assert hidden.shape == (MLP,)
        x = x + weights[prefix + "mlp.down_proj.weight"] @ hidden
    inputs["embed.weight" if model.tied else "head.weight"] = norm(x, "model.norm")
    return inputs


@pytest.mark.parametrize("kernels", [Kernels(), None], ids=["xla", "kernels"])  # XLA computes padding, too
@pytest.mark.parametrize("tied", [True, False])
def test_importance_equals_numpy(tmp_path: Path, tied: bool, kernels: Kernels | None) -> None:
    model = TinyModel(tied=tied)
    found = importance_of(model, tmp_path / "hf", [[5], [17]], kernels)
    tokens = [inputs_of_a_token(model, token) for token in (5, 17)]
    assert found.keys() == tokens[0].keys()
    for path, values in found.items():
        expected = (tokens[0][path] ** 2 + tokens[1][path] ** 2) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-4, err_msg=path)


def test_long_texts_are_run_in_chunks_and_padding_does_not_count(tmp_path: Path) -> None:
    model = TinyModel()
    text = np.random.default_rng(1).integers(0, 48, CHUNK + 90).tolist()
    whole = importance_of(model, tmp_path / "a", [text])
    parts = importance_of(model, tmp_path / "b", [text[:CHUNK], text[CHUNK:]])
    first = importance_of(model, tmp_path / "c", [text[:CHUNK]])
    for path, values in whole.items():
        np.testing.assert_array_equal(values, parts[path])
        assert not np.allclose(values, first[path], rtol=1e-3), path
