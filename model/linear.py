"""The one seam for weights: a linear map whose weight is plain or packed for a kernel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.kernels import cpu
from model.kernels.dispatch import by_platform
from model.sharding import Cut

# XLA:CPU has no fast path for a one-row bf16 product (1.4 GB/s against 13, docs/design.md), and one row would also
# take another route, with other last bits, than many rows do.
MIN_ROWS = 2
_BLOCKS = 64  # of 32 rows of a packed weight that an accelerator unpacks at once

type Weight = Array | cpu.Packed


def matmul(x: Array, weight: Weight, live: Array | None = None) -> Array:
    """x [M, K] times weight [N, K] transposed: [M, N] float32; x is rounded to the weight's dtype first.

    To bfloat16 for an int8 weight. Rows from `live` ([] int32, None = M) on are padding: what they give means nothing,
    and the kernel leaves them out.
    """
    if isinstance(weight, Array):
        return _dot(x.astype(weight.dtype), weight)
    live = jnp.asarray(x.shape[0], jnp.int32) if live is None else live
    y: Array = by_platform(
        x.astype(jnp.bfloat16),
        weight,
        live,
        on_cpu=_in_kernel,
        on_gpu=_by_blocks,
        on_tpu=_by_blocks,
        xla=_unpacked_in_xla,
    )
    return y


def take_rows(weight: Weight, ids: Array) -> Array:
    """Rows `ids` [M] of a weight [N, K]: [M, K]. The embedding shares its storage with a tied head."""
    return weight[ids] if isinstance(weight, Array) else cpu.unpack_rows(weight, ids)


def _dot(x: Array, weight: Array) -> Array:
    """x [M, K] times weight [N, K] transposed: [M, N] float32."""
    rows = x.shape[0]
    if rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - rows), (0, 0)))
    # Products of bfloat16 are exact in float32; those of float32 would be of rounded operands on a GPU or TPU.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return y[:rows]


def _in_kernel(x: Array, weight: cpu.Packed, live: Array) -> Array:
    return cpu.linear(x, weight, live=live)


def _unpacked_in_xla(x: Array, weight: cpu.Packed, live: Array) -> Array:
    """The same for any platform: the weight is unpacked in each call, which is slow, but no number is rounded.

    To [N, K], not by its blocks: a product of another layout would have other last bits for one row than for many.
    """
    del live
    unpacked = cpu.unpack(weight)
    return _dot(x.astype(unpacked.dtype), unpacked)


def _by_blocks(x: Array, weight: cpu.Packed, live: Array) -> Array:
    """The same for an accelerator, some rows of the weight at a time: all in float32 would take too much memory."""
    del live
    arrays = cpu.arrays_of(weight)
    blocks = arrays[0].shape[0]
    width = min(_BLOCKS, blocks)

    def one(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * width, blocks - width)  # the last ones may be computed twice
        parts = tuple(jax.lax.dynamic_slice_in_dim(array, start, width) for array in arrays)
        part = cpu.unpack(cpu.like(weight, parts, width * cpu.COLUMNS))
        return jax.lax.dynamic_update_slice_in_dim(y, _dot(x.astype(part.dtype), part), start * cpu.COLUMNS, axis=1)

    empty = jnp.zeros((x.shape[0], blocks * cpu.COLUMNS), jnp.float32)
    y: Array = jax.lax.fori_loop(0, -(-blocks // width), one, empty)
    return y[:, : weight.n]


class Linear(nnx.Module):
    """y = x W^T (+ b): weight [N, K] in the model's dtype, bias [N] float32.

    Where K is cut over shards (`summed`), each has a part of every sum, and gets the whole of them.
    """

    def __init__(self, n: int, k: int, dtype: jnp.dtype, *, bias: bool = False, summed: Cut | None = None) -> None:
        self.weight = nnx.Param(jnp.zeros((n, k), dtype))
        self.bias = nnx.Param(jnp.zeros((n,), jnp.float32)) if bias else None
        self.summed = summed

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., K] -> [..., N] float32: the sums are not rounded, so the residual stream keeps them whole.

        `live` as in matmul, of the leading axes taken as one.
        """
        y = matmul(x.reshape(-1, x.shape[-1]), self.weight.get_value(), live)
        y = y if self.summed is None else self.summed.total(y)
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.reshape(*x.shape[:-1], y.shape[-1])
