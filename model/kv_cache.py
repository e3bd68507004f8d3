"""The paged cache: keys, values, chosen experts and final hidden states of every cached token.

A page holds S tokens. Page 0 belongs to no row: padding writes there. A row's block table lists its pages in order, so
token t of a row is in page `table[t // S]` at offset `t % S`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from model.kernels import tpu
from model.layout import PAGE_SIZE as PAGE_SIZE
from model.sharding import TENSOR, TensorParallel

NULL_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SplitPages:
    """A layer's keys and values in separate arrays, head by head, as XLA and the CPU and GPU kernels read them.

    E' is E, on a TPU padded with zeros to full lanes.
    """

    keys: Any  # [N, K, S, E']
    values: Any  # [N, K, S, E']

    @property
    def kv_heads(self) -> int:
        return int(self.keys.shape[1])

    @property
    def lanes(self) -> int:
        return int(self.keys.shape[3])

    def store(self, keys: Array, values: Array, addresses: "Addresses") -> "SplitPages":
        """The pages with keys and values [R, T, K, E] of new tokens stored."""
        fill = ((0, 0),) * 3 + ((0, self.lanes - keys.shape[3]),)

        def store(pages: Array, heads: Array) -> Array:
            heads = jnp.pad(heads, fill).astype(pages.dtype)
            return pages.at[addresses.pages, :, addresses.offsets].set(heads, mode="drop")

        return SplitPages(store(self.keys, keys), store(self.values, values))

    def take(self, ids: Array) -> tuple[Array, Array]:
        """Keys and values [R, K, S, E'] float32 of pages ids [R]."""
        return self.keys[ids].astype(jnp.float32), self.values[ids].astype(jnp.float32)


@partial(jax.tree_util.register_dataclass, data_fields=("heads",), meta_fields=("kv_heads",))
@dataclass(frozen=True, slots=True)
class JoinedPages:
    """A layer's keys and values token by token, padded to full TPU tiles, as its ragged paged attention reads them."""

    heads: Any  # [N, S, 2 K', E'], each head's keys before its values, padded with zeros
    kv_heads: int  # K

    @property
    def lanes(self) -> int:
        return int(self.heads.shape[3])

    def store(self, keys: Array, values: Array, addresses: "Addresses") -> "JoinedPages":
        """The pages with keys and values [R, T, K, E] of new tokens stored."""
        R, T, K, E = keys.shape
        joined = jnp.stack([keys, values], axis=3).reshape(R, T, 2 * K, E)
        joined = jnp.pad(joined, ((0, 0), (0, 0), (0, self.heads.shape[2] - 2 * K), (0, self.lanes - E))).astype(
            self.heads.dtype
        )
        return replace(self, heads=self.heads.at[addresses.pages, addresses.offsets].set(joined, mode="drop"))

    def take(self, ids: Array) -> tuple[Array, Array]:
        """Keys and values [R, K, S, E'] float32 of pages ids [R]."""
        heads = self.heads[ids][:, :, : 2 * self.kv_heads].astype(jnp.float32).transpose(0, 2, 1, 3)
        return heads[:, 0::2], heads[:, 1::2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LatentPages:
    """A layer's cache of latent attention: one array, whose rows are keys and contain the values."""

    latent: Any  # [N, 1, S, E'], rotated keys before latents, on a TPU padded with zeros to full lanes

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def lanes(self) -> int:
        return int(self.latent.shape[3])

    @property
    def keys(self) -> Any:
        return self.latent

    @property
    def values(self) -> Any:
        return self.latent

    def store(self, keys: Array, _values: Array, addresses: "Addresses") -> "LatentPages":
        """The pages with keys [R, T, 1, E] of new tokens stored, which contain the values."""
        keys = jnp.pad(keys, ((0, 0),) * 3 + ((0, self.lanes - keys.shape[3]),)).astype(self.latent.dtype)
        return LatentPages(self.latent.at[addresses.pages, :, addresses.offsets].set(keys, mode="drop"))

    def take(self, ids: Array) -> tuple[Array, Array]:
        """Keys and values [R, 1, S, E'] float32 of pages ids [R]."""
        rows = self.latent[ids].astype(jnp.float32)
        return rows, rows


type LayerPages = SplitPages | JoinedPages | LatentPages


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PagedCache:
    """Pages of all layers, in separate arrays per layer: slicing a stacked cache would copy it."""

    layers: tuple[Any, ...]  # L LayerPages
    hidden: Any  # [N, S, D'] after the final norm, for the head to score them later; D' is at least D
    # [N, S, L, k] ids of each token's experts in each layer, the best first, 0 in layers without experts; None if no
    # layer has any.
    experts: Any = None


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shapes and sharding of a model's cache on one platform."""

    parallel: TensorParallel
    kv_dtype: jnp.dtype  # of keys and values
    hidden_dtype: jnp.dtype  # of final hidden states: the model's, since log-probs are computed from them
    platform: str = "cpu"  # as JAX names it: "cpu", "gpu" or "tpu"

    @property
    def is_joined(self) -> bool:
        config = self.parallel.local
        return self.platform == "tpu" and not config.latent and tpu.supports_pages(config.head_dim, self.kv_dtype)

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state as one shard stores it."""
        return self._lanes(self.parallel.hidden_size)

    def shape(self, pages: int) -> PagedCache:
        """The shapes of N pages over all shards, as `jax.ShapeDtypeStruct` leaves."""
        shards, (heads, lanes) = self.parallel.shards, self._stored_heads()
        split = jax.ShapeDtypeStruct((pages, shards * heads, PAGE_SIZE, lanes), self.kv_dtype)
        joined = jax.ShapeDtypeStruct((pages, PAGE_SIZE, shards * 2 * heads, lanes), self.kv_dtype)
        hidden = jax.ShapeDtypeStruct((pages, PAGE_SIZE, shards * self.hidden_size), self.hidden_dtype)
        return self._cache(split, joined, hidden, self._experts(pages))

    def specs(self) -> PagedCache:
        """Its sharding: key/value heads and the features of hidden states are sharded."""
        split, joined = PartitionSpec(None, TENSOR), PartitionSpec(None, None, TENSOR)
        experts = None if self.parallel.config.experts is None else PartitionSpec()
        return self._cache(split, joined, joined, experts)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page on each device: all layers, the ids of experts and the hidden states."""
        heads, lanes = self._stored_heads()
        arrays = self.parallel.local.num_layers * (1 if self.parallel.local.latent else 2)
        layers = arrays * heads * lanes * jnp.dtype(self.kv_dtype).itemsize
        hidden = self.hidden_size * jnp.dtype(self.hidden_dtype).itemsize
        experts = self._experts(1)
        return PAGE_SIZE * (layers + hidden) + (0 if experts is None else experts.size * experts.dtype.itemsize)

    def _experts(self, pages: int) -> jax.ShapeDtypeStruct | None:
        config = self.parallel.config
        if config.experts is None:
            return None
        dtype = jnp.uint8 if config.experts.count <= 1 << 8 else jnp.int16
        return jax.ShapeDtypeStruct((pages, PAGE_SIZE, config.num_layers, config.experts.per_token), dtype)

    def _cache(self, split: Any, joined: Any, hidden: Any, experts: Any) -> PagedCache:
        config = self.parallel.local
        layer: LayerPages = SplitPages(split, split)
        if config.latent:
            layer = LatentPages(split)
        elif self.is_joined:
            layer = JoinedPages(joined, config.num_kv_heads)
        return PagedCache((layer,) * config.num_layers, hidden, experts)

    def _stored_heads(self) -> tuple[int, int]:
        """Number of key/value heads that one shard stores, and elements of each."""
        K = self.parallel.local.num_kv_heads
        return tpu.padded_kv_heads(K) if self.is_joined else K, self._lanes(self.parallel.local.head_dim)

    def _lanes(self, size: int) -> int:
        """Round up to full lanes on a TPU: it stores other sizes transposed and would transpose all pages per step."""
        return tpu.padded_head_dim(size) if self.platform == "tpu" else size


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Addresses:
    """Cache addresses of a step's tokens."""

    tables: Array  # [R, P] int32 pages of each row in order
    positions: Array  # [R, T] int32 of each token in its row, -1 for padding
    pages: Array  # [R, T] int32 page of each token; NULL_PAGE for padding
    offsets: Array  # [R, T] int32 offset in that page
    live: Array  # [] int32, of all R * T tokens in order: number up to the last that is not padding


def addresses_of(tables: Array, positions: Array) -> Addresses:
    valid = positions >= 0
    index = jnp.where(valid, positions, 0)
    pages = jnp.take_along_axis(tables, index // PAGE_SIZE, axis=1)
    pages = jnp.where(valid, pages, NULL_PAGE)
    return Addresses(tables, positions, pages, index % PAGE_SIZE, live_rows(valid.reshape(-1)))


def live_rows(valid: Array) -> Array:
    """Number of rows of valid [M] bool up to the last valid one: [] int32."""
    return jnp.max(jnp.where(valid, jnp.arange(1, valid.shape[0] + 1, dtype=jnp.int32), 0))


def write_hidden(pages: Array, hidden: Array, addresses: Addresses) -> Array:
    """pages [N, S, D'] with hidden [R, T, D] stored at their tokens' addresses, padded with zeros."""
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, pages.shape[2] - hidden.shape[2])))
    return pages.at[addresses.pages, addresses.offsets].set(hidden.astype(pages.dtype), mode="drop")


def write_experts(pages: Array | None, experts: Sequence[Array | None], addresses: Addresses) -> Array | None:
    """pages [N, S, L, k] with the experts [R, T, k] of each layer, None without any, at their tokens' addresses."""
    if pages is None:
        return None
    none = jnp.zeros((*addresses.positions.shape, pages.shape[3]), pages.dtype)
    layers = jnp.stack([none if ids is None else ids.astype(pages.dtype) for ids in experts], axis=2)
    return pages.at[addresses.pages, addresses.offsets].set(layers, mode="drop")
