"""`logprobd quantize` and `logprobd kl` on the default model, as programs."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from model.weights.source import default_model_path
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


def test_a_quantized_model_is_near_its_original_and_no_model_is_far_from_itself(
    tmp_path: Path, compilation_cache: Path
) -> None:
    original, output = str(default_model_path()), str(tmp_path / "q5_k.gguf")
    texts = str(write_lines(tmp_path / "texts.jsonl", TEXTS))
    flags = ("--json", "--max-model-len", "64", "--compilation-cache-dir", str(compilation_cache))
    run("quantize", original, output, "--type", "q5_k", "--importance-texts", texts)
    same, near = (orjson.loads(run("kl", original, model, texts, *flags)) for model in (original, output))
    assert same["quantiles"]["max"] == same["mean"] == 0.0
    assert (same["same_best"], same["perplexity_ratio"]) == (1.0, 1.0)
    assert near["perplexities"][0] == same["perplexities"][0]
    assert 1e-5 < near["mean"] < 0.02
    assert near["same_best"] > 0.9
