"""Whether memory grows: a line through what is resident when nothing runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAK_MB_PER_HOUR = 50.0  # the least growth that is a leak, unless the command line says another
# And the least that the line must rise in all: an allocator takes memory in steps, two of which can look like a slope.
LEAK_MB = 32.0
# Samples that are left out: the first share of the time, but at least so many seconds. Until then an allocator's arenas
# fill, names of tokens are kept when they are first needed, and every buffer meets its largest request: memory grows
# fast, and comes to an end by itself. So a soak of less than that says nothing of memory.
_WARM_UP, _WARM_UP_SECONDS = 0.2, 240.0

# Student's t for an interval of 95 %, by degrees of freedom; above the last, that of the normal distribution.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
_T_MANY = 2.0


@dataclass(frozen=True, slots=True)
class Resident:
    """One look at a server that has nothing to do."""

    seconds: float  # since the soak began
    bytes: float
    open_files: float


@dataclass(frozen=True, slots=True)
class Growth:
    """A least-squares line."""

    mb_per_hour: float
    error: float  # standard error of it
    hours: float  # from the first sample to the last
    samples: int

    @property
    def lowest(self) -> float:
        """The lower end of the interval that holds the true slope with 95 %."""
        freedom = self.samples - 2
        t = _T[freedom - 1] if 0 < freedom <= len(_T) else _T_MANY
        return self.mb_per_hour - t * self.error

    def leaks(self, most: float) -> bool:
        """Whether memory surely grows by more than `most` MB in an hour, and by more than what ends by itself."""
        return self.lowest > most and self.lowest * self.hours > LEAK_MB


def growth(samples: Sequence[Resident]) -> Growth | None:
    """The line through the samples after the warm-up; None for fewer than three."""
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
