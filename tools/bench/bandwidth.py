"""The bandwidth limit of a decode step: weight bytes / read bandwidth."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp

from model.kernels.dispatch import load_kernels
from model.weights.loader import storage_of, stored_weights
from model.weights.source import ModelSource, default_model_path, resolve_model
from model.weights.weight_table import check_headers, open_checkpoint
from serve.config.engine_config import EngineConfig
from serve.server.model_files import resolve_dtype

_BYTES = 512 << 20  # far more than any cache
_ACCELERATOR_BYTES = 4 << 30  # large enough to hide the launch overhead


def bandwidth_probe() -> Callable[[], float]:
    """Return a function that measures the device's read bandwidth, bytes/s.

    It times a float32 matrix-vector product, which XLA runs at memory speed.
    """
    columns, size = 1024, _BYTES if jax.default_backend() == "cpu" else _ACCELERATOR_BYTES
    matrix = jnp.ones((size // 4 // columns, columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    product(matrix, vector).block_until_ready()

    def measure() -> float:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            product(matrix, vector).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return size / statistics.median(seconds)

    return measure


def is_here(url: str) -> bool:
    """True if a server runs on this machine, so that this machine's bandwidth is its limit."""
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def decode_bytes(config: EngineConfig) -> float:
    """Return the bytes of weights that a decode step of a server reads: all but an untied embedding."""
    model = config.model
    source = resolve_model(model, None) if model else ModelSource("default", default_model_path())
    with closing(open_checkpoint(source)) as checkpoint:
        storage = storage_of(resolve_dtype(config, checkpoint), config.stored_quantization, load_kernels())
        stored = stored_weights(checkpoint, storage).nbytes
        if checkpoint.config.tie_word_embeddings:
            return stored
        embedding = next(target for target in check_headers(checkpoint) if target.path == "embed.weight")
        formats = storage.formats(embedding, checkpoint.names())
        bits = formats[0].bits_per_weight if formats else 8 * storage.dtype.itemsize
        return stored - math.prod(embedding.shape) * bits / 8
