"""The limit that a decode step is held against: weight bytes over read bandwidth."""

import statistics
import time

import jax
import jax.numpy as jnp

from model.transformer import abstract_weights
from model.weights.load import open_checkpoint
from model.weights.source import ModelSource, default_model_path, resolve_model

_BYTES = 512 << 20  # far more than any cache holds


def read_bandwidth() -> float:
    """Bytes a second that this device reads: a float32 matrix-vector product, which XLA runs at the memory's speed."""
    columns = 1024
    matrix = jnp.ones((_BYTES // 4 // columns, columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return _BYTES / statistics.median(seconds)


def decode_bytes(model: str | None, dtype: str) -> int:
    """Bytes of weights that a decode step reads: all, but of an untied embedding only the rows asked for."""
    source = resolve_model(model, None) if model else ModelSource("default", default_model_path())
    checkpoint = open_checkpoint(source)
    try:
        config = checkpoint.config
    finally:
        checkpoint.close()
    weights = abstract_weights(config, jnp.dtype(dtype))
    read = {path: leaf for path, leaf in weights.items() if config.tie_word_embeddings or path != "embed.weight"}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in read.values())
