"""Watchdog: detects a step that does not end."""

import time


class Watchdog:
    """Detects a step that runs longer than a limit.

    Only the time between regular checks counts: while the process is stopped, or its machine paused, no step advances.
    """

    def __init__(self, limit: float, *, interval: float) -> None:
        """Limit a step to `limit` seconds; 0: no limit. A check counts for at most `interval` seconds."""
        self._limit = limit
        self._interval = min(interval, limit / 2)
        self._since: float | None = None
        self._seconds = 0.0  # counted for the step that began at `_since`
        self._last_check = time.monotonic()

    def expires(self, since: float | None) -> bool:
        """Check; `since` identifies the running step by its start, None: the engine is idle."""
        now = time.monotonic()
        counted = min(now - self._last_check, self._interval)
        self._seconds = self._seconds + counted if since == self._since else 0.0
        self._since, self._last_check = since, now
        return since is not None and 0 < self._limit < self._seconds
