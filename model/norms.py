"""Norms of hidden states, and of the heads or latents of attention."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from model.kernels import cpu
from model.linear import ModelSpec, all_live
from model.reduce import row_sum

_FLOAT32 = jnp.dtype(jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight in float32 (Zhang and Sennrich 2019), rounded to dtype. Weight [D] float32.

    `sharded_axis` is the letter of D if D is sharded: the mean is then over all shards. The result is multiplied by
    `scale`.
    """

    def __init__(
        self,
        size: int,
        spec: ModelSpec,
        dtype: jnp.dtype,
        *,
        sharded_axis: str | None = None,
        scale: float = 1.0,
        epsilon: float | None = None,
    ) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.scale = scale
        self.epsilon = spec.parallel.config.rms_norm_eps if epsilon is None else epsilon
        self.dtype = dtype
        self.kernels = spec.kernels
        self.sharded = None if sharded_axis is None else (spec.parallel, sharded_axis)

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., D] float32 -> [..., D]; `live` as in Linear."""
        rows, weight = x.reshape(-1, x.shape[-1]), self.weight.get_value()
        weight = weight if self.scale == 1 else weight * jnp.float32(self.scale)
        if self.sharded is not None:
            parallel, axis = self.sharded
            mean_square = parallel.psum(row_sum(rows * rows))[:, None] / parallel.count(axis)
            return _normalize(rows, mean_square, weight, self.epsilon).astype(self.dtype).reshape(x.shape)
        y: Array = self.kernels.dispatch(
            rows,
            weight,
            all_live(rows) if live is None else live,
            on_cpu=partial(cpu.rms_norm, epsilon=self.epsilon, dtype=self.dtype),
            xla=partial(rms_norm_in_xla, epsilon=self.epsilon, dtype=self.dtype),
        )
        return y.reshape(x.shape)


class LayerNorm(RMSNorm):
    """(x - mean) / std * weight + bias (Ba et al. 2016), the RMSNorm of x - mean; some families have no bias."""

    def __init__(self, size: int, spec: ModelSpec, dtype: jnp.dtype, *, scale: float = 1.0) -> None:
        has_bias = spec.parallel.config.traits.norm_bias
        super().__init__(size, spec, _FLOAT32 if has_bias else dtype, scale=scale)
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32)) if has_bias else None
        self.biased_dtype = dtype

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., D] float32 -> [..., D]; `live` as in Linear."""
        rows = x.reshape(-1, x.shape[-1])
        y = super().__call__(rows - row_sum(rows)[:, None] / rows.shape[1], live)
        if self.bias is not None:
            y = (y + self.bias.get_value() * jnp.float32(self.scale)).astype(self.biased_dtype)
        return y.reshape(x.shape)


def norm_of(spec: ModelSpec, dtype: jnp.dtype, *, scale: float = 1.0) -> RMSNorm:
    """The norm of hidden states of the family's kind."""
    config = spec.parallel.config
    kind = RMSNorm if config.traits.norm == "rms" else LayerNorm
    return kind(config.hidden_size, spec, dtype, scale=scale)


def rms_norm_in_xla(x: Array, weight: Array, _live: Array, *, epsilon: float, dtype: DTypeLike) -> Array:
    """RMSNorm of x [M, D] on any platform; results of rows from `live` on are undefined."""
    return _normalize(x, row_sum(x * x)[:, None] / x.shape[1], weight, epsilon).astype(dtype)


def _normalize(x: Array, mean_square: Array, weight: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt(mean_square + jnp.float32(epsilon)) * weight
