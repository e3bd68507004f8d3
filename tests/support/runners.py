"""Compiled models for tests, as a server compiles them."""

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from compiled.runner import ModelRunner
from compiled.shapes import Buckets
from model.kernels.dispatch import Kernels, load_kernels
from model.weights.checkpoint import TensorInfo
from model.weights.gguf import GgufCheckpoint
from model.weights.loader import load_model
from model.weights.source import ModelSource
from model.weights.weight_table import open_checkpoint
from tests.support.in_process import PAGES

# A server's, but for the length of a request.
BUCKETS = Buckets(decode_rows=(1, 2, 4, 8, 16), prefill_chunks=(16, 64, 256), score_rows=64, pages_per_row=16)


class _FirstLayers(GgufCheckpoint):
    """The first layers of a .gguf file, as a model of their own."""

    def __init__(self, path: Path, layers: int) -> None:
        super().__init__(path)
        self.config = replace(self.config, layers=self.config.layers[:layers])

    def names(self) -> Mapping[str, TensorInfo]:
        """Every tensor but those of later layers."""
        layer_of = re.compile(r"blk\.(\d+)\.")
        return {
            name: info
            for name, info in super().names().items()
            if (found := layer_of.match(name)) is None or int(found[1]) < self.config.num_layers
        }


def make_runner(
    path: Path,
    weights: str,
    buckets: Buckets = BUCKETS,
    pages: int = PAGES,
    kernels: Kernels | None = None,
    layers: int | None = None,
    kv_dtype: str | None = None,
) -> ModelRunner:
    """A compiled model.

    Args:
        path: of the model.
        weights: a format and the dtype of activations, such as "Q8_0 bfloat16"; or a dtype: float32 keeps the formats
            of a file, bfloat16 rounds all weights to it.
        buckets: what is compiled.
        pages: of the cache.
        kernels: as in `load_model`.
        layers: the number of layers of a .gguf file to use; None: all.
        kv_dtype: of the cache's keys and values; None: as the matrices.
    """
    dtype = weights.split()[-1]
    quantization = weights.split()[0] if " " in weights else {"bfloat16": "none"}.get(dtype, "auto")
    kernels = load_kernels() if kernels is None else kernels
    buckets = replace(buckets, segment=kernels.segment(jax.default_backend()))
    source = ModelSource(path.name, path)
    with closing(open_checkpoint(source) if layers is None else _FirstLayers(path, layers)) as checkpoint:
        model = load_model(checkpoint, dtype, quantization=quantization, kernels=kernels)
    if kv_dtype is not None:
        model = replace(model, kv_dtype=jnp.dtype(kv_dtype))
    return ModelRunner(model, buckets, pages=pages, max_logprobs=20)
