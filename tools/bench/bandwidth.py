"""The bandwidth limit of a decode step: weight bytes / read bandwidth."""

import statistics
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp

from model.layout import GROUP_SIZE
from model.transformer import abstract_weights
from model.weights.source import ModelSource, default_model_path, resolve_model
from model.weights.weight_table import open_checkpoint

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


def decode_bytes(model: str | None, weights_as: str) -> float:
    """Return the bytes of weights that a decode step reads: all but an untied embedding.

    `weights_as`: a dtype, or "int8", with one byte per element and two per group for its scale.
    """
    source = resolve_model(model, None) if model else ModelSource("default", default_model_path())
    checkpoint = open_checkpoint(source)
    try:
        config = checkpoint.config
    finally:
        checkpoint.close()
    int8 = weights_as == "int8"
    weights = abstract_weights(config, jnp.dtype("bfloat16" if int8 else weights_as))
    read = [leaf for path, leaf in weights.items() if config.tie_word_embeddings or path != "embed.weight"]
    return float(
        sum(leaf.size * (1 + 2 / GROUP_SIZE if int8 and leaf.ndim == 2 else leaf.dtype.itemsize) for leaf in read)
    )
