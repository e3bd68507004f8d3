"""Checks of an idle server: gauges at zero, files closed, no new failures."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from serve.server.lifecycle import QUIET_SECONDS
from tools.soak.memory import MemorySample

_SECONDS = 5.0  # within which a server without requests must become idle
_SETTLE_SECONDS = QUIET_SECONDS + 1  # until it has returned freed memory
_FILES = 8  # additional open files allowed, for pools that fill once

_IDLE_GAUGES = (
    "logprobd:num_requests_running",
    "logprobd:num_requests_waiting",
    "logprobd:num_requests_held",
    "logprobd:kv_cache_usage_perc",
)
_LOAD = "/load"
_ENGINE_FAILURES = "logprobd:engine_failures_total"
_SERVER_ERRORS, _ENGINE_ERRORS = "responses with status 5xx", "engine errors sent to clients"
_RESIDENT, _FILES_OPEN, _STARTED = "process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"


class IdleChecks:
    """Repeated checks of one server."""

    def __init__(self) -> None:
        self.samples: list[MemorySample] = []
        self.first: Mapping[str, float] = {}  # all metrics at the first and the last check
        self.last: Mapping[str, float] = {}
        self._failures: Mapping[str, float] | None = None

    async def check(self, http: httpx2.AsyncClient, seconds: float) -> tuple[list[str], list[str]]:
        """Wait for the server to become idle; return violations, and failures counted since the last check.

        Args:
            seconds: since the start of the soak.
        """
        until = time.monotonic() + _SECONDS
        while (wrong := list(self._not_idle(now := await _scrape(http)))) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        await asyncio.sleep(_SETTLE_SECONDS)
        now = await _scrape(http)
        self.first, self.last = self.first or now, now
        self.samples.append(MemorySample(seconds, now.get(_RESIDENT, 0.0), now.get(_FILES_OPEN, 0.0)))
        if now.get(_STARTED) != self.first.get(_STARTED):
            wrong.append("the server's process has been restarted")
        return wrong, list(self._new_failures(now))

    def _not_idle(self, now: Mapping[str, float]) -> Iterator[str]:
        for name in (*_IDLE_GAUGES, _LOAD):
            if name not in now:
                yield f"{name} is missing"
            elif now[name] != 0:
                yield f"{name} is {now[name]:g} after {_SECONDS:g} s"
        files = now.get(_FILES_OPEN, 0)
        before = (self.first or now).get(_FILES_OPEN, 0)
        if files > before + _FILES:
            yield f"{files:.0f} files are open, {before:.0f} before the traffic"

    def _new_failures(self, now: Mapping[str, float]) -> Iterator[str]:
        """Yield failures counted by the server since the last check, whether a client saw them or not."""
        failures = {name: now.get(name, 0) for name in (_ENGINE_FAILURES, _SERVER_ERRORS, _ENGINE_ERRORS)}
        for name, count in failures.items():
            if self._failures is not None and count > self._failures[name]:
                yield f"the server counted {count - self._failures[name]:.0f} more {name}"
        self._failures = failures


async def _scrape(http: httpx2.AsyncClient) -> Mapping[str, float]:
    """Return every metric, summed over its labels, and the value of /load."""
    values: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families((await http.get("/metrics", timeout=60)).raise_for_status().text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                values[sample.name] += sample.value
            if sample.name == "http_requests_total" and sample.labels["status"].startswith("5"):
                values[_SERVER_ERRORS] += sample.value
            if sample.name == "logprobd:request_errors_total" and sample.labels["code"] == "engine_error":
                values[_ENGINE_ERRORS] += sample.value
    values[_LOAD] = (await http.get(_LOAD, timeout=60)).raise_for_status().json()["server_load"]
    return values
