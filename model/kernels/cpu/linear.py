"""The packed linear map: bfloat16 weights in the order in which the kernel reads them."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.kernels.cpu.library import TARGET, require

COLUMNS = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] packed as `data` [ceil(n/32), ceil(k/2), 32, 2] bfloat16, padded with zeros.

    Element [i, j] is data[i // 32, j // 2, i % 32, j % 2].
    """

    data: Array
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})


@jax.jit
def pack(w: Array) -> PackedWeight:
    """Packs w [n, k] (rounded to bfloat16 if it is wider); the values are w's, only their order changes."""
    n, k = w.shape
    padded = jnp.pad(w.astype(jnp.bfloat16), ((0, -n % COLUMNS), (0, k % 2)))
    # A pair moves as one 32-bit word, which XLA transposes faster than two halves.
    words = jax.lax.bitcast_convert_type(padded.reshape(-1, COLUMNS, (k + 1) // 2, 2), jnp.uint32)
    data = jax.lax.bitcast_convert_type(words.transpose(0, 2, 1), jnp.bfloat16)
    return PackedWeight(data, n, k)


def unpack_rows(weight: PackedWeight, rows: Array) -> Array:
    """Rows `rows` [M] int32 (each in 0 .. n-1) of the weight: [M, k] bfloat16."""
    pairs = weight.data[rows // COLUMNS, :, rows % COLUMNS]
    return pairs.reshape(rows.shape[0], -1)[:, : weight.k]


def linear(x: Array, weight: PackedWeight, out_dtype: DTypeLike = jnp.float32, *, live: Array | None = None) -> Array:
    """y [M, n] = x [M, k] bfloat16 times the weight transposed, summed in float32 in the order that tiles.h states.

    A row of y has the same bits for every M. Rows from `live` ([] int32, None = M) on are padding: they are not
    computed, and y has zeros there. bfloat16 is the float32 result rounded to nearest even.
    Raises RuntimeError where `load()` gives None, and TypeError or ValueError on an x of another dtype or width.
    """
    require()
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"x is {x.dtype}, not bfloat16")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {x.shape}, not [M, {weight.k}]")
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((x.shape[0], weight.n), out_dtype))
    return call(x, weight.data, jnp.int32(x.shape[0]) if live is None else live)
