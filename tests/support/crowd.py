"""Rows of different lengths in shuffled pages, for tests of all attention implementations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from model.kv_cache import PAGE_SIZE

type Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Crowd:
    """Rows of different lengths in shuffled pages; slots past the end of a row are NaN."""

    queries: Floats  # [R, T, H, E]
    keys: jax.Array  # [N, K, S, E]
    values: jax.Array
    tables: NDArray[np.int32]
    lengths: tuple[int, ...]

    def positions(self, row: int, start: int, end: int) -> NDArray[np.int32]:
        positions = np.arange(start, end, dtype=np.int32)
        return np.where(positions < self.lengths[row], positions, -1)[None]

    def in_float64(
        self, row: int, *, window: int = 0, cap: float = 0.0, sinks: Floats | None = None
    ) -> NDArray[np.float64]:
        """Return the reference output [T, H * E], computed in float64."""
        T = self.lengths[row]
        _, _, H, E = self.queries.shape
        group = H // self.keys.shape[1]

        def heads_of(pages: jax.Array) -> NDArray[np.float64]:
            row_pages = np.asarray(pages, np.float64)[self.tables[row]]  # [P, K, S, E]
            heads = row_pages.transpose(1, 0, 2, 3).reshape(row_pages.shape[1], -1, E)
            shared: NDArray[np.float64] = heads[:, :T].repeat(group, axis=0)
            return shared

        scores = np.einsum("the,hse->hts", self.queries[row, :T].astype(np.float64), heads_of(self.keys)) / np.sqrt(E)
        scores = cap * np.tanh(scores / cap) if cap else scores
        positions = np.arange(T)
        visible = positions <= positions[:, None]
        if window:
            visible &= positions > positions[:, None] - window
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        sink = 0.0 if sinks is None else np.exp(sinks[:, None, None] - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True) + sink
        out: NDArray[np.float64] = np.einsum("hts,hse->the", weights, heads_of(self.values))
        return out.reshape(T, H * E)


# For kernels that are interpreted, whose speed and code on this CPU mean nothing: a quarter less time to compile.
_UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@cache
def compiled(form: Callable[..., jax.Array], *, optimized: bool = True, **options: Any) -> Callable[..., jax.Array]:
    """Return a jitted attention function, shared by all tests."""
    made: Callable[..., jax.Array] = jax.jit(
        partial(form, **options), compiler_options=None if optimized else _UNOPTIMIZED
    )
    return made


def crowd(heads: tuple[int, int, int], lengths: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0) -> Crowd:
    H, K, E = heads
    random = np.random.default_rng(seed)
    width = -(-max(lengths) // PAGE_SIZE)
    tables = 1 + random.permutation(len(lengths) * width).reshape(len(lengths), width).astype(np.int32)
    keys, values = (random.normal(size=(tables.size + 1, K, PAGE_SIZE, E)).astype(np.float32) for _ in range(2))
    for row, length in enumerate(lengths):
        for i, page in enumerate(tables[row]):
            end = max(0, length - i * PAGE_SIZE)
            keys[page, :, end:] = values[page, :, end:] = np.nan
    queries = random.normal(size=(len(lengths), max(lengths), H, E)).astype(np.float32)
    return Crowd(queries, jnp.asarray(keys, dtype), jnp.asarray(values, dtype), tables, lengths)
