"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2") over a cache of latents.

Keys and values of a head are linear maps of a token's latent. Here the map of keys is applied to the query, and that of
values to the weighted sum of latents, in prefill as in decoding: attention is multi-query attention with one key/value
head, the same token has the same bits in both, and nothing but latents is stored.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.attention import attend, rotate
from model.config import LayerKind
from model.experts import grouped_matmul
from model.kernels import ScoreOptions
from model.kernels.dispatch import Kernels
from model.kv_cache import Addresses, LayerPages
from model.latent import EPSILON
from model.linear import Linear, ModelSpec, Weight
from model.norms import RMSNorm

_FLOAT32 = jnp.dtype(jnp.float32)


class LatentAttention(nnx.Module):
    """Attention whose cached keys are [rotated part, latent], and whose values are the latents."""

    def __init__(self, spec: ModelSpec, kind: LayerKind) -> None:
        self.config = config = spec.parallel.local
        self.kind = kind
        assert config.latent is not None
        self.latent = latent = config.latent
        self.kernels, self.dtype = spec.kernels, spec.dtype
        H, D = config.num_heads, config.hidden_size
        has_rank = latent.query_rank > 0
        self.q_a = Linear(latent.query_rank, D, spec) if has_rank else None
        self.q_a_norm = RMSNorm(latent.query_rank, spec, spec.dtype, epsilon=EPSILON) if has_rank else None
        self.q = Linear(H * latent.query, latent.query_rank or D, spec)
        self.kv_a = Linear(latent.cached, D, spec)
        self.kv_a_norm = RMSNorm(latent.rank, spec, _FLOAT32, epsilon=EPSILON)
        self.k_b = Linear(H * latent.rank, latent.nope, spec)
        self.v_b = Linear(H * latent.value, latent.rank, spec)
        self.out = Linear(D, H * latent.value, spec)

    def __call__(
        self, x: Array, angles: tuple[Array, Array], pages: LayerPages, addresses: Addresses
    ) -> tuple[Array, LayerPages]:
        """x [R, T, D] -> [R, T, D] and this layer's pages with the new tokens stored."""
        heads, pages = self.heads(x, angles, pages, addresses)
        return self.out(heads, addresses.live), pages

    def heads(
        self, x: Array, angles: tuple[Array, Array], pages: LayerPages, addresses: Addresses
    ) -> tuple[Array, LayerPages]:
        """The weighted sums of values [R, T, H V] of x [R, T, D], and the pages as in `__call__`."""
        R, T, _ = x.shape
        H, latent, live = self.config.num_heads, self.latent, addresses.live
        keys = self.keys(x, angles, live)
        pages = pages.store(keys, keys, addresses)
        options = ScoreOptions(self.config.attention_scale, self.kind.window, self.config.attention_cap)
        context = attend(self.queries(x, angles, live), pages, addresses, self.kernels, options)
        latents = context.reshape(R * T, H, latent.cached)[:, :, latent.rope :].astype(self.dtype)
        values = matmul_by_head(latents, self.v_b.weight.get_value(), live, self.kernels)
        return values.reshape(R, T, H * latent.value), pages

    def queries(self, x: Array, angles: tuple[Array, Array], live: Array) -> Array:
        """Queries [R, T, H, E] float32 of x [R, T, D] for the cached keys, rotated; `live` as in Linear."""
        R, T, _ = x.shape
        H, latent = self.config.num_heads, self.latent
        if self.q_a is not None and self.q_a_norm is not None:
            x = self.q_a_norm(self.q_a(x, live), live)
        heads = self.q(x, live).reshape(R, T, H, latent.query)
        nope, rotary = heads[..., : latent.nope], heads[..., latent.nope :]
        rows = nope.reshape(R * T, H, latent.nope).astype(self.dtype)
        absorbed = matmul_by_head(rows, self.k_b.weight.get_value(), live, self.kernels)
        return jnp.concatenate([rotate(rotary, *angles), absorbed.reshape(R, T, H, latent.rank)], axis=-1)

    def keys(self, x: Array, angles: tuple[Array, Array], live: Array) -> Array:
        """What the cache holds of x [R, T, D]: [R, T, 1, E] float32; `live` as in Linear."""
        joined = self.kv_a(x, live)[:, :, None]
        latents, rotary = joined[..., : self.latent.rank], joined[..., self.latent.rank :]
        return jnp.concatenate([rotate(rotary, *angles), self.kv_a_norm(latents, live)], axis=-1)


def matmul_by_head(x: Array, weight: Weight, live: Array, kernels: Kernels) -> Array:
    """x [M, H, K] times each head's matrix of a weight [H N, K]: [M, H, N] float32; `live` as in Linear.

    Heads are treated as experts, each of which has the rows of all live tokens.
    """
    M, H, _ = x.shape
    place = jnp.arange(M * H, dtype=jnp.int32)
    count = jnp.maximum(live, 1)
    rows = x[place % count, jnp.minimum(place // count, H - 1)]
    y = grouped_matmul(rows, weight, jnp.arange(H + 1, dtype=jnp.int32) * live, kernels)
    places = jnp.arange(H, dtype=jnp.int32) * live + jnp.arange(M, dtype=jnp.int32)[:, None]
    by_head: Array = y[jnp.minimum(places, M * H - 1)]
    return by_head
