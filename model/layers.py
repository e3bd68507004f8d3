"""The blocks of a decoder layer: RMSNorm, rotary embedding, attention, gated MLP.

Activations are float32 throughout; what enters a linear map or the cache is rounded to the model's dtype. On the
default model in bfloat16 this takes the mean log-prob error from 0.043 to the figure in docs/design.md.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.attention import attend
from model.config import ModelConfig
from model.kv_cache import Addresses, write_heads
from model.linear import Linear
from model.reduce import row_sum


class RMSNorm(nnx.Module):
    """x / rms(x) * weight in float32 (Zhang and Sennrich 2019). Weight [D] float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """x [..., D] float32 -> [..., D] float32."""
        size = x.shape[-1]
        squares = row_sum((x * x).reshape(-1, size)).reshape(*x.shape[:-1], 1)
        return x * jax.lax.rsqrt(squares / size + jnp.float32(self.epsilon)) * self.weight.get_value()


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin [R, T, 1, E/2] float32 of each position (Su et al. 2021), angles in float32 throughout."""
    frequencies = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates the pairs (e, e + E/2) of x [R, T, heads, E] float32 by the angles of its positions."""
    cos, sin = angles
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


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
        q, k = rotate(heads[:, :, :H], angles), rotate(heads[:, :, H : H + K], angles)
        keys = write_heads(pages[0], k, at)
        values = write_heads(pages[1], heads[:, :, H + K :], at)
        return self.out(attend(q, keys, values, tables, positions), at.live), (keys, values)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020) with gate and up in one product."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.gate_up = Linear(2 * config.intermediate_size, config.hidden_size, dtype)
        self.down = Linear(config.hidden_size, config.intermediate_size, dtype)

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [R, T, D] -> [R, T, D]; `live` as in Linear."""
        gate, up = jnp.split(self.gate_up(x, live), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up, live)


class Layer(nnx.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
            y, pages = self.attention(self.attention_norm(x), positions, angles, pages, tables, at)
            x = x + y
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x), at.live), pages
