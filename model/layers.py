"""The blocks of a decoder layer: RMSNorm, attention, gated MLP.

The residual stream is float32 throughout; what enters a linear map or the cache is rounded to the model's dtype. On the
default model in bfloat16 this takes the mean log-prob error from 0.043 to the figure in docs/design.md.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from model.attention import attend
from model.config import ModelConfig
from model.kernels import cpu
from model.kernels.choice import by_platform
from model.kv_cache import Addresses
from model.linear import Linear
from model.reduce import row_sum
from model.rotary import rotate_and_store


class RMSNorm(nnx.Module):
    """x / rms(x) * weight in float32 (Zhang and Sennrich 2019), rounded to dtype. Weight [D] float32."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., D] float32 -> [..., D]; `live` as in Linear."""
        rows = x.reshape(-1, x.shape[-1])
        live = _all_of(rows) if live is None else live
        y: Array = by_platform(
            rows,
            self.weight.get_value(),
            live,
            on_cpu=partial(cpu.rms_norm, epsilon=self.epsilon, dtype=self.dtype),
            xla=partial(rms_norm_in_xla, epsilon=self.epsilon, dtype=self.dtype),
        )
        return y.reshape(x.shape)


def rms_norm_in_xla(x: Array, weight: Array, live: Array, *, epsilon: float, dtype: DTypeLike) -> Array:
    """RMSNorm of x [M, D] for any platform; what rows from `live` on give means nothing."""
    del live
    squares = row_sum(x * x)[:, None]
    return (x * jax.lax.rsqrt(squares / x.shape[1] + jnp.float32(epsilon)) * weight).astype(dtype)


def swiglu(gate_up: Array, live: Array | None, dtype: jnp.dtype) -> Array:
    """silu(gate) * up of gate_up [M, 2 F] float32, gate first: [M, F], rounded to dtype; `live` as in Linear."""
    live = _all_of(gate_up) if live is None else live
    y: Array = by_platform(
        gate_up, live, on_cpu=partial(cpu.swiglu, dtype=dtype), xla=partial(swiglu_in_xla, dtype=dtype)
    )
    return y


def swiglu_in_xla(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """`swiglu` for any platform; what rows from `live` on give means nothing."""
    del live
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def _all_of(x: Array) -> Array:
    return jnp.asarray(x.shape[0], jnp.int32)


class Attention(nnx.Module):
    """Grouped-query attention with q, k and v in one product."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        dims = config.dims()
        self.config = config
        self.qkv = Linear(dims["Q"] + 2 * dims["KV"], dims["D"], dtype, bias=config.traits.qkv_bias)
        self.out = Linear(dims["D"], dims["Q"], dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        angles: tuple[Array, Array],
        pages: tuple[Array, Array],
        tables: Array,
        at: Addresses,
    ) -> tuple[Array, tuple[Array, Array]]:
        """x [R, T, D] -> [R, T, D] and this layer's key and value pages with the new tokens stored."""
        R, T, _ = x.shape
        H, K, E = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = self.qkv(x, at.live).reshape(R, T, H + 2 * K, E)
        queries, (keys, values) = rotate_and_store(heads, angles, pages, tables, positions)
        return self.out(attend(queries, keys, values, tables, positions), at.live), (keys, values)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020) with gate and up in one product."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.gate_up = Linear(2 * config.intermediate_size, config.hidden_size, dtype)
        self.dtype = dtype
        self.down = Linear(config.hidden_size, config.intermediate_size, dtype)

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [R, T, D] -> [R, T, D]; `live` as in Linear."""
        gate_up = self.gate_up(x, live)
        hidden = swiglu(gate_up.reshape(-1, gate_up.shape[-1]), live, self.dtype)
        return self.down(hidden.reshape(*x.shape[:-1], -1), live)


class Layer(nnx.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        angles: tuple[Array, Array],
        pages: tuple[Array, Array],
        tables: Array,
        at: Addresses,
    ) -> tuple[Array, tuple[Array, Array]]:
        """x [R, T, D] -> [R, T, D] and this layer's pages with the new tokens stored."""
        with jax.named_scope("attention"):
            y, pages = self.attention(self.attention_norm(x, at.live), positions, angles, pages, tables, at)
            x = x + y
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x, at.live), at.live), pages
