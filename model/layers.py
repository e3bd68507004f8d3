"""The blocks of a decoder layer: norms, attention, MLP. A family's traits determine which of them it has.

The residual stream is float32 throughout; inputs of linear maps and of the cache are rounded to the model's dtype. On
the default model in bfloat16 this takes the mean log-prob error from 0.043 to the figure in docs/design.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from model.activations import UNGATED, gated
from model.attention import attend, rotate, rotate_and_store
from model.config import LayerKind
from model.experts import add_biases, combine, expert_matmul, route, router_logits
from model.kernels import ScoreOptions
from model.kv_cache import Addresses, LayerPages
from model.latent_attention import LatentAttention
from model.linear import Linear, ModelSpec, all_live
from model.norms import RMSNorm, norm_of

_FLOAT32 = jnp.dtype(jnp.float32)


class Attention(nnx.Module):
    """Grouped-query attention with q, k and v in one product."""

    def __init__(self, spec: ModelSpec, kind: LayerKind) -> None:
        parallel = spec.parallel
        config = parallel.local
        dims, traits = config.dims(), config.traits
        self.config = config
        self.kind = kind
        self.kernels = spec.kernels
        self.qkv = Linear(dims["QKV"], dims["D"], spec, bias=config.qkv_bias)

        def qk_norm(axis: str | None) -> RMSNorm | None:
            is_sharded = parallel.shards > 1 and axis != "E"
            return RMSNorm(dims[axis], spec, _FLOAT32, sharded_axis=axis if is_sharded else None) if axis else None

        self.q_norm, self.k_norm = map(qk_norm, traits.qk_norm or (None, None))
        self.out = Linear(dims["D"], dims["Q"], spec, bias=config.qkv_bias and traits.out_bias, psum=True)
        self.sinks = nnx.Param(jnp.zeros((dims["H"],), jnp.float32)) if traits.sinks else None

    def __call__(
        self, x: Array, angles: tuple[Array, Array], pages: LayerPages, addresses: Addresses
    ) -> tuple[Array, LayerPages]:
        """x [R, T, D] -> [R, T, D] and this layer's pages with the new tokens stored."""
        config, kernels, live = self.config, self.kernels, addresses.live
        heads = self.heads(x, live)
        if config.traits.qk_norm_after_rope:
            cos, sin = angles
            heads, angles = self.rotated(heads, angles, live), (jnp.ones_like(cos), jnp.zeros_like(sin))
        queries, pages = rotate_and_store(heads, angles, pages, addresses, kernels)
        if self.kind.query_growth is not None:
            queries = queries * self.query_growth(addresses.positions)
        options = ScoreOptions(config.attention_scale, self.kind.window, config.attention_cap)
        sinks = None if self.sinks is None else self.sinks.get_value()
        context = attend(queries, pages, addresses, kernels, options, sinks)
        return self.out(context, live), pages

    def heads(self, x: Array, live: Array | None = None) -> Array:
        """x [R, T, D] -> queries, keys and values [R, T, H + 2 K, E] float32, not rotated; `live` as in Linear."""
        R, T, _ = x.shape
        H, K, E = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = self.qkv(x, live).reshape(R, T, H + 2 * K, E)
        return heads if self.config.traits.qk_norm_after_rope else self._normed(heads, live)

    def rotated(self, heads: Array, angles: tuple[Array, Array], live: Array | None = None) -> Array:
        """Heads as of `heads` with rotated queries and keys, which are normed here if the family does it so."""
        H, K = self.config.num_heads, self.config.num_kv_heads
        heads = jnp.concatenate([rotate(heads[:, :, : H + K], *angles), heads[:, :, H + K :]], axis=2)
        return self._normed(heads, live) if self.config.traits.qk_norm_after_rope else heads

    def query_growth(self, positions: Array) -> Array:
        """Factors [R, T, 1, 1] of queries at positions [R, T], from a table: equal to the bit in every batch."""
        assert self.kind.query_growth is not None
        beta, length = self.kind.query_growth
        table = 1 + beta * np.log1p(np.arange(self.config.max_position_embeddings // length + 1))
        factors: Array = jnp.asarray(table, jnp.float32)[jnp.maximum(positions, 0) // length]
        return factors[..., None, None]

    def _normed(self, heads: Array, live: Array | None) -> Array:
        if self.q_norm is None or self.k_norm is None:
            return heads
        H, K = self.config.num_heads, self.config.num_kv_heads
        q, k, v = jnp.split(heads, (H, H + K), axis=2)
        return jnp.concatenate([_norm_heads(q, self.q_norm, live), _norm_heads(k, self.k_norm, live), v], axis=2)


def _norm_heads(heads: Array, norm: RMSNorm, live: Array | None) -> Array:
    """Normalize heads [R, T, h, E] one by one, or all heads of a token together: as many elements as `norm` has."""
    R, T, h, E = heads.shape
    rows = heads.reshape(-1, norm.weight.get_value().shape[0])
    return norm(rows, None if live is None else live * (rows.shape[0] // (R * T))).reshape(R, T, h, E)


class MLP(nnx.Module):
    """An MLP, usually gated (Shazeer 2020): gate and up are one product. Without a gate, `gate_up` is up."""

    def __init__(self, spec: ModelSpec, size: int) -> None:
        config, self.is_gated = spec.parallel.local, spec.parallel.local.traits.gated
        self.gate_up = Linear(size * (1 + self.is_gated), config.hidden_size, spec)
        self.activation = config.traits.activation
        self.coefficients = nnx.Param(jnp.zeros((4,), jnp.float32)) if self.activation == "xielu" else None
        self.dtype = spec.dtype
        self.kernels = spec.kernels
        self.down = Linear(config.hidden_size, size, spec, psum=True)

    def __call__(self, x: Array, live: Array | None = None) -> Array:
        """x [R, T, D] -> [R, T, D]; `live` as in Linear."""
        gate_up = self.gate_up(x, live)
        if not self.is_gated:
            coefficients = None if self.coefficients is None else self.coefficients.get_value()
            return self.down(UNGATED[self.activation](gate_up, coefficients), live)
        hidden = gated(gate_up.reshape(-1, gate_up.shape[-1]), live, self.activation, self.dtype, self.kernels)
        return self.down(hidden.reshape(*x.shape[:-1], -1), live)


class ExpertMLP(nnx.Module):
    """A mixture of experts: each token's gated MLPs are those that a router chooses for it (Shazeer et al. 2017).

    An MLP of all tokens is added, if there are shared experts (Dai et al. 2024, "DeepSeekMoE"). A token's result is the
    same to the last bit whatever other tokens are routed with it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        config = spec.parallel.local
        assert config.experts is not None
        self.experts = config.experts
        X, XF, D = self.experts.count, self.experts.size, config.hidden_size
        traits = config.traits.experts
        has_bias = traits is not None and traits.bias
        self.router = Linear(X, D, spec, bias=has_bias)
        has_choice_bias = traits is not None and traits.choice_bias
        self.choice_bias = nnx.Param(jnp.zeros((X,), jnp.float32)) if has_choice_bias else None
        self.gate, self.up = Linear(X * XF, D, spec, bias=has_bias), Linear(X * XF, D, spec, bias=has_bias)
        self.down = Linear(X * D, XF, spec, bias=has_bias)
        self.shared = MLP(spec, self.experts.shared_size) if self.experts.shared_size else None
        self.activation = config.traits.activation
        self.parallel, self.dtype, self.kernels = spec.parallel, spec.dtype, spec.kernels

    def __call__(self, x: Array, live: Array | None = None) -> tuple[Array, Array]:
        """x [R, T, D] -> [R, T, D], and the ids [R, T, k] int32 of each token's experts; `live` as in Linear."""
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        live = all_live(rows) if live is None else live
        logits = router_logits(rows, self.router.weight.get_value(), self.kernels, live)
        if (bias := _bias_of(self.router)) is not None:
            logits = logits + bias
        choice_bias = None if self.choice_bias is None else self.choice_bias.get_value()
        routes = route(logits, live, self.experts, self.kernels, choice_bias)
        tokens = rows[routes.order // self.experts.per_token]
        gate, up = (
            add_biases(expert_matmul(tokens, each.weight.get_value(), routes, self.kernels), _bias_of(each), routes)
            for each in (self.gate, self.up)
        )
        hidden = gated(jnp.concatenate([gate, up], axis=1), routes.live, self.activation, self.dtype, self.kernels)
        y = expert_matmul(hidden, self.down.weight.get_value(), routes, self.kernels)
        down_bias = _bias_of(self.down)  # of one shard only, since the shards' sums are added
        y = add_biases(y, None if down_bias is None else self.parallel.once(down_bias), routes)
        y = self.parallel.psum(combine(y, routes, live, self.kernels)).reshape(x.shape)
        y = y if self.shared is None else y + self.shared(x, live)
        return y, routes.ids.reshape(*x.shape[:-1], -1)


def _bias_of(linear: Linear) -> Array | None:
    bias: Array | None = None if linear.bias is None else linear.bias.get_value()
    return bias


class Layer(nnx.Module):
    """One decoder layer: x + attention(x), then x + mlp(x), each with a norm before it, after it, or both.

    In a parallel block the MLP reads the input of attention.
    """

    def __init__(self, spec: ModelSpec, kind: LayerKind) -> None:
        config = spec.parallel.config
        traits = config.traits

        def norm(exists: bool, dtype: jnp.dtype) -> RMSNorm | None:
            return norm_of(spec, dtype) if exists else None

        # The output of a post-norm is added to the residual stream, which is float32.
        self.attention_norm = norm(traits.pre_norm, spec.dtype)
        self.attention: Attention | LatentAttention = (LatentAttention if config.latent else Attention)(spec, kind)
        self.attention_post_norm = norm(traits.post_norm, _FLOAT32)
        self.mlp_norm = norm(traits.pre_norm and not traits.parallel_block, spec.dtype)
        dense_size = spec.parallel.local.intermediate_size
        self.mlp: MLP | ExpertMLP = ExpertMLP(spec) if kind.is_sparse else MLP(spec, dense_size)
        self.mlp_post_norm = norm(traits.post_norm, _FLOAT32)
        self.is_parallel = traits.parallel_block
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: Array, angles: tuple[Array, Array], pages: LayerPages, addresses: Addresses
    ) -> tuple[Array, LayerPages, Array | None]:
        """x [R, T, D] -> [R, T, D], this layer's pages with the new tokens, and the ids of experts as of ExpertMLP."""
        live = addresses.live
        with jax.named_scope("attention"):
            normed = _apply(self.attention_norm, x, live)
            y, pages = self.attention(normed, angles, pages, addresses)
            x = self._add(x, _apply(self.attention_post_norm, y, live))
        with jax.named_scope("mlp"):
            normed = normed if self.is_parallel else _apply(self.mlp_norm, x, live)
            y, experts = self.mlp(normed, live) if isinstance(self.mlp, ExpertMLP) else (self.mlp(normed, live), None)
            return self._add(x, _apply(self.mlp_post_norm, y, live)), pages, experts

    def _add(self, x: Array, y: Array) -> Array:
        if self.residual_scale == 1:
            return x + y
        # The barrier keeps XLA from rounding the product in some shapes only: in others it would be part of an FMA.
        scaled: Array = jax.lax.optimization_barrier(y * jnp.float32(self.residual_scale))
        return x + scaled


def _apply(norm: RMSNorm | None, x: Array, live: Array) -> Array:
    return x if norm is None else norm(x, live)
