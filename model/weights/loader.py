"""From an open checkpoint to a model on the device."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.kernels import cpu, gpu, tpu
from model.sharding import Cut, spec_of_row, weight_rows
from model.transformer import BoundModel, abstract_weights, bind
from model.weights.checkpoint import Checkpoint
from model.weights.int8 import GROUP
from model.weights.rows import Int8Rows, Rows
from model.weights.shards import cut_int8_rows, cut_rows
from model.weights.weight_table import load_weights


def load_model(
    checkpoint: Checkpoint,
    dtype_name: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    int8: bool = False,
    max_model_len: int | None = None,
    mesh: Mesh | None = None,
) -> BoundModel:
    """Reads all weights and places them, packed for the kernels where this device has any for the dtype.

    Args:
        checkpoint: an open model.
        dtype_name: "bfloat16" or "float32", of matrices and cache.
        progress: called with the bytes read so far and in all.
        int8: whether matrices are int8 with scales instead.
        max_model_len: tokens that a request can have; None: as many as the model takes.
        mesh: over which the model is cut; each weight is cut on the host and goes to its devices shard by shard.

    Raises:
        ModelLoadError: lists everything that is wrong with the checkpoint.
    """
    dtype = jnp.dtype(dtype_name)
    packs = dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and cpu.load() is not None

    config = checkpoint.config.for_length(max_model_len or checkpoint.config.max_position_embeddings)
    shards = None if mesh is None else _Shards(config, mesh)

    def put_int8(path: str, rows: Int8Rows) -> Any:
        if shards is not None:
            cut = cut_int8_rows(rows, shards.kept_of(path))
            return shards.placed(path, cut, lambda part: cpu.pack_int8(part.values, part.scales))
        return cpu.pack_int8_rows(rows.shape, ((run.values, run.scales) for run in rows.runs()))

    def put(path: str, rows: Rows) -> Any:
        if shards is not None:
            cut = cut_rows(rows, shards.kept_of(path))
            return shards.placed(path, cut, lambda part: cpu.pack(part) if packs and part.ndim == 2 else part)
        if packs and len(rows.shape) == 2:
            return cpu.pack_rows(rows.shape, rows.runs())
        return jax.device_put(rows.whole())

    weights = load_weights(checkpoint, np.dtype(dtype), put, progress, put_int8=put_int8 if int8 else None)
    return bind(config, dtype, weights, mesh)


class _Shards:
    """Puts what each shard holds of a weight where it belongs."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        self._cut = Cut(config, mesh.size)
        self._rows = weight_rows(config)
        self._mesh = mesh

    def kept_of(self, path: str) -> Any:
        return self._cut.kept_of(self._rows[path])

    def placed(self, path: str, parts: list[Any], pack: Callable[[Any], Any]) -> Any:
        """One array over the mesh, or packed weight of such, from the part of each device, packed there."""
        spec = spec_of_row(self._rows[path])
        packed = []
        for part, device in zip(parts, self._mesh.devices.flat, strict=True):
            with jax.default_device(device):
                packed.append(pack(part))

        def one(*each: Any) -> Any:
            sharding = NamedSharding(self._mesh, PartitionSpec(*spec[: each[0].ndim]))
            shape = [
                size * self._mesh.size if axis < len(spec) and spec[axis] else size
                for axis, size in enumerate(each[0].shape)
            ]
            arrays = [jax.device_put(part, device) for part, device in zip(each, self._mesh.devices.flat, strict=True)]
            return jax.make_array_from_single_device_arrays(tuple(shape), sharding, arrays)

        return jax.tree.map(one, *packed)


def abstract_model(config: ModelConfig, dtype_name: str, mesh: Mesh | None = None) -> BoundModel:
    """A model without weights, which programs can be compiled for; over a mesh, also of devices that are not here."""
    dtype = jnp.dtype(dtype_name)
    shapes = abstract_weights(config, dtype, mesh.size if mesh else 1)
    if mesh is None:
        return bind(config, dtype, shapes)
    rows = weight_rows(config)
    placed = {}
    for path, shape in shapes.items():
        spec = spec_of_row(rows[path])
        whole = tuple(size * (mesh.size if axis else 1) for size, axis in zip(shape.shape, spec, strict=True))
        placed[path] = jax.ShapeDtypeStruct(whole, shape.dtype, sharding=NamedSharding(mesh, spec))
    return bind(config, dtype, placed, mesh)


def weight_bytes(config: ModelConfig, dtype_name: str, *, int8: bool = False, shards: int = 1) -> int:
    """Bytes that the weights of a model will take on each device, but for what packing pads."""
    shapes = abstract_weights(config, jnp.dtype(dtype_name), shards).values()
    vectors, matrices = (sum(math.prod(each.shape) for each in shapes if len(each.shape) == axes) for axes in (1, 2))
    # int8: a byte a value, and a float16 for each 32.
    of_matrices = matrices * (GROUP + 2) // GROUP if int8 else matrices * jnp.dtype(dtype_name).itemsize
    return int(4 * vectors + of_matrices)


def kernels_used(model: BoundModel) -> tuple[str, ...]:
    """What does not run as XLA's own code; empty where XLA does it all.

    The CPU's kernels by their instruction set and digest, then what runs in them.
    """
    nvidia = model.device_kind.startswith("NVIDIA")
    match model.platform:
        case "gpu":
            return ("triton-attention",) if gpu.takes(model.config.head_dim, model.dtype) and nvidia else ()
        case "tpu":
            return ("ragged-paged-attention",) if tpu.reads(model.config.head_dim, model.dtype) else ()
    kernels = cpu.load() if model.platform == "cpu" else None
    if kernels is None:
        return ()
    packed = ("linear",) if any(leaf.ndim > 2 for leaf in model.leaves) else ()
    head = ("head",) if model.cut.shards == 1 else ()
    return (f"{kernels.instruction_set}-{kernels.digest}", *packed, "attention", "rows", *head)
