"""Memory of a server, planned from the model's configuration before anything is loaded."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from compiled.shapes import Buckets
from model.config import ModelConfig
from model.kv_cache import PAGE_SIZE, CacheLayout
from model.sharding import TensorParallel
from serve.config.engine_config import EngineConfig
from serve.config.values import MemoryAmount, mb

_CACHE_BYTES = 1 << 30  # default size of the cache, unless one request of maximum length needs more
# Number of float32 arrays that XLA keeps at once: of the largest decode step's logits, and of the largest chunk's
# activations. Measured from the scratch memory of compiled programs (docs/design.md).
_LOGITS, _ACTIVATIONS = 8, 3
_SLOT_BYTES = 9  # bytes per slot and vocabulary token
_CGROUP_LIST, _CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class PlanError(ValueError):
    """The model and its cache do not fit into the free memory; the message has the sizes."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on each device."""

    weights: int
    pages: int  # cache pages, including the null page
    page_bytes: int
    workspace: int  # estimate of the largest step's scratch memory
    free: int | None  # None: the device does not report it

    @property
    def cache(self) -> int:
        return self.pages * self.page_bytes

    @property
    def cache_tokens(self) -> int:
        return (self.pages - 1) * PAGE_SIZE

    @property
    def needed(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = f"weights {mb(self.weights)}, cache {mb(self.cache)}, workspace about {mb(self.workspace)}"
        return f"{parts}: {mb(self.needed)}" + ("" if self.free is None else f" of {mb(self.free)} free memory")


def plan_memory(
    model: ModelConfig,
    buckets: Buckets,
    config: EngineConfig,
    *,
    weights: int,
    free: int | None,
    platform: str = "cpu",
) -> MemoryPlan:
    """Plan weights, cache and workspace of each device.

    Args:
        config: its dtype is resolved. Without a size of the cache, it gets 1 GiB, or what one request of maximum length
            needs, if there is room.
        weights: bytes of the weights on each device.
        free: free bytes on a device; None if unknown.
        platform: of the devices, as JAX names it.

    Raises:
        PlanError: the model does not fit, or the cache is smaller than one page.
    """
    cache, parallel = config.kv_cache_memory, TensorParallel(model, config.tensor_parallel_size)
    workspace = _workspace(parallel.local, buckets)
    kv_dtype, hidden_dtype = jnp.dtype(config.kv_dtype), jnp.dtype(config.dtype)
    page_bytes = CacheLayout(parallel, kv_dtype, hidden_dtype, platform).bytes_per_page
    available = None if free is None else free - weights - workspace
    if cache is not None:
        pages = count_pages(cache, free=None if available is None else max(0, available), page_bytes=page_bytes)
    else:
        all_rows = buckets.decode_rows[-1] * buckets.pages_per_row
        pages = min(all_rows, max(buckets.pages_per_row, _CACHE_BYTES // page_bytes)) + 1
        if available is not None:
            pages = max(2, min(pages, available // page_bytes))
    plan = MemoryPlan(weights, pages, page_bytes, workspace, free)
    if available is not None and plan.cache > available:
        options = ["--quantization q4_k"] if config.quantization in ("auto", "none") else []
        options.append("a smaller --max-num-seqs" if cache is None else "a smaller --kv-cache-memory")
        raise PlanError(f"out of memory: {plan}. To reduce it, use {' or '.join(options)}")
    return plan


def count_pages(amount: MemoryAmount, *, free: int | None, page_bytes: int) -> int:
    """Number of pages that fit into an amount of memory, including the null page.

    Raises:
        PlanError: fewer than two pages fit, or the amount is a fraction and `free` is unknown.
    """
    if isinstance(amount, float):
        if free is None:
            raise PlanError("--kv-cache-memory: this device does not report its free memory; give the size in bytes")
        amount = int(amount * free)
    if amount < 2 * page_bytes:
        message = f"{amount:,} bytes are too few: a page takes {page_bytes:,} bytes, and two are needed"
        raise PlanError(f"--kv-cache-memory: {message}")
    return amount // page_bytes


def free_memory(devices: int = 1) -> int | None:
    """Free bytes on each of the first `devices` devices, on CPU an equal share of the host's; None if unknown."""
    first = jax.local_devices()[:devices]
    if first[0].platform == "cpu":
        known = [free for free in (_available_memory(), *map(_cgroup_free, _cgroups())) if free is not None]
        return min(known) // devices if known else None
    stats = [device.memory_stats() or {} for device in first]
    if not all("bytes_limit" in device for device in stats):
        return None
    return min(int(device["bytes_limit"] - device.get("bytes_in_use", 0)) for device in stats)


def _available_memory() -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _cgroups() -> Iterator[tuple[Path, Path]]:
    """Files with the memory limit and usage of the process's cgroup and of those around it, versions 2 and 1."""
    try:
        lines = _CGROUP_LIST.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        root, limit, usage = _CGROUP_ROOT, "memory.max", "memory.current"
        if controllers:
            root, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        if not controllers or "memory" in controllers.split(","):
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):  # in a container, only the root may exist
                if folder.is_relative_to(root):
                    yield folder / limit, folder / usage


def _cgroup_free(files: tuple[Path, Path]) -> int | None:
    try:
        limit, usage = (int(file.read_text(encoding="ascii")) for file in files)
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
    return max(0, limit - usage)


def _workspace(config: ModelConfig, buckets: Buckets) -> int:
    logits = _LOGITS * buckets.decode_rows[-1] * config.vocab_size
    features = 2 * config.intermediate_size + config.hidden_size
    if experts := config.experts:  # a token's rows for each of its experts
        features = max(features, experts.per_token * (2 * experts.size + config.hidden_size))
    activations = _ACTIVATIONS * buckets.prefill_chunks[-1] * features
    return 4 * max(logits, activations) + _SLOT_BYTES * buckets.slots * config.vocab_size
