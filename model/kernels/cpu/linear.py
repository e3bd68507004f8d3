"""The packed linear map: weights in the order in which the kernel reads them, bfloat16 or int8 with scales."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.kernels.cpu.library import INT8_TARGET, TARGET, require

COLUMNS = 32
GROUP = 32  # elements of a row that share a scale


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


@jax.jit
def pack(w: Array) -> PackedWeight:
    """Packs w [n, k] (rounded to bfloat16 if it is wider); the values are w's, only their order changes."""
    n, k = w.shape
    padded = jnp.pad(w.astype(jnp.bfloat16), ((0, -n % COLUMNS), (0, k % 2)))
    # A pair moves as one 32-bit word, which XLA transposes faster than two halves.
    words = jax.lax.bitcast_convert_type(padded.reshape(-1, COLUMNS, (k + 1) // 2, 2), jnp.uint32)
    data = jax.lax.bitcast_convert_type(words.transpose(0, 2, 1), jnp.bfloat16)
    return PackedWeight(data, n, k)


@jax.jit
def pack_int8(values: Array, scales: Array) -> PackedInt8:
    """Packs values [n, k] int8 and scales [n, ceil(k/32)] float16; only their order changes."""
    n, k = values.shape
    rows = -n % COLUMNS
    data = jnp.pad(values, ((0, rows), (0, -k % GROUP))).reshape(-1, COLUMNS, k + -k % GROUP)
    groups = jnp.pad(scales, ((0, rows), (0, 0))).reshape(-1, COLUMNS, scales.shape[1])
    return PackedInt8(data.transpose(0, 2, 1), groups.transpose(0, 2, 1), n, k)


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


def check_input(x: Array, weight: Packed) -> None:
    """Raises TypeError or ValueError unless x is [M, k] bfloat16."""
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"x is {x.dtype}, not bfloat16")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {x.shape}, not [M, {weight.k}]")
