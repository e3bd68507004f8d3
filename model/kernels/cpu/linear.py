"""The packed linear map: weights in the order in which the kernel reads them, bfloat16 or int8 with scales."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from model.kernels.cpu.library import Target
from model.layout import COLUMN_BLOCK, GROUP_SIZE
from model.weights.rows import Int8Array, aligned_empty

_BF16 = np.dtype(ml_dtypes.bfloat16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] packed as `data` [ceil(n/32), ceil(k/2), 32, 2] bfloat16, padded with zeros.

    Element [i, j] is data[i // 32, j // 2, i % 32, j % 2].
    """

    data: Array
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedInt8:
    """A weight [n, k] as int8 with a float16 scale for each 32 of a row: the values of GGUF's Q8_0.

    `data` [ceil(n/32), ceil(k/32) * 32, 32] int8 and `scales` [ceil(n/32), ceil(k/32), 32] float16, padded with zeros:
    element [i, j] is data[i // 32, j, i % 32] * scales[i // 32, j // 32, i % 32].
    """

    data: Array
    scales: Array
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})


type Packed = PackedWeight | PackedInt8


def pack(shape: tuple[int, ...], runs: Iterable[NDArray[Any]]) -> PackedWeight:
    """Pack a weight [n, k] that comes in runs of rows, rounded to bfloat16 if it is wider."""
    n, k = shape
    # A pair moves as one 32-bit word.
    words, block = aligned_empty((-(-n // COLUMN_BLOCK), (k + 1) // 2, COLUMN_BLOCK), np.uint32), 0
    for rows in _column_blocks(runs):
        pairs = np.ascontiguousarray(_padded(rows.astype(_BF16, copy=False), 0, k % 2)).view(np.uint32)
        blocks = pairs.reshape(-1, COLUMN_BLOCK, words.shape[1])
        words[block : block + len(blocks)] = blocks.transpose(0, 2, 1)
        block += len(blocks)
    return PackedWeight(jax.device_put(words.view(_BF16).reshape(*words.shape, 2)), n, k)


def pack_int8(shape: tuple[int, ...], runs: Iterable[Int8Array]) -> PackedInt8:
    """Pack a weight [n, k] that comes in runs of rows; only the order of its values changes."""
    n, k = shape
    groups = -(-k // GROUP_SIZE)
    data = aligned_empty((-(-n // COLUMN_BLOCK), groups * GROUP_SIZE, COLUMN_BLOCK), np.int8)
    scales, block = aligned_empty((data.shape[0], groups, COLUMN_BLOCK), np.float16), 0
    for joined in _column_blocks(run.joined() for run in runs):
        rows = Int8Array.split(joined, k)
        padded = _padded(rows.values, 0, -k % GROUP_SIZE).reshape(-1, COLUMN_BLOCK, groups * GROUP_SIZE)
        data[block : block + len(padded)] = padded.transpose(0, 2, 1)
        scales[block : block + len(padded)] = rows.scales.reshape(-1, COLUMN_BLOCK, groups).transpose(0, 2, 1)
        block += len(padded)
    return PackedInt8(jax.device_put(data), jax.device_put(scales), n, k)


def _column_blocks(runs: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The rows in runs of full column blocks; the last block is padded with zeros."""
    rest: NDArray[Any] | None = None
    for run in runs:
        rows = run if rest is None else np.concatenate([rest, run])
        full = len(rows) // COLUMN_BLOCK * COLUMN_BLOCK
        if full:
            yield rows[:full]
        rest = rows[full:] if full < len(rows) else None
    if rest is not None:
        yield _padded(rest, -len(rest) % COLUMN_BLOCK, 0)


def _padded(array: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    return np.pad(array, ((0, rows), (0, columns))) if rows or columns else array


def unpack_rows(weight: Packed, rows: Array) -> Array:
    """Rows `rows` [M] int32 (each in 0 .. n-1) of the weight, exact: [M, k], bfloat16, or float32 of an int8 weight."""
    block, column = rows // COLUMN_BLOCK, rows % COLUMN_BLOCK
    if isinstance(weight, PackedWeight):
        return weight.data[block, :, column].reshape(rows.shape[0], -1)[:, : weight.k]
    values = weight.data[block, :, column].astype(jnp.float32)  # [M, k padded]
    scales = weight.scales[block, :, column].astype(jnp.float32)
    scaled = values.reshape(rows.shape[0], -1, GROUP_SIZE) * scales[:, :, None]
    return scaled.reshape(rows.shape[0], -1)[:, : weight.k]


def unpack(weight: Packed) -> Array:
    """The full weight [n, k], of the dtype of `unpack_rows`."""
    blocks = weight.data.shape[0]
    if isinstance(weight, PackedWeight):
        rows = weight.data.transpose(0, 2, 1, 3)  # [B, 32, k/2, 2]
    else:
        values = weight.data.astype(jnp.float32).reshape(blocks, -1, GROUP_SIZE, COLUMN_BLOCK)
        rows = (values * weight.scales.astype(jnp.float32)[:, :, None]).transpose(0, 3, 1, 2)  # [B, 32, groups, 32]
    return rows.reshape(blocks * COLUMN_BLOCK, -1)[: weight.n, : weight.k]


def linear(x: Array, weight: Packed, out_dtype: DTypeLike = jnp.float32, *, live: Array | None = None) -> Array:
    """y [M, n] = x [M, k] bfloat16 times the weight transposed, summed in float32 in the order stated in tiles.h.

    A row of y has the same bits for every M. Rows from `live` ([] int32, None = M) on are padding: they are not
    computed, and y is zero there. A bfloat16 y is the float32 result rounded to nearest even.

    Raises:
        TypeError, ValueError: x has another dtype or width.
    """
    check_input(x, weight)
    live = jnp.int32(x.shape[0]) if live is None else live
    target = Target.LINEAR if isinstance(weight, PackedWeight) else Target.LINEAR_INT8
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], weight.n), out_dtype))
    return call(x, *jax.tree.leaves(weight), live)


def check_input(x: Array, weight: Packed) -> None:
    """Raise TypeError or ValueError unless x is [M, k] bfloat16."""
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"x is {x.dtype}, not bfloat16")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {x.shape}, not [M, {weight.k}]")
