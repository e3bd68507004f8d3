"""The packed linear map: weights in the order in which the kernel reads them, bfloat16 or int8 with scales."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from model.host_memory import aligned_empty
from model.kernels.cpu.library import INT8_TARGET, TARGET, require

COLUMNS = 32
GROUP = 32  # elements of a row that share a scale
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
    """A weight [n, k] as int8 with a float16 scale for each 32 of a row: the numbers of GGUF's Q8_0.

    `data` [ceil(n/32), ceil(k/32) * 32, 32] int8 and `scales` [ceil(n/32), ceil(k/32), 32] float16, padded with zeros:
    element [i, j] is data[i // 32, j, i % 32] * scales[i // 32, j // 32, i % 32].
    """

    data: Array
    scales: Array
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})


type Packed = PackedWeight | PackedInt8


def pack(w: ArrayLike) -> PackedWeight:
    """Packs w [n, k] (rounded to bfloat16 if it is wider); the values are w's, only their order changes."""
    rows = np.asarray(w)
    return pack_rows(rows.shape, [rows])


def pack_rows(shape: tuple[int, ...], runs: Iterable[NDArray[Any]]) -> PackedWeight:
    """`pack` of a weight [n, k] whose rows come in runs, which are not held together."""
    n, k = shape
    # A pair moves as one 32-bit word.
    words, block = aligned_empty((-(-n // COLUMNS), (k + 1) // 2, COLUMNS), np.uint32), 0
    for rows in _blocks(runs):
        pairs = np.ascontiguousarray(_padded(rows.astype(_BF16, copy=False), 0, k % 2)).view(np.uint32)
        blocks = pairs.reshape(-1, COLUMNS, words.shape[1])
        words[block : block + len(blocks)] = blocks.transpose(0, 2, 1)
        block += len(blocks)
    return PackedWeight(jax.device_put(words.view(_BF16).reshape(*words.shape, 2)), n, k)


def pack_int8(values: ArrayLike, scales: ArrayLike) -> PackedInt8:
    """Packs values [n, k] int8 and scales [n, ceil(k/32)] float16; only their order changes."""
    whole = np.asarray(values)
    return pack_int8_rows(whole.shape, [(whole, np.asarray(scales))])


def pack_int8_rows(shape: tuple[int, ...], runs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> PackedInt8:
    """`pack_int8` of a weight [n, k] whose rows come in runs, which are not held together."""
    n, k = shape
    groups = -(-k // GROUP)
    data = aligned_empty((-(-n // COLUMNS), groups * GROUP, COLUMNS), np.int8)
    scales, block = aligned_empty((data.shape[0], groups, COLUMNS), np.float16), 0
    # Values and the bytes of their scales side by side, so that runs are cut into blocks once.
    joined = (np.concatenate([v, s.view(np.int8)], axis=1) for v, s in runs)
    for rows in _blocks(joined):
        values, own = rows[:, :k], np.ascontiguousarray(rows[:, k:]).view(np.float16)
        padded = _padded(values, 0, -k % GROUP).reshape(-1, COLUMNS, groups * GROUP)
        data[block : block + len(padded)] = padded.transpose(0, 2, 1)
        scales[block : block + len(padded)] = own.reshape(-1, COLUMNS, groups).transpose(0, 2, 1)
        block += len(padded)
    return PackedInt8(jax.device_put(data), jax.device_put(scales), n, k)


def _blocks(runs: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The same rows in runs of whole blocks of 32; the last block is filled with zeros."""
    rest: NDArray[Any] | None = None
    for run in runs:
        rows = run if rest is None else np.concatenate([rest, run])
        whole = len(rows) // COLUMNS * COLUMNS
        if whole:
            yield rows[:whole]
        rest = rows[whole:] if whole < len(rows) else None
    if rest is not None:
        yield _padded(rest, -len(rest) % COLUMNS, 0)


def _padded(array: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    return np.pad(array, ((0, rows), (0, columns))) if rows or columns else array


def unpack_rows(weight: Packed, rows: Array) -> Array:
    """Rows `rows` [M] int32 (each in 0 .. n-1) of the weight: [M, k], bfloat16 or float32 as the weight's are exact."""
    block, column = rows // COLUMNS, rows % COLUMNS
    if isinstance(weight, PackedWeight):
        return weight.data[block, :, column].reshape(rows.shape[0], -1)[:, : weight.k]
    values = weight.data[block, :, column].astype(jnp.float32)  # [M, k padded]
    scales = weight.scales[block, :, column].astype(jnp.float32)
    scaled = values.reshape(rows.shape[0], -1, GROUP) * scales[:, :, None]
    return scaled.reshape(rows.shape[0], -1)[:, : weight.k]


def unpack(weight: Packed) -> Array:
    """All of a weight: [n, k], of the dtype of `unpack_rows`."""
    blocks = weight.data.shape[0]
    if isinstance(weight, PackedWeight):
        rows = weight.data.transpose(0, 2, 1, 3)  # [B, 32, k/2, 2]
    else:
        values = weight.data.astype(jnp.float32).reshape(blocks, -1, GROUP, COLUMNS)
        rows = (values * weight.scales.astype(jnp.float32)[:, :, None]).transpose(0, 3, 1, 2)  # [B, 32, groups, 32]
    return rows.reshape(blocks * COLUMNS, -1)[: weight.n, : weight.k]


def linear(x: Array, weight: Packed, out_dtype: DTypeLike = jnp.float32, *, live: Array | None = None) -> Array:
    """y [M, n] = x [M, k] bfloat16 times the weight transposed, summed in float32 in the order that tiles.h states.

    A row of y has the same bits for every M. Rows from `live` ([] int32, None = M) on are padding: they are not
    computed, and y has zeros there. bfloat16 is the float32 result rounded to nearest even.
    Raises RuntimeError where `load()` gives None, and TypeError or ValueError on an x of another dtype or width.
    """
    require()
    check_input(x, weight)
    live = jnp.int32(x.shape[0]) if live is None else live
    target = TARGET if isinstance(weight, PackedWeight) else INT8_TARGET
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], weight.n), out_dtype))
    return call(x, *arrays_of(weight), live)


def arrays_of(weight: Packed) -> tuple[Array, ...]:
    """The operands that a weight is."""
    return (weight.data,) if isinstance(weight, PackedWeight) else (weight.data, weight.scales)


def like(weight: Packed, arrays: tuple[Array, ...], n: int) -> Packed:
    """A weight of n rows of the same kind and width, from its operands."""
    if isinstance(weight, PackedWeight):
        return PackedWeight(arrays[0], n, weight.k)
    return PackedInt8(arrays[0], arrays[1], n, weight.k)


def check_input(x: Array, weight: Packed) -> None:
    """Raises TypeError or ValueError unless x is [M, k] bfloat16."""
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"x is {x.dtype}, not bfloat16")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {x.shape}, not [M, {weight.k}]")
