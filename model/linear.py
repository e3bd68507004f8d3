"""The one seam for weights: a linear map whose weight is plain or packed for a kernel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.kernels import cpu
from model.kernels.choice import by_platform

# XLA:CPU has no fast path for a one-row bf16 product (1.4 GB/s against 13, docs/design.md), and one row would also
# take another route, with other last bits, than many rows do.
MIN_ROWS = 2

type Weight = Array | cpu.Packed


def matmul(x: Array, weight: Weight, live: Array | None = None) -> Array:
    """x [M, K] times weight [N, K] transposed: [M, N] float32; x is rounded to the weight's dtype first.

    To bfloat16 for an int8 weight. Rows from `live` ([] int32, None = M) on are padding: what they give means nothing,
    and the kernel leaves them out.
    """
    if isinstance(weight, cpu.PackedInt8):
        x = x.astype(jnp.bfloat16)
        live = jnp.asarray(x.shape[0], jnp.int32) if live is None else live
        y: Array = by_platform(x, weight, live, on_cpu=_int8_on_cpu, xla=_int8_in_xla)
        return y
    if isinstance(weight, cpu.PackedWeight):
        return cpu.linear(x.astype(jnp.bfloat16), weight, live=live)
    return _dot(x.astype(weight.dtype), weight)


def take_rows(weight: Weight, ids: Array) -> Array:
    """Rows `ids` [M] of a weight [N, K]: [M, K]. The embedding shares its storage with a tied head."""
    if isinstance(weight, cpu.PackedWeight | cpu.PackedInt8):
        return cpu.unpack_rows(weight, ids)
    return weight[ids]


def _dot(x: Array, weight: Array) -> Array:
    rows = x.shape[0]
    if rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - rows), (0, 0)))
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y[:rows]


def _int8_on_cpu(x: Array, weight: cpu.PackedInt8, live: Array) -> Array:
    return cpu.linear(x, weight, live=live)


def _int8_in_xla(x: Array, weight: cpu.PackedInt8, live: Array) -> Array:
    """The same for any platform: the weight is made float32 first, so it is slow, but no number is rounded."""
    del live
    rows = x.shape[0]
    x = jnp.pad(x, ((0, max(0, MIN_ROWS - rows)), (0, weight.data.shape[1] - weight.k)))
    blocks, depth, columns = weight.data.shape
    scales = weight.scales.astype(jnp.float32)[:, :, None]  # [N/32, K/32, 1, 32]
    values = weight.data.astype(jnp.float32).reshape(blocks, scales.shape[1], -1, columns) * scales
    y = jax.lax.dot_general(x.astype(jnp.float32), values.reshape(blocks, depth, columns), (((1,), (1,)), ((), ())))
    return y.reshape(x.shape[0], -1)[:rows, : weight.n]


class Linear(nnx.Module):
    """y = x W^T (+ b): weight [N, K] in the model's dtype, bias [N] float32."""

    def __init__(self, n: int, k: int, dtype: jnp.dtype, *, bias: bool = False) -> None:
        self.weight = nnx.Param(jnp.zeros((n, k), dtype))
        self.bias = nnx.Param(jnp.zeros((n,), jnp.float32)) if bias else None

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., K] -> [..., N] float32: the sums are not rounded, so the residual stream keeps them whole.

        `live` as in matmul, of the leading axes taken as one.
        """
        y = matmul(x.reshape(-1, x.shape[-1]), self.weight.get_value(), live)
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.reshape(*x.shape[:-1], y.shape[-1])
