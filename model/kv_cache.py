"""The paged cache: keys, values and final hidden states of every cached token.

A page holds S tokens. Page 0 is nobody's: padding writes there. A row's block table lists its pages in order, so
token t of a row lies in page `table[t // S]` at offset `t % S`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.sharding import TENSOR, Cut

PAGE_SIZE = 64  # S, tokens
NULL_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PagedCache:
    """Pages of all layers. One array pair per layer: slicing a stacked cache would copy it."""

    keys: tuple[Any, ...]  # L x [N, K, S, E]
    values: tuple[Any, ...]  # L x [N, K, S, E]
    hidden: Any  # [N, S, D] after the final norm: the head alone can score them


def cache_shape(config: ModelConfig, pages: int, dtype: jnp.dtype, shards: int = 1) -> PagedCache:
    """The cache's shapes over all shards, as `jax.ShapeDtypeStruct` leaves."""
    cut = Cut(config, shards)
    K, D = shards * cut.local.num_kv_heads, shards * cut.hidden_size

    def zeros() -> PagedCache:
        kv = (jnp.zeros((pages, K, PAGE_SIZE, config.head_dim), dtype),) * config.num_layers
        return PagedCache(kv, kv, jnp.zeros((pages, PAGE_SIZE, D), dtype))

    shape: PagedCache = jax.eval_shape(zeros)
    return shape


def cache_specs(config: ModelConfig) -> PagedCache:
    """How the cache lies in a mesh: heads and the features of hidden states are cut."""
    kv = (PartitionSpec(None, TENSOR),) * config.num_layers
    return PagedCache(kv, kv, PartitionSpec(None, None, TENSOR))


def bytes_per_page(config: ModelConfig, dtype: jnp.dtype, shards: int = 1) -> int:
    """Bytes that one page takes on each device over all layers, hidden states included."""
    cut = Cut(config, shards)
    per_token = 2 * config.num_layers * cut.local.num_kv_heads * config.head_dim + cut.hidden_size
    return PAGE_SIZE * per_token * jnp.dtype(dtype).itemsize


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the tokens of a step live in the cache."""

    pages: Array  # [R, T] int32 page of each token; NULL_PAGE for padding
    offsets: Array  # [R, T] int32 offset in that page
    live: Array  # [] int32 tokens up to the last that is not padding, of all R * T in order


def addresses(tables: Array, positions: Array) -> Addresses:
    """tables [R, P] and positions [R, T] (-1 = padding) to pages and offsets [R, T]."""
    valid = positions >= 0
    at = jnp.where(valid, positions, 0)
    pages = jnp.take_along_axis(tables, at // PAGE_SIZE, axis=1)
    return Addresses(jnp.where(valid, pages, NULL_PAGE), at % PAGE_SIZE, live_rows(valid.reshape(-1)))


def live_rows(valid: Array) -> Array:
    """How many of the rows valid [M] bool lead up to the last valid one: [] int32."""
    return jnp.max(jnp.where(valid, jnp.arange(1, valid.shape[0] + 1, dtype=jnp.int32), 0))


def write_heads(pages: Array, heads: Array, at: Addresses) -> Array:
    """pages [N, K, S, E] with heads [R, T, K, E] stored at their tokens' places."""
    return pages.at[at.pages, :, at.offsets].set(heads.astype(pages.dtype), mode="drop")


def write_hidden(pages: Array, hidden: Array, at: Addresses) -> Array:
    """pages [N, S, D] with hidden [R, T, D] stored at their tokens' places."""
    return pages.at[at.pages, at.offsets].set(hidden.astype(pages.dtype), mode="drop")
