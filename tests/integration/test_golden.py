"""Promise 1: log-probs of the default model against torch in float32."""

from contextlib import closing
from pathlib import Path

import pytest

from compiled.shapes import Buckets
from model.weights.source import ModelSource, default_model_path
from model.weights.weight_table import open_checkpoint
from serve.config.engine_config import EngineConfig
from serve.server.model_files import resolve_dtype
from tests.support.golden_cases import assert_float32, figures_of
from tests.support.runners import make_runner

BUCKETS = Buckets(decode_rows=(8,), prefill_chunks=(64,), score_rows=64, pages_per_row=16)


def test_default_dtype_from_gguf() -> None:
    """A file's own weights with float32 activations: log-probs are those of its dequantised values."""
    model = default_model_path()
    config = EngineConfig(model=str(model))
    with closing(open_checkpoint(ModelSource("default", model))) as checkpoint:
        assert (resolve_dtype(config, checkpoint), config.stored_quantization) == ("float32", "auto")
    figures = figures_of(make_runner(model, "float32", BUCKETS), "smollm2-q4_1-gguf-f32")
    assert_float32(figures)
    assert figures.mean_error < 3e-5
    assert figures.max_error < 2e-4


def test_bfloat16_from_gguf() -> None:
    figures = figures_of(make_runner(default_model_path(), "bfloat16", BUCKETS), "smollm2-q4_1-gguf-f32")
    print(figures)
    assert figures.mean_error < 0.035


@pytest.mark.slow
def test_float32_with_a_bfloat16_cache() -> None:
    """The limit is twice the mean error; with float32 keys and values it is 9e-6."""
    runner = make_runner(default_model_path(), "float32", BUCKETS, kv_dtype="bfloat16")
    figures = figures_of(runner, "smollm2-q4_1-gguf-f32")
    print(figures)
    assert 1e-3 < figures.mean_error < 0.015


@pytest.mark.slow
def test_int8_from_gguf() -> None:
    """`python -m tools.accuracy.dtypes` has the errors; the limit is twice the mean."""
    figures = figures_of(make_runner(default_model_path(), "Q8_0 bfloat16", BUCKETS), "smollm2-q4_1-gguf-f32")
    print(figures)
    assert figures.mean_error < 0.09


@pytest.mark.slow
def test_float32_from_a_hugging_face_directory(hf_directory: Path) -> None:
    assert_float32(figures_of(make_runner(hf_directory, "float32", BUCKETS), "smollm2-prompt-logprobs"))
