"""Memory growth: a least-squares line through resident memory of the idle server."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAK_MB_PER_HOUR = 50.0  # default of --max-growth
# Minimum total growth of a leak: an allocator takes memory in steps, two of which look like a slope.
LEAK_MB = 32.0
# Warm-up that is left out: this fraction of the time, but at least this many seconds. Until then, allocator arenas
# and caches of token texts fill, and buffers reach their largest size. A shorter soak does not judge memory.
_WARM_UP, _WARM_UP_SECONDS = 0.2, 240.0

# Student's t for a 95 % interval, by degrees of freedom; _T_MANY above the last.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
_T_MANY = 2.0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory and files of the idle server at one time."""

    seconds: float  # since the start of the soak
    bytes: float
    open_files: float


@dataclass(frozen=True, slots=True)
class Growth:
    """A least-squares line."""

    mb_per_hour: float
    error: float  # standard error, MB/h
    hours: float  # between the first and the last sample
    samples: int

    @property
    def lowest(self) -> float:
        """Lower end of the 95 % confidence interval of the slope."""
        freedom = self.samples - 2
        t = _T[freedom - 1] if 0 < freedom <= len(_T) else _T_MANY
        return self.mb_per_hour - t * self.error

    def leaks(self, limit: float) -> bool:
        """True if memory grows significantly by more than `limit` MB/h, and by more than LEAK_MB in total."""
        return self.lowest > limit and self.lowest * self.hours > LEAK_MB


def growth(samples: Sequence[MemorySample]) -> Growth | None:
    """Fit a line to the samples after the warm-up; None for fewer than three."""
    begin = max(_WARM_UP_SECONDS, _WARM_UP * samples[-1].seconds) if samples else 0.0
    kept = [each for each in samples if each.seconds >= begin]
    if len(kept) < 3:
        return None
    hours, megabytes = [each.seconds / 3600 for each in kept], [each.bytes / 1e6 for each in kept]
    n, mean_hours, mean_megabytes = len(kept), sum(hours) / len(kept), sum(megabytes) / len(kept)
    spread = sum((x - mean_hours) ** 2 for x in hours)
    slope = sum((x - mean_hours) * (y - mean_megabytes) for x, y in zip(hours, megabytes, strict=True)) / spread
    rest = sum((y - mean_megabytes - slope * (x - mean_hours)) ** 2 for x, y in zip(hours, megabytes, strict=True))
    return Growth(slope, math.sqrt(rest / (n - 2) / spread), hours[-1] - hours[0], n)
