"""Promise 1: log-probs of the default model against torch in float32."""

from pathlib import Path

import pytest

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from tests.support.golden_cases import assert_float32, figures_of
from tests.support.runners import make_runner


@pytest.mark.slow
def test_float32_from_gguf(float32_runner: ModelRunner) -> None:
    """In the fast ring, `test_golden_logprobs_over_http` asserts the same of a server."""
    assert_float32(figures_of(float32_runner, "smollm2-q4_1-gguf-f32"))


def test_bfloat16_from_gguf(bfloat16_runner: ModelRunner) -> None:
    figures = figures_of(bfloat16_runner, "smollm2-q4_1-gguf-f32")
    print(figures)
    assert figures.mean_error < 0.035


@pytest.mark.slow
def test_int8_from_gguf(int8_runner: ModelRunner) -> None:
    """`python -m tools.accuracy.dtypes` has the errors; the limit is twice the mean."""
    figures = figures_of(int8_runner, "smollm2-q4_1-gguf-f32")
    print(figures)
    assert figures.mean_error < 0.09


@pytest.mark.slow
def test_float32_from_a_hugging_face_directory(hf_directory: Path) -> None:
    buckets = Buckets(decode_rows=(8,), prefill_chunks=(64,), score_rows=64, pages_per_row=16)
    assert_float32(figures_of(make_runner(hf_directory, "float32", buckets), "smollm2-prompt-logprobs"))
