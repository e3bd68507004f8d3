"""From an open checkpoint to a model on the device."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.kernels import cpu
from model.transformer import BoundModel, abstract_weights, bind
from model.weights.checkpoint import Checkpoint
from model.weights.int8 import GROUP
from model.weights.load import load_weights
from model.weights.rows import Int8Rows, Rows


def load_model(
    checkpoint: Checkpoint,
    dtype_name: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    int8: bool = False,
    max_model_len: int | None = None,
) -> BoundModel:
    """Reads all weights and places them, packed for the kernels where this device has any for the dtype.

    Args:
        checkpoint: an open model.
        dtype_name: "bfloat16" or "float32", of matrices and cache.
        progress: called with the bytes read so far and in all.
        int8: whether matrices are int8 with scales instead.
        max_model_len: tokens that a request can have; None: as many as the model takes.

    Raises:
        ModelLoadError: lists everything that is wrong with the checkpoint.
    """
    dtype = jnp.dtype(dtype_name)
    packs = dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and cpu.load() is not None

    def put_int8(rows: Int8Rows) -> Any:
        return cpu.pack_int8_rows(rows.shape, ((run.values, run.scales) for run in rows.runs()))

    def put(_: str, rows: Rows) -> Any:
        if packs and len(rows.shape) == 2:
            return cpu.pack_rows(rows.shape, rows.runs())
        return jax.device_put(rows.whole())

    weights = load_weights(checkpoint, np.dtype(dtype), put, progress, put_int8=put_int8 if int8 else None)
    config = checkpoint.config
    return bind(config.for_length(max_model_len or config.max_position_embeddings), dtype, weights)


def weight_bytes(config: ModelConfig, dtype_name: str, *, int8: bool = False) -> int:
    """Bytes that the weights of a model will take, but for what packing pads."""
    shapes = abstract_weights(config, jnp.dtype(dtype_name)).values()
    vectors, matrices = (sum(math.prod(each.shape) for each in shapes if len(each.shape) == axes) for axes in (1, 2))
    # int8: a byte a value, and a float16 for each 32.
    of_matrices = matrices * (GROUP + 2) // GROUP if int8 else matrices * jnp.dtype(dtype_name).itemsize
    return int(4 * vectors + of_matrices)


def kernels_used(model: BoundModel) -> tuple[str, ...]:
    """The CPU's own kernels: their instruction set and digest, then what runs in them; empty where XLA does it all."""
    kernels = cpu.load() if jax.default_backend() == "cpu" else None
    if kernels is None:
        return ()
    packed = ("linear",) if any(leaf.ndim > 2 for leaf in model.leaves) else ()
    return (f"{kernels.instruction_set}-{kernels.digest}", *packed, "attention", "rows", "head")
