"""From an open checkpoint to a model on the device."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from model.config import ConfigError, ModelConfig
from model.kernels import cpu, gpu, tpu
from model.kernels.dispatch import Kernels, load_kernels
from model.layout import GROUP_SIZE
from model.sharding import ShardIndices, TensorParallel, partition_spec
from model.transformer import BoundModel, abstract_weights, bind
from model.weights.checkpoint import Checkpoint
from model.weights.rows import Int8Array, Int8Rows, Rows
from model.weights.weight_table import load_weights


def load_model(
    checkpoint: Checkpoint,
    dtype_name: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    int8: bool = False,
    max_model_len: int | None = None,
    mesh: Mesh | None = None,
    kernels: Kernels | None = None,
) -> BoundModel:
    """Read all weights and put them on the device, packed if the CPU kernels read them.

    Args:
        checkpoint: an open model.
        dtype_name: "bfloat16" or "float32", of matrices and cache.
        progress: called with the bytes read so far and the total.
        int8: store matrices as int8 with scales instead.
        max_model_len: maximum tokens of a request; None: the model's maximum.
        mesh: shards the model over its devices; each weight is split on the host and sent shard by shard.
        kernels: those that the model's programs may call; None: those of this machine.

    Raises:
        ModelLoadError: lists every problem of the checkpoint.
    """
    dtype = jnp.dtype(dtype_name)
    kernels = load_kernels() if kernels is None else kernels
    packs = dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and kernels.cpu is not None
    config = checkpoint.config.for_length(max_model_len or checkpoint.config.max_position_embeddings)
    specs = config.weights()

    def put(path: str, rows: Rows | Int8Rows) -> Any:
        if mesh is None:
            return _put(rows, packs=packs)
        parts = _shard_rows(rows, TensorParallel(config, mesh.size).weight_indices(specs[path]))
        return _put_shards(parts, partition_spec(specs[path]), mesh, packs=packs)

    weights = load_weights(checkpoint, np.dtype(dtype), put, progress, int8=int8)
    return bind(config, dtype, weights, kernels, mesh)


def _put(rows: Rows | Int8Rows, *, packs: bool) -> Any:
    """Put a weight on the default device; `packs`: pack it if it is a matrix."""
    if isinstance(rows, Int8Rows):
        return cpu.pack_int8(rows.shape, rows.runs)
    if packs and len(rows.shape) == 2:
        return cpu.pack(rows.shape, rows.runs)
    return jax.device_put(rows.read())


def _put_shards(parts: Sequence[Rows | Int8Rows], spec: PartitionSpec, mesh: Mesh, *, packs: bool) -> Any:
    """Put the part of each shard on its device; return arrays over the mesh."""
    shards = []
    for part, device in zip(parts, mesh.devices.flat, strict=True):
        with jax.default_device(device):
            shards.append(jax.device_put(_put(part, packs=packs), device))

    def assemble(*arrays: jax.Array) -> jax.Array:
        shape = tuple(size * (mesh.size if axis else 1) for size, axis in zip_longest(arrays[0].shape, spec))
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), list(arrays))

    return jax.tree.map(assemble, *shards)


def _shard_rows(rows: Rows | Int8Rows, indices: tuple[ShardIndices, ...]) -> Sequence[Rows | Int8Rows]:
    """Each shard's part of a weight; a group of int8 values that share a scale is never split.

    Raises:
        ConfigError: a shard would start inside a group.
    """
    if isinstance(rows, Rows):
        parts = _split(rows.runs, indices, rows.dtype)
        return [Rows(part.shape, rows.dtype, iter([part])) for part in parts]
    width = rows.shape[1]
    scales = _scale_indices(indices[1], width)
    scale_bytes = np.stack([2 * scales, 2 * scales + 1], axis=2).reshape(len(scales), -1)
    columns = np.concatenate([indices[1], np.where(scale_bytes < 0, -1, scale_bytes + width)], axis=1)
    parts = _split((run.joined() for run in rows.runs), (indices[0], columns), np.dtype(np.int8))
    arrays = [Int8Array.split(part, indices[1].shape[1]) for part in parts]
    return [Int8Rows(array.values.shape, iter([array])) for array in arrays]


def _scale_indices(columns: ShardIndices, width: int) -> ShardIndices:
    """Indices of the scales that each shard holds of every row."""
    if columns.shape[1] == width and (columns == np.arange(width)).all():
        return np.broadcast_to(np.arange(-(-width // GROUP_SIZE)), (len(columns), -(-width // GROUP_SIZE)))
    firsts = columns[:, ::GROUP_SIZE]
    if columns.shape[1] % GROUP_SIZE or (firsts[firsts >= 0] % GROUP_SIZE).any():
        raise ConfigError(f"int8 with tensor parallelism needs a head size that is a multiple of {GROUP_SIZE}")
    return np.where(firsts < 0, -1, firsts // GROUP_SIZE)


def _split(runs: Iterator[NDArray[Any]], indices: tuple[ShardIndices, ...], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    parts = [np.zeros(tuple(axis.shape[1] for axis in indices), dtype) for _ in indices[0]]
    start = 0
    for run in runs:
        stop = start + len(run)
        for shard, part in enumerate(parts):
            rows = indices[0][shard]
            in_run = np.flatnonzero((rows >= start) & (rows < stop))
            values = run[rows[in_run] - start]
            if len(indices) > 1:
                columns = indices[1][shard]
                exists = columns >= 0
                part[np.ix_(in_run, exists)] = values[:, columns[exists]]
            else:
                part[in_run] = values
        start = stop
    return parts


def weight_bytes(config: ModelConfig, dtype_name: str, *, int8: bool = False, shards: int = 1) -> int:
    """Bytes of a model's weights on each device, without the padding of packed weights."""
    weights = abstract_weights(config, jnp.dtype(dtype_name), shards).values()
    vectors, matrices = (sum(math.prod(w.shape) for w in weights if len(w.shape) == axes) for axes in (1, 2))
    # int8: one byte per value, and a float16 per group.
    matrix_bytes = matrices * (GROUP_SIZE + 2) // GROUP_SIZE if int8 else matrices * jnp.dtype(dtype_name).itemsize
    return int(4 * vectors + matrix_bytes)


def kernels_used(model: BoundModel) -> tuple[str, ...]:
    """Names of the parts that run in kernels, empty if XLA's own code runs everything.

    On a CPU the first name is the instruction set and digest of the kernels.
    """
    nvidia = model.device_kind.startswith("NVIDIA")
    match model.platform:
        case "gpu":
            return ("triton-attention",) if gpu.supports_pages(model.config.head_dim, model.dtype) and nvidia else ()
        case "tpu":
            return ("ragged-paged-attention",) if tpu.supports_pages(model.config.head_dim, model.dtype) else ()
    kernels = model.kernels.cpu
    if model.platform != "cpu" or kernels is None:
        return ()
    packed = ("linear",) if any(leaf.ndim > 2 for leaf in model.leaves) else ()
    head = ("head",) if model.parallel.shards == 1 else ()
    return (f"{kernels.instruction_set}-{kernels.digest}", *packed, "attention", "rows", *head)
