"""Linear maps whose weight is plain or packed for a kernel."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.kernels import cpu
from model.kernels.dispatch import Kernels
from model.layout import COLUMN_BLOCK
from model.packed import Packed, PackedWeight, StackedWeight, unpack, unpack_rows
from model.sharding import TensorParallel

# XLA:CPU has no fast path for a one-row bf16 product (1.4 GB/s against 13, docs/design.md), and computes one row by
# other code, with other last bits, than many rows.
MIN_ROWS = 2
_BLOCKS = 64  # column blocks of a packed weight that an accelerator unpacks at once

type Weight = Array | Packed


def matmul(x: Array, weight: Weight, kernels: Kernels, live: Array | None = None) -> Array:
    """x [M, K] in the model's dtype times weight [N, K] transposed: [M, N] float32.

    Products with a weight in a block format are of float32, unless x and the weight are bfloat16. Rows from `live`
    ([] int32, None = M) on are padding: their results are undefined, and the kernel skips them.
    """
    if isinstance(weight, Array):
        return _dot(x.astype(weight.dtype), weight)
    live = all_live(x) if live is None else live
    if isinstance(weight, StackedWeight):
        return jnp.concatenate([matmul(x, part, kernels, live) for part in weight.parts], axis=1)
    y: Array = kernels.dispatch(
        *operands(x, weight), live, on_cpu=cpu.linear, on_gpu=_by_blocks, on_tpu=_by_blocks, xla=_in_xla
    )
    return y


def operands(x: Array, weight: PackedWeight) -> tuple[Array, PackedWeight]:
    """x and the weight as the kernels multiply them: x bfloat16 if both are, else float32, its columns in the order of
    the weight's blocks."""
    x = x if weight.format.name == "BF16" else x.astype(jnp.float32)
    return (x, weight) if weight.order is None else (x[:, weight.order], replace(weight, order=None))


def all_live(x: Array) -> Array:
    """The number of rows of x as `live`: none of them is padding."""
    return jnp.asarray(x.shape[0], jnp.int32)


def take_rows(weight: Array | PackedWeight, ids: Array) -> Array:
    """Rows `ids` [M] of a weight [N, K]: [M, K]. The embedding shares its storage with a tied head."""
    return weight[ids] if isinstance(weight, Array) else unpack_rows(weight, ids)


def _dot(x: Array, weight: Array) -> Array:
    """x [M, K] times weight [N, K] transposed: [M, N] float32."""
    rows = x.shape[0]
    if rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - rows), (0, 0)))
    # Products of bfloat16 are exact in float32; a GPU or TPU would round the operands of float32 products.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return y[:rows]


def _in_xla(x: Array, weight: PackedWeight, _live: Array) -> Array:
    """The product on any platform: unpacks the weight in each call, which is slow but rounds nothing.

    To [N, K], not block by block: a product of another layout would have other last bits for one row than for many.
    """
    unpacked = unpack(weight)
    return _dot(x, unpacked.astype(x.dtype))


def _by_blocks(x: Array, weight: PackedWeight, _live: Array) -> Array:
    """The product on an accelerator, some column blocks at a time: all in float32 would take too much memory."""
    blocks = weight.words.shape[0]
    width = min(_BLOCKS, blocks)

    def add_blocks(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * width, blocks - width)  # the last blocks may be computed twice
        packed = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, width), weight)
        part = unpack(replace(packed, n=width * COLUMN_BLOCK))
        return jax.lax.dynamic_update_slice_in_dim(y, _dot(x, part.astype(x.dtype)), start * COLUMN_BLOCK, axis=1)

    empty = jnp.zeros((x.shape[0], blocks * COLUMN_BLOCK), jnp.float32)
    y: Array = jax.lax.fori_loop(0, -(-blocks // width), add_blocks, empty)
    return y[:, : weight.n]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Parameters shared by all modules of a model."""

    parallel: TensorParallel
    dtype: jnp.dtype  # of activations, and of matrices that are not quantized
    kernels: Kernels


class Linear(nnx.Module):
    """y = x W^T (+ b): weight [N, K] in the model's dtype, bias [N] float32.

    With `psum`, K is sharded: each shard computes a part of every sum, and the parts are added over the shards.
    """

    def __init__(self, n: int, k: int, spec: ModelSpec, *, bias: bool = False, psum: bool = False) -> None:
        self.weight = nnx.Param(jnp.zeros((n, k), spec.dtype))
        self.bias = nnx.Param(jnp.zeros((n,), jnp.float32)) if bias else None
        self.kernels = spec.kernels
        self.dtype = spec.dtype
        self.summed_over = spec.parallel if psum and spec.parallel.shards > 1 else None

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., K] -> [..., N] float32, not rounded to the model's dtype; `live` as in matmul, of the flat rows."""
        y = matmul(x.reshape(-1, x.shape[-1]).astype(self.dtype), self.weight.get_value(), self.kernels, live)
        y = y if self.summed_over is None else self.summed_over.psum(y)
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.reshape(*x.shape[:-1], y.shape[-1])
