"""`logprobd quantize` and `logprobd kl` on the first layers of the default model, as programs."""

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from gguf.constants import GGUFValueType, LlamaFileType

from model.weights.gguf_writer import QuantizedType, output_of_gguf, write_gguf
from model.weights.source import ModelSource, default_model_path
from model.weights.weight_table import open_checkpoint
from tests.support.scoring import write_lines
from tests.support.server_process import ROOT

pytestmark = pytest.mark.slow

TEXTS = ["The capital of France is Paris, and that of Italy is Rome.", "def f(x):\n    return x + 1\n", "Hello"]


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "serve", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_layers(path: Path, layers: int) -> Path:
    """The first layers of the default model, in float16; the others are alike, and rounding all takes a minute."""
    with closing(open_checkpoint(ModelSource("default", default_model_path()))) as checkpoint:
        whole = output_of_gguf(checkpoint)
        later = tuple(f"blk.{i}." for i in range(layers, whole.config.num_layers))
        part = replace(
            whole,
            config=replace(whole.config, layers=whole.config.layers[:layers]),
            metadata=whole.metadata | {"llama.block_count": (layers, GGUFValueType.UINT32, None)},
            tensors=[tensor for tensor in whole.tensors if not tensor.name.startswith(later)],
        )
        write_gguf(path, part, QuantizedType("F16", "F16", "F16", LlamaFileType.MOSTLY_F16), {})
    return path


def test_a_quantized_model_is_near_its_original_and_no_model_is_far_from_itself(
    tmp_path: Path, compilation_cache: Path
) -> None:
    original, output = str(first_layers(tmp_path / "f16.gguf", 2)), str(tmp_path / "q5_k.gguf")
    texts = str(write_lines(tmp_path / "texts.jsonl", TEXTS))
    flags = ("--json", "--max-model-len", "64", "--compilation-cache-dir", str(compilation_cache))
    run("quantize", original, output, "--type", "q5_k", "--importance-texts", texts)
    same, near = (orjson.loads(run("kl", original, model, texts, *flags)) for model in (original, output))
    assert same["quantiles"]["max"] == same["mean"] == 0.0
    assert (same["same_best"], same["perplexity_ratio"]) == (1.0, 1.0)
    assert near["perplexities"][0] == same["perplexities"][0]
    assert 1e-5 < near["mean"] < 0.02
    assert near["same_best"] > 0.9
