"""The one seam for weights: a linear map whose weight is plain or packed for a kernel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.kernels import cpu

# XLA:CPU has no fast path for a one-row bf16 product (1.4 GB/s against 13, docs/design.md), and one row would also
# take another route, with other last bits, than many rows do.
MIN_ROWS = 2

type Weight = Array | cpu.PackedWeight


def matmul(x: Array, weight: Weight, live: Array | None = None) -> Array:
    """x [M, K] times weight [N, K] transposed: [M, N] float32; x is rounded to the weight's dtype first.

    Rows from `live` ([] int32, None = M) on are padding: what they give means nothing, and the kernel leaves them out.
    """
    if isinstance(weight, cpu.PackedWeight):
        return cpu.linear(x.astype(jnp.bfloat16), weight, live=live)
    rows = x.shape[0]
    if rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - rows), (0, 0)))
    y = jax.lax.dot_general(
        x.astype(weight.dtype), weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y[:rows]


def take_rows(weight: Weight, ids: Array) -> Array:
    """Rows `ids` [M] of a weight [N, K]: [M, K]. The embedding shares its storage with a tied head."""
    if isinstance(weight, cpu.PackedWeight):
        return cpu.unpack_rows(weight, ids)
    return weight[ids]


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
