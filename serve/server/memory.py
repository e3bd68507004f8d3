"""Free memory of the devices, and how many cache pages an amount of it holds."""

import re
from pathlib import Path

import jax

from serve.config.sizes import MemoryAmount

# What the cgroup of a process says: limit and use, version 2 and version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def pages_in(amount: MemoryAmount, *, free: int | None, page_bytes: int) -> int:
    """Pages of `page_bytes` that the amount holds, the null page included, where `free` bytes are free.

    Raises:
        ValueError: it holds none beside the null page, or it is a share of an unknown amount.
    """
    size = amount.bytes_of(free)
    if size is None:
        raise ValueError("this device does not tell how much memory is free; give bytes")
    if size < 2 * page_bytes:
        raise ValueError(f"{size:,} bytes hold no page: one takes {page_bytes:,} bytes, and padding needs another")
    return size // page_bytes


def free_memory(devices: int = 1) -> int | None:
    """Bytes that each of the first so many devices has left; of a CPU its share of what machine and cgroup leave.

    None where a device does not tell.
    """
    used = jax.local_devices()[:devices]
    if used[0].platform == "cpu":
        whole = _free_host_memory()
        return whole and whole // devices
    left = [_left(device) for device in used]
    known = [each for each in left if each is not None]
    return min(known) if len(known) == len(left) else None


def _left(device: jax.Device) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def _free_host_memory() -> int | None:
    known = [_meminfo(), *(_cgroup_rest(limit, used) for limit, used in _CGROUPS)]
    return min((each for each in known if each is not None), default=None)


def _meminfo() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cgroup_rest(limit: Path, used: Path) -> int | None:
    try:
        return max(0, int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
