"""Compiled models for tests, as a server compiles them."""

from dataclasses import replace
from pathlib import Path

import jax

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.kernels.dispatch import Kernels, load_kernels
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from tests.support.in_process import PAGES

# A server's, but for the length of a request.
BUCKETS = Buckets(decode_rows=(1, 2, 4, 8, 16), prefill_chunks=(16, 64, 256), score_rows=64, pages_per_row=16)


def make_runner(
    path: Path, weights: str, buckets: Buckets = BUCKETS, pages: int = PAGES, kernels: Kernels | None = None
) -> ModelRunner:
    """A compiled model; `weights` is a dtype, or "int8"; `kernels` as in `load_model`."""
    kernels = load_kernels() if kernels is None else kernels
    buckets = replace(buckets, segment=kernels.segment(jax.default_backend()))
    checkpoint = open_checkpoint(ModelSource(path.name, path))
    try:
        model = load_model(
            checkpoint, "bfloat16" if weights == "int8" else weights, int8=weights == "int8", kernels=kernels
        )
    finally:
        checkpoint.close()
    return ModelRunner(model, buckets, pages=pages, max_logprobs=20)
