"""Peak memory of loading, and the names of the kernels that a model uses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from model.config_hf import config_from_hf
from model.weights.loader import kernels_used
from tests.support.server_process import ROOT
from tests.support.tiny import tiny_configs
from tools.portability.chips import abstract_model

# Loads a model in a separate process; prints memory before, peak memory, and the size of the weights, in bytes.
LOAD = """
import re, sys
from pathlib import Path
import jax
from model.weights.loader import load_model
from model.kernels import cpu
from model.weights.weight_table import open_checkpoint
from model.weights.source import resolve_model
def of(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
jax.device_put(1.0).block_until_ready()
cpu.load_library()
start = of("VmRSS")
model = load_model(open_checkpoint(resolve_model(sys.argv[1], None)), "bfloat16", quantization=sys.argv[2])
jax.block_until_ready(model.leaves)
print(start, of("VmHWM"), sum(leaf.nbytes for leaf in model.leaves))
"""
V, D, F, L = 100_000, 1024, 4096, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 330 MB in bfloat16, mostly the embedding, as in small models."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(L):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (D, F)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    save_file(
        {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("weights", ["auto", "Q8_0"])
def test_load_model_peak_memory_is_little_more_than_the_weights(folder: Path, weights: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), weights], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, most, size = map(int, run.stdout.split())
    assert size > (150e6 if weights == "Q8_0" else 300e6)
    assert most - before < 1.15 * size + 30e6  # 30 MB: first use of libraries, significant for a model this small


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "kernels"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", ("triton-attention",)),
        ("gpu", "NVIDIA H100 80GB HBM3", "float32", ()),
        ("gpu", "gfx942", "bfloat16", ()),
        ("tpu", "TPU v5 lite", "bfloat16", ("ragged-paged-attention",)),
        ("tpu", "TPU v5 lite", "float32", ()),
    ],
)
def test_kernels_used_on_an_accelerator(platform: str, kind: str, dtype: str, kernels: tuple[str, ...]) -> None:
    here = abstract_model(config_from_hf(tiny_configs()["qwen3"]), dtype)
    device: Any = SimpleNamespace(platform=platform, device_kind=kind)
    mesh: Any = SimpleNamespace(size=1, devices=np.array([device]))
    assert kernels_used(replace(here, mesh=mesh)) == kernels
