"""From an open checkpoint to a model on the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.kernels import cpu, gpu, tpu
from model.kernels.dispatch import Kernels, load_kernels
from model.layout import GROUP_SIZE
from model.sharding import TensorParallel, spec_of_row, weight_rows
from model.transformer import BoundModel, abstract_weights, bind
from model.weights.checkpoint import Checkpoint
from model.weights.int8 import Int8Array
from model.weights.rows import Int8Rows, Rows
from model.weights.shards import shard_int8_rows, shard_rows
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
    sharder = None if mesh is None else _Sharder(packs, config, mesh)

    def put(path: str, rows: Rows | Int8Rows) -> Any:
        return _place(rows, packs=packs) if sharder is None else sharder.place(path, rows)

    weights = load_weights(checkpoint, np.dtype(dtype), put, progress, int8=int8)
    return bind(config, dtype, weights, kernels, mesh)


def _place(rows: Rows | Int8Rows, *, packs: bool) -> Any:
    """Put a weight on one device; `packs`: pack it if it is a matrix."""
    if isinstance(rows, Int8Rows):
        return cpu.pack_int8_rows(rows.shape, rows.runs())
    if packs and len(rows.shape) == 2:
        return cpu.pack_rows(rows.shape, rows.runs())
    return jax.device_put(rows.read())


@dataclass(frozen=True)
class _Sharder:
    """Puts weights on the devices of a mesh."""

    packs: bool
    config: ModelConfig
    mesh: Mesh

    def place(self, path: str, rows: Rows | Int8Rows) -> Any:
        row = weight_rows(self.config)[path]
        indices = TensorParallel(self.config, self.mesh.size).weight_indices(row)
        parts = shard_int8_rows(rows, indices) if isinstance(rows, Int8Rows) else shard_rows(rows, indices)
        packed = []
        for part, device in zip(parts, self.mesh.devices.flat, strict=True):
            with jax.default_device(device):
                packed.append(self._pack(part))
        spec = spec_of_row(row)
        return jax.tree.map(lambda *arrays: self._assemble(spec, arrays), *packed)

    def _pack(self, part: Any) -> Any:
        if isinstance(part, Int8Array):
            return cpu.pack_int8(part.values, part.scales)
        return cpu.pack(part) if self.packs and part.ndim == 2 else part

    def _assemble(self, spec: PartitionSpec, arrays: tuple[Any, ...]) -> jax.Array:
        """One array over the mesh from the part of each device."""
        devices, shape = self.mesh.devices.flat, arrays[0].shape
        is_sharded = [axis < len(spec) and bool(spec[axis]) for axis in range(len(shape))]
        full = tuple(
            size * self.mesh.size if sharded else size for size, sharded in zip(shape, is_sharded, strict=True)
        )
        placed = [jax.device_put(part, device) for part, device in zip(arrays, devices, strict=True)]
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec[: len(shape)]))
        return jax.make_array_from_single_device_arrays(full, sharding, placed)


def abstract_model(
    config: ModelConfig, dtype_name: str, mesh: Mesh | None = None, kernels: Kernels | None = None
) -> BoundModel:
    """A model without weights, to compile programs for; the mesh's devices need not exist on this machine."""
    dtype = jnp.dtype(dtype_name)
    kernels = load_kernels() if kernels is None else kernels
    weights = abstract_weights(config, dtype, mesh.size if mesh else 1)
    if mesh is None:
        return bind(config, dtype, weights, kernels)
    rows = weight_rows(config)
    sharded = {}
    for path, weight in weights.items():
        spec = spec_of_row(rows[path])
        shape = tuple(size * (mesh.size if axis else 1) for size, axis in zip(weight.shape, spec, strict=True))
        sharded[path] = jax.ShapeDtypeStruct(shape, weight.dtype, sharding=NamedSharding(mesh, spec))
    return bind(config, dtype, sharded, kernels, mesh)


def weight_bytes(config: ModelConfig, dtype_name: str, *, int8: bool = False, shards: int = 1) -> int:
    """Bytes of a model's weights on each device, without the padding of packed weights."""
    weights = abstract_weights(config, jnp.dtype(dtype_name), shards).values()
    vectors, matrices = (sum(math.prod(one.shape) for one in weights if len(one.shape) == axes) for axes in (1, 2))
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
            return ("triton-attention",) if gpu.takes(model.config.head_dim, model.dtype) and nvidia else ()
        case "tpu":
            return ("ragged-paged-attention",) if tpu.reads(model.config.head_dim, model.dtype) else ()
    kernels = model.kernels.cpu
    if model.platform != "cpu" or kernels is None:
        return ()
    packed = ("linear",) if any(leaf.ndim > 2 for leaf in model.leaves) else ()
    head = ("head",) if model.parallel.shards == 1 else ()
    return (f"{kernels.instruction_set}-{kernels.digest}", *packed, "attention", "rows", *head)
