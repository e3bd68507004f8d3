"""From an open checkpoint to a model on the device."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from model.config import ConfigError, ModelConfig
from model.formats import FLOATS
from model.kernels import gpu, tpu
from model.kernels.dispatch import Kernels, load_kernels
from model.packed import StackedWeight, pack
from model.sharding import ShardIndices, TensorParallel, partition_spec
from model.transformer import BoundModel, bind
from model.weights.checkpoint import Checkpoint
from model.weights.rows import Arena, BlockRows, Rows
from model.weights.weight_table import Storage, check_headers, load_weights


def load_model(
    checkpoint: Checkpoint,
    dtype_name: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    quantization: str = "auto",
    max_model_len: int | None = None,
    mesh: Mesh | None = None,
    kernels: Kernels | None = None,
) -> BoundModel:
    """Read all weights and put them on the device, packed if the CPU kernels read them or their format is coded.

    Args:
        checkpoint: an open model.
        dtype_name: "bfloat16" or "float32", of activations and cache.
        progress: called with the bytes read so far and the total.
        quantization: as in `Storage`.
        max_model_len: maximum tokens of a request; None: the model's maximum.
        mesh: shards the model over its devices; each weight is split on the host and sent shard by shard.
        kernels: those that the model's programs may call; None: those of this machine.

    Raises:
        ModelLoadError: lists every problem of the checkpoint.
    """
    dtype = jnp.dtype(dtype_name)
    kernels = load_kernels() if kernels is None else kernels
    storage = storage_of(dtype_name, quantization, kernels, shards=1 if mesh is None else mesh.size)
    config = _sharded(checkpoint, storage).for_length(max_model_len or checkpoint.config.max_position_embeddings)
    specs = config.weights()

    def put(path: str, rows: Rows | Sequence[BlockRows]) -> Any:
        if mesh is None:
            return _put(rows, memory)
        parts = _shard_rows(rows, TensorParallel(config, mesh.size).weight_indices(specs[path]))
        return _put_shards(parts, partition_spec(specs[path]), mesh)

    memory = Arena()
    weights = load_weights(checkpoint, storage, put, progress)
    return bind(config, dtype, weights, kernels, mesh)


def storage_of(dtype_name: str, quantization: str, kernels: Kernels, *, shards: int = 1) -> Storage:
    """How this machine stores a model's weights; the arguments are those of `load_model`."""
    on_cpu, packs = jax.default_backend() == "cpu", kernels.cpu is not None
    if on_cpu and not packs and quantization == "auto":
        quantization = "none"  # XLA would unpack all blocks in each call, which is several times slower
    packs = packs and on_cpu
    return Storage(np.dtype(jnp.dtype(dtype_name)), quantization, packs=packs, stacks=shards == 1)


def _sharded(checkpoint: Checkpoint, storage: Storage) -> ModelConfig:
    """The network; a shard's features of the MLP are full blocks of every format that they are columns of."""
    config, stored = checkpoint.config, checkpoint.names()
    specs = config.weights()
    targets = (
        target for target in check_headers(checkpoint) if specs[target.path].tensors[0].shape[1:] in (("F",), ("XF",))
    )
    blocks = (form.block for target in targets for form in storage.formats(target, stored) if not form.is_float)
    return replace(config, shard_features=max((config.shard_features, *blocks)))


def _put(rows: Rows | Sequence[BlockRows], memory: Arena) -> Any:
    """Put a weight on the default device."""
    if isinstance(rows, Rows):
        return jax.device_put(rows.read())
    packed = tuple(pack(part.shape, part.format, part.runs, memory, part.order) for part in rows)
    return packed[0] if len(packed) == 1 else StackedWeight(packed)


def _put_shards(parts: Sequence[Rows | Sequence[BlockRows]], spec: PartitionSpec, mesh: Mesh) -> Any:
    """Put the part of each shard on its device; return arrays over the mesh."""
    shards = []
    for part, device in zip(parts, mesh.devices.flat, strict=True):
        with jax.default_device(device):
            shards.append(jax.device_put(_put(part, Arena(0)), device))

    def assemble(*arrays: jax.Array) -> jax.Array:
        shape = tuple(size * (mesh.size if axis else 1) for size, axis in zip_longest(arrays[0].shape, spec))
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), list(arrays))

    return jax.tree.map(assemble, *shards)


def _shard_rows(
    rows: Rows | Sequence[BlockRows], indices: tuple[ShardIndices, ...]
) -> Sequence[Rows | Sequence[BlockRows]]:
    """Each shard's part of a weight; a block is never split.

    Raises:
        ConfigError: a shard would start inside a block.
    """
    if isinstance(rows, Rows):
        parts = _split(rows.runs, indices, rows.dtype)
        return [Rows(part.shape, rows.dtype, iter([part])) for part in parts]
    [whole] = rows
    columns = _byte_indices(indices[1], whole)
    parts = _split(whole.runs, (indices[0], columns), np.dtype(np.uint8))
    k = indices[1].shape[1]
    return [[BlockRows((len(part), k), whole.format, iter([part]))] for part in parts]


def _byte_indices(columns: ShardIndices, rows: BlockRows) -> ShardIndices:
    """Indices of the bytes that each shard holds of every row; -1 for the padding of a shard."""
    width, block_format, size = rows.shape[1], rows.format, rows.format.block_bytes
    if columns.shape[1] == width and (columns == np.arange(width)).all():
        blocks = np.broadcast_to(np.arange(block_format.depth(width)), (len(columns), block_format.depth(width)))
    elif block_format.is_float:  # its elements are of equal size, and a shard's are padded to full blocks
        size //= block_format.block
        blocks = np.pad(columns, ((0, 0), (0, -columns.shape[1] % block_format.block)), constant_values=-1)
    else:
        firsts = columns[:, :: block_format.block]
        full = firsts[:, :, None] + np.where(firsts < 0, 0, 1)[:, :, None] * np.arange(block_format.block)
        full = np.where(full < width, full, -1).reshape(len(columns), -1)
        if not np.array_equal(columns, full) or (firsts[firsts >= 0] % block_format.block).any():
            multiple = f"a multiple of {block_format.block} columns; --quantization none has no such limit"
            raise ConfigError(f"{block_format.name} with tensor parallelism needs shards of {multiple}")
        blocks = np.where(firsts < 0, -1, firsts // block_format.block)
    inside = blocks[:, :, None] * size + np.arange(size)
    return np.where(blocks[:, :, None] < 0, -1, inside).reshape(len(columns), -1)


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


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Sizes of a model's weights in memory."""

    nbytes: int  # on each device, without the padding of packed weights
    matrices: Mapping[str, int]  # weights of all matrices by format, or by dtype
    bits_per_weight: float  # of the matrices
    # Names of all matrices by their formats in memory and in the files.
    tensors: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)  # as in Checkpoint


def stored_weights(checkpoint: Checkpoint, storage: Storage, shards: int = 1) -> StoredWeights:
    """The sizes that `load_model` leads to; nothing is read.

    Raises:
        ModelLoadError: as `check_headers`.
    """
    stored, specs = checkpoint.names(), checkpoint.config.weights()
    parallel = TensorParallel(_sharded(checkpoint, storage), shards)
    matrices, nbytes, on_shard, vectors = Counter[str](), 0, 0, 0
    tensors = defaultdict[tuple[str, str], list[str]](list)
    array = next(name for name, dtype in FLOATS.items() if dtype == storage.dtype)
    for target in check_headers(checkpoint):
        if len(target.shape) == 1:
            vectors += 4 * target.shape[0]
            continue
        formats = storage.formats(target, stored) or (None,) * len(target.parts)
        for part, block_format in zip(target.parts, formats, strict=True):
            matrices[storage.dtype.name if block_format is None else block_format.name] += math.prod(part.shape)
            name = array if block_format is None else block_format.name
            tensors[name, stored[part.name].stored_as].append(part.name)
            nbytes += storage.nbytes(part.shape, block_format)
        if shards > 1:  # which hold equal formats, and may hold padding
            local = tuple(indices.shape[1] for indices in parallel.weight_indices(specs[target.path]))
            on_shard += storage.nbytes(local, formats[0])
    bits_per_weight = 8 * nbytes / max(1, matrices.total())
    total = vectors + (on_shard if shards > 1 else nbytes)
    return StoredWeights(total, matrices, bits_per_weight, tensors, checkpoint.skipped)


def kernels_used(model: BoundModel) -> tuple[str, ...]:
    """Names of the parts that run in kernels, empty if XLA's own code runs everything.

    On a CPU the first name is the instruction set and digest of the kernels.
    """
    nvidia = model.device_kind.startswith("NVIDIA")
    if model.config.latent and model.platform in ("gpu", "tpu"):
        return ()
    match model.platform:
        case "gpu":
            return ("triton-attention",) if gpu.supports_pages(model.config.head_dim, model.kv_dtype) and nvidia else ()
        case "tpu":
            is_supported = tpu.supports_pages(model.config.head_dim, model.kv_dtype) and not model.config.traits.sinks
            return ("ragged-paged-attention",) if is_supported else ()
    kernels = model.kernels.cpu
    if model.platform != "cpu" or kernels is None:
        return ()
    packed = ("linear",) if any(leaf.ndim > 2 for leaf in model.leaves) else ()
    head = ("head",) if model.parallel.shards == 1 else ()
    return (f"{kernels.instruction_set}-{kernels.digest}", *packed, "attention", "rows", *head)
