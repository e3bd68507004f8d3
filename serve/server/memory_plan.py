"""MemoryPlan: what a server will need, worked out from a model's configuration before anything is loaded."""

from dataclasses import dataclass

import jax.numpy as jnp

from compiled.shapes import Buckets
from model.config import ModelConfig
from model.kv_cache import CacheLayout
from model.sharding import Cut
from model.weights.loader import weight_bytes
from serve.config.sizes import MemoryAmount
from serve.server.memory import pages_in

_CACHE_BYTES = 1 << 30  # of pages, unless one request of full length needs more
# Float32 arrays of the largest decode step's logits, and of the largest chunk's activations, that XLA holds at once
# (from the scratch memory of compiled programs; docs/design.md), and bytes of a slot for each token of the vocabulary.
_LOGITS, _ACTIVATIONS, _SLOT_BYTES = 8, 3, 9


class PlanError(ValueError):
    """A model and its cache do not fit into the memory that is free; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of a server's parts."""

    weights: int
    pages: int  # of the cache, the null page included
    page_bytes: int
    workspace: int  # an estimate of what the largest step holds beside them
    free: int | None  # None: the device does not tell

    @property
    def cache(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_bytes

    def __str__(self) -> str:
        parts = f"weights {_mb(self.weights)}, cache {_mb(self.cache)}, workspace about {_mb(self.workspace)}"
        whole = _mb(self.weights + self.cache + self.workspace)
        return f"{parts}: {whole}" + ("" if self.free is None else f" of {_mb(self.free)} that are free")


def plan_memory(
    config: ModelConfig,
    buckets: Buckets,
    *,
    dtype: str,
    int8: bool,
    asked: MemoryAmount | None,
    free: int | None,
    shards: int = 1,
    platform: str = "cpu",
) -> MemoryPlan:
    """Plans weights, cache and workspace of each device.

    Args:
        asked: of the cache: bytes, or a share of what weights and workspace leave free. None: 1 GiB, or what one
            request of full length needs, or what there is room for.
        free: bytes of a device, None if nobody knows.
        shards: devices over which the model is cut.
        platform: of the devices, as JAX names it.

    Raises:
        PlanError: it does not fit, or the cache holds no page.
    """
    weights = weight_bytes(config, dtype, int8=int8, shards=shards)
    workspace = _workspace(Cut(config, shards).local, buckets)
    page_bytes = CacheLayout(Cut(config, shards), jnp.dtype(dtype), platform).bytes_per_page
    left = None if free is None else free - weights - workspace
    if asked is not None:
        try:
            pages = pages_in(asked, free=None if left is None else max(0, left), page_bytes=page_bytes)
        except ValueError as error:
            raise PlanError(f"--kv-cache-memory: {error}") from None
    else:
        all_rows = buckets.decode_rows[-1] * buckets.pages_per_row
        pages = min(all_rows, max(buckets.pages_per_row, _CACHE_BYTES // page_bytes)) + 1
        if left is not None:
            pages = max(2, min(pages, left // page_bytes))
    plan = MemoryPlan(weights, pages, page_bytes, workspace, free)
    if left is not None and plan.cache > left:
        raise PlanError(f"it does not fit: {plan}. Less needs {_advice(int8=int8, asked=asked)}")
    return plan


def _workspace(config: ModelConfig, buckets: Buckets) -> int:
    logits = _LOGITS * buckets.decode_rows[-1] * config.vocab_size
    activations = _ACTIVATIONS * buckets.prefill_chunks[-1] * (2 * config.intermediate_size + config.hidden_size)
    return 4 * max(logits, activations) + _SLOT_BYTES * buckets.slots * config.vocab_size


def _advice(*, int8: bool, asked: MemoryAmount | None) -> str:
    ways = [] if int8 else ["--quantization int8"]
    ways += ["--max-num-seqs"] if asked is None else ["a smaller --kv-cache-memory"]
    return ", ".join(ways)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
