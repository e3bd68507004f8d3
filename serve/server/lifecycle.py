"""Lifecycle of the server process: serving, draining after a signal, and exiting if the engine is lost."""

import asyncio
import ctypes
import logging
import math
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from serve.api.keys import ApiKeys
from serve.api.metrics import Metrics
from serve.api.middleware import Readiness
from serve.config.config import ServeConfig
from serve.engine.engine import Engine
from serve.engine.watchdog import Watchdog
from serve.server.http_protocol import HttpConfig
from serve.server.signals import Reload
from serve.server.traces import OtlpTracer

logger = logging.getLogger(__name__)

NUM_WORKERS = min(32, (os.cpu_count() or 1) + 4)  # Python's default
_WORKER = "worker"  # prefix of the names of the pool's threads
QUIET_SECONDS = 2  # without a request, after which freed memory is returned to the system
_FLUSH_SECONDS = 5  # for the last bytes of responses at the end
_STEP_SECONDS = 20  # for a running step at the end
_LATE_SECONDS = 1.0  # a tick that is later was delayed by more than other work


@dataclass(frozen=True, slots=True)
class Served:
    names: tuple[str, ...]  # model ids in the API
    chats: bool  # True if the model has a chat template
    engine: Engine
    app: Starlette
    readiness: Readiness
    api_keys: ApiKeys
    metrics: Metrics
    tracer: OtlpTracer | None = None


class HttpServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, or until the engine fails.

    While draining, new requests and /health get 503, and running requests may finish within a time limit; the rest
    end with an error. A second signal ends the process at once.
    """

    def __init__(self, served: Served, config: ServeConfig, reload: Reload) -> None:
        on_refused, limit = served.metrics.on_refused_connection, _FLUSH_SECONDS
        super().__init__(HttpConfig(served.app, config, on_refused=on_refused, timeout_graceful_shutdown=limit))
        self.exit_code = 0
        self.engine = served.engine
        self._readiness = served.readiness
        self._api_keys = served.api_keys
        self._reload = reload
        self.workers = start_threads(NUM_WORKERS, _WORKER)
        self._stopper = start_threads(1, "stop")  # apart from the pool, which requests may occupy
        self._options = config
        self._drain_deadline: float | None = None
        self._idle_timer = _IdleTimer()
        self._watchdog = Watchdog(config.watchdog_timeout, interval=_LATE_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. uvicorn's own handler would raise it again at the end, and change the exit code."""
        del frame
        if self._drain_deadline is not None:
            logger.critical("second signal: exiting at once")
            logging.shutdown()
            os._exit(self.exit_code or 128 + sig)
        self._drain(self._options.shutdown_timeout)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times per second; returns True to end the server."""
        ends = await super().on_tick(counter)
        self._check_engine()
        self._reload.run_if_requested(self._api_keys, self.config.ssl)
        if self._idle_timer.expires(self._readiness.running or self.engine.num_requests, self._readiness.ended):
            asyncio.get_running_loop().run_in_executor(None, trim_heap)
        if self._drain_deadline is None or ends:
            return ends
        unfinished = self._unfinished()
        if unfinished and time.monotonic() < self._drain_deadline:
            return False
        if unfinished:
            logger.warning("%d requests did not finish in time and end with an error", unfinished)
        # Stopping the engine ends every stream.
        await asyncio.get_running_loop().run_in_executor(self._stopper, self.engine.stop, _STEP_SECONDS)
        self._stopper.shutdown()
        if self.engine.failed:
            self.exit_code = 1
        return True

    def _unfinished(self) -> int:
        """Number of responses that are being generated, or that clients have not read yet."""
        unread = sum(client.transport.get_write_buffer_size() > 0 for client in self.server_state.connections)
        return max(self._readiness.running, unread)

    def _check_engine(self) -> None:
        if self._watchdog.expires(self.engine.busy_since) and not self.engine.failed:
            self.engine.abandon()
        if not self.engine.ready and not self.exit_code:
            logger.critical("the engine is lost: exiting, so that the server can be restarted")
            self.exit_code = 1
            self._drain(_FLUSH_SECONDS)

    def _drain(self, seconds: float) -> None:
        self._readiness.draining = True
        self._drain_deadline = time.monotonic() + seconds
        if unfinished := self._unfinished():
            logger.warning(
                "draining: %d requests have up to %g s to finish; a second signal exits at once", unfinished, seconds
            )


class _IdleTimer:
    """Detects that there was no request for QUIET_SECONDS."""

    def __init__(self) -> None:
        self._ended, self._since = -1, 0.0

    def expires(self, running: int, ended: int) -> bool:
        """Returns True once per idle period, when it has lasted long enough; `ended`: requests since the start."""
        if running or ended != self._ended:
            self._ended, self._since = ended, time.monotonic()
        elif time.monotonic() - self._since >= QUIET_SECONDS:
            self._since = math.inf
            return True
        return False


def trim_heap() -> None:
    """Return freed heap memory to the system (glibc malloc_trim, about 5 ms); does nothing with another C library."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


def start_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are started now: later, the system may have none left."""
    pool, barrier = ThreadPoolExecutor(count, thread_name_prefix=name), threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(barrier.wait)
    barrier.wait()
    return pool


def run(server: HttpServer, listener: socket.socket) -> None:
    """Serve until the end. Exits without waiting if a thread hangs then, in the device or in work for a request."""
    pool = server.workers

    async def serve() -> None:
        asyncio.get_running_loop().set_default_executor(pool)
        await server.serve(sockets=[listener])
        pool.shutdown(wait=False, cancel_futures=True)
        if server.engine.is_hung or not _join_workers():
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(server.exit_code)

    asyncio.run(serve(), loop_factory=server.config.get_loop_factory())


def _join_workers() -> bool:
    """Wait for the pool's threads, with a time limit; returns False if one is still running."""
    deadline = time.monotonic() + _FLUSH_SECONDS
    workers = [thread for thread in threading.enumerate() if thread.name.startswith(_WORKER)]
    for thread in workers:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in workers)
