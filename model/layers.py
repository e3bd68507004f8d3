"""The blocks of a decoder layer: RMSNorm, attention, gated MLP. A family's row says which of them it has.

The residual stream is float32 throughout; what enters a linear map or the cache is rounded to the model's dtype. On the
default model in bfloat16 this takes the mean log-prob error from 0.043 to the figure in docs/design.md.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from model.attention import attend
from model.config import LayerKind
from model.kernels import cpu
from model.kernels.dispatch import by_platform
from model.kv_cache import Addresses, LayerPages
from model.linear import Linear
from model.reduce import row_sum
from model.rotary import rotate_and_store
from model.sharding import Cut


class RMSNorm(nnx.Module):
    """x / rms(x) * weight in float32 (Zhang and Sennrich 2019), rounded to dtype. Weight [D] float32.

    Where D is cut over shards (`over`, its letter in a cut), the mean is of all of them.
    """

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype, *, over: tuple[Cut, str] | None = None) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype
        self.over = over

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [..., D] float32 -> [..., D]; `live` as in Linear."""
        rows = x.reshape(-1, x.shape[-1])
        if self.over is not None:
            cut, letter = self.over
            mean = cut.total(row_sum(rows * rows))[:, None] / cut.count(letter)
            return _scaled(rows, mean, self.weight.get_value(), self.epsilon).astype(self.dtype).reshape(x.shape)
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
    return _scaled(x, row_sum(x * x)[:, None] / x.shape[1], weight, epsilon).astype(dtype)


def _scaled(x: Array, mean: Array, weight: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt(mean + jnp.float32(epsilon)) * weight


def gated(gate_up: Array, live: Array | None, activation: str, dtype: jnp.dtype) -> Array:
    """activation(gate) * up of gate_up [M, 2 F] float32, gate first: [M, F], rounded to dtype; `live` as in Linear."""
    live = _all_of(gate_up) if live is None else live
    on_cpu, xla = (cpu.swiglu, swiglu_in_xla) if activation == "silu" else (cpu.geglu, geglu_in_xla)
    y: Array = by_platform(gate_up, live, on_cpu=partial(on_cpu, dtype=dtype), xla=partial(xla, dtype=dtype))
    return y


def swiglu_in_xla(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """silu(gate) * up for any platform; what rows from `live` on give means nothing."""
    del live
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def geglu_in_xla(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """gelu(gate) * up for any platform, gelu by its approximation with tanh; as `swiglu_in_xla`.

    (1 + tanh(u)) / 2 is written as sigmoid(2 u), which keeps its digits where it is small.
    """
    del live
    gate, up = jnp.split(gate_up, 2, axis=-1)
    share = jax.nn.sigmoid(jnp.float32(2 * math.sqrt(2 / math.pi)) * (gate + jnp.float32(0.044715) * gate**3))
    return (gate * share * up).astype(dtype)


def soft_cap(x: Array, live: Array | None, cap: float) -> Array:
    """cap * tanh(x / cap) of x [M, N] float32, or x where cap is 0; `live` as in Linear."""
    if not cap:
        return x
    live = _all_of(x) if live is None else live
    y: Array = by_platform(x, live, on_cpu=partial(cpu.soft_cap, cap=cap), xla=partial(soft_cap_in_xla, cap=cap))
    return y


def soft_cap_in_xla(x: Array, live: Array, *, cap: float) -> Array:
    """`soft_cap` for any platform."""
    del live
    return jnp.float32(cap) * jnp.tanh(x / jnp.float32(cap))


def _all_of(x: Array) -> Array:
    return jnp.asarray(x.shape[0], jnp.int32)


# Letters of the sizes over which queries and keys are normed.
_NORMED: dict[str, tuple[str | None, str | None]] = {"none": (None, None), "head": ("E", "E"), "whole": ("Q", "KV")}


class Attention(nnx.Module):
    """Grouped-query attention with q, k and v in one product."""

    def __init__(self, cut: Cut, kind: LayerKind, dtype: jnp.dtype) -> None:
        config = cut.local
        dims, traits = config.dims(), config.traits
        self.config = config
        self.kind = kind
        self.qkv = Linear(dims["QKV"], dims["D"], dtype, bias=traits.qkv_bias)
        self.q_norm, self.k_norm = (
            None if of is None else RMSNorm(dims[of], config.rms_norm_eps, jnp.dtype(jnp.float32), over=_over(cut, of))
            for of in _NORMED[traits.qk_norm]
        )
        self.out = Linear(dims["D"], dims["Q"], dtype, summed=_summed(cut))

    def __call__(
        self,
        x: Array,
        positions: Array,
        angles: tuple[Array, Array],
        pages: LayerPages,
        tables: Array,
        at: Addresses,
    ) -> tuple[Array, LayerPages]:
        """x [R, T, D] -> [R, T, D] and this layer's pages with the new tokens stored."""
        queries, pages = rotate_and_store(self.heads(x, at.live), angles, pages, tables, positions)
        config = self.config
        seen = attend(
            queries,
            pages,
            tables,
            positions,
            scale=config.attention_scale,
            window=self.kind.window,
            cap=config.attention_cap,
        )
        return self.out(seen, at.live), pages

    def heads(self, x: Array, live: Array | None = None) -> Array:
        """x [R, T, D] -> queries, keys and values [R, T, H + 2 K, E] float32, not rotated; `live` as in Linear."""
        R, T, _ = x.shape
        H, K, E = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = self.qkv(x, live).reshape(R, T, H + 2 * K, E)
        if self.q_norm is None or self.k_norm is None:
            return heads
        q, k, v = jnp.split(heads, (H, H + K), axis=2)
        return jnp.concatenate([_normed(q, self.q_norm, live), _normed(k, self.k_norm, live), v], axis=2)


def _over(cut: Cut, letter: str) -> tuple[Cut, str] | None:
    return (cut, letter) if cut.shards > 1 and letter != "E" else None


def _summed(cut: Cut) -> Cut | None:
    return cut if cut.shards > 1 else None


def _normed(heads: Array, norm: RMSNorm, live: Array | None) -> Array:
    """heads [R, T, h, E], normed one by one or all of a token as one: as many elements as the norm has weights."""
    R, T, h, E = heads.shape
    rows = heads.reshape(-1, norm.weight.get_value().shape[0])
    per_token = rows.shape[0] // (R * T)
    return norm(rows, None if live is None else live * per_token).reshape(R, T, h, E)


class MLP(nnx.Module):
    """A gated MLP (Shazeer 2020) with gate and up in one product."""

    def __init__(self, cut: Cut, dtype: jnp.dtype) -> None:
        config = cut.local
        self.gate_up = Linear(2 * config.intermediate_size, config.hidden_size, dtype)
        self.activation = config.traits.activation
        self.dtype = dtype
        self.down = Linear(config.hidden_size, config.intermediate_size, dtype, summed=_summed(cut))

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [R, T, D] -> [R, T, D]; `live` as in Linear."""
        gate_up = self.gate_up(x, live)
        hidden = gated(gate_up.reshape(-1, gate_up.shape[-1]), live, self.activation, self.dtype)
        return self.down(hidden.reshape(*x.shape[:-1], -1), live)


class Layer(nnx.Module):
    """One decoder layer: x + attention(x), then x + mlp(x), with norms before or after either, or both."""

    def __init__(self, cut: Cut, kind: LayerKind, dtype: jnp.dtype) -> None:
        config = cut.whole

        def norm(wanted: bool, of: jnp.dtype) -> RMSNorm | None:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, of) if wanted else None

        traits, whole = config.traits, jnp.dtype(jnp.float32)  # of what is added to the residual stream
        self.attention_norm = norm(traits.pre_norm, dtype)
        self.attention = Attention(cut, kind, dtype)
        self.attention_post_norm = norm(traits.post_norm, whole)
        self.mlp_norm = norm(traits.pre_norm, dtype)
        self.mlp = MLP(cut, dtype)
        self.mlp_post_norm = norm(traits.post_norm, whole)

    def __call__(
        self,
        x: Array,
        positions: Array,
        angles: tuple[Array, Array],
        pages: LayerPages,
        tables: Array,
        at: Addresses,
    ) -> tuple[Array, LayerPages]:
        """x [R, T, D] -> [R, T, D] and this layer's pages with the new tokens stored."""
        with jax.named_scope("attention"):
            y, pages = self.attention(_maybe(self.attention_norm, x, at), positions, angles, pages, tables, at)
            x = x + _maybe(self.attention_post_norm, y, at)
        with jax.named_scope("mlp"):
            y = self.mlp(_maybe(self.mlp_norm, x, at), at.live)
            return x + _maybe(self.mlp_post_norm, y, at), pages


def _maybe(norm: RMSNorm | None, x: Array, at: Addresses) -> Array:
    return x if norm is None else norm(x, at.live)
