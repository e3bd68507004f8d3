"""HttpServer: uvicorn's server, which drains at a signal and ends when the engine is lost."""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from serve.api.middleware import Readiness
from serve.engine.engine import Engine
from serve.server.heap import trim
from serve.server.http_protocol import HttpConfig

logger = logging.getLogger(__name__)

_WORKER = "worker"  # begins the names of the pool's threads
QUIET_SECONDS = 2  # without a request, after which memory is given back
_FLUSH_SECONDS = 5  # for the last bytes of answers, once all is said
_STEP_SECONDS = 20  # that a step may still take when all else has ended


class HttpServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, or until the engine fails.

    Draining: new requests get 503, /health too, and running ones may end; what is not done in time is told so. A
    second signal ends the process at once.
    """

    def __init__(
        self, config: HttpConfig, engine: Engine, readiness: Readiness, *, drain_seconds: float, watchdog_seconds: float
    ) -> None:
        """Prepares a server.

        Args:
            readiness: the app's, which is told of draining.
            watchdog_seconds: after which a step that does not end counts as a failure; 0: never.
        """
        config.timeout_graceful_shutdown = _FLUSH_SECONDS
        super().__init__(config)
        self.exit_code = 0
        self.engine = engine
        self._readiness = readiness
        self._drain_seconds = drain_seconds
        self._watchdog_seconds = watchdog_seconds
        self._drains_until: float | None = None
        self._quiet = _Quiet()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called at a signal; uvicorn would raise it again in the end, and so end with another code than 0."""
        del frame
        if self._drains_until is not None:
            os.write(2, b"draining already: ending at once\n")
            os._exit(self.exit_code or 128 + sig)
        self._drain(self._drain_seconds)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        ends = await super().on_tick(counter)
        self._look_at_engine()
        if self._quiet.begins(self._readiness.running or self.engine.load, self._readiness.ended):
            asyncio.get_running_loop().run_in_executor(None, trim)
        if self._drains_until is None or ends:
            return ends
        running = self._unfinished()
        if running and time.monotonic() < self._drains_until:
            return False
        if running:
            logger.warning("%d requests have not ended in time: they are told so", running)
        # Ends every stream. On a thread of its own: the pool may be busy with what somebody has asked.
        with ThreadPoolExecutor(1) as alone:
            await asyncio.get_running_loop().run_in_executor(alone, self.engine.stop, _STEP_SECONDS)
        if self.engine.failed:
            self.exit_code = 1
        return True

    def _unfinished(self) -> int:
        """Answers in the making, or that clients have not read: the app is done with one long before its reader is."""
        unread = sum(each.transport.get_write_buffer_size() > 0 for each in self.server_state.connections)
        return max(self._readiness.running, unread)

    def _look_at_engine(self) -> None:
        if self._watchdog_seconds and self.engine.silent_for > self._watchdog_seconds and not self.engine.failed:
            self.engine.give_up()
        if not self.engine.ready and not self.exit_code:
            logger.critical("the engine is lost: the server ends, so that another can be started")
            self.exit_code = 1
            self._drain(_FLUSH_SECONDS)

    def _drain(self, seconds: float) -> None:
        self._readiness.draining = True
        self._drains_until = time.monotonic() + seconds
        if running := self._unfinished():
            logger.warning(
                "draining: %d requests have up to %g s to end; a second signal ends at once", running, seconds
            )


class _Quiet:
    """Finds out when nobody has asked for a while."""

    def __init__(self) -> None:
        self._ended, self._since = -1, 0.0

    def begins(self, running: int, ended: int) -> bool:
        """True once in each quiet time, when it has lasted long enough. To be called often.

        Args:
            running: requests that have not ended.
            ended: those that have, since the start.
        """
        if running or ended != self._ended:
            self._ended, self._since = ended, time.monotonic()
        elif time.monotonic() - self._since >= QUIET_SECONDS:
            self._since = math.inf
            return True
        return False


def run(server: HttpServer, listener: socket.socket) -> None:
    """Serves to the end. If a thread hangs then, in the device or with what a client asked, the process ends here."""
    pool = ThreadPoolExecutor(thread_name_prefix=_WORKER)

    async def serve() -> None:
        asyncio.get_running_loop().set_default_executor(pool)
        await server.serve(sockets=[listener])
        pool.shutdown(wait=False, cancel_futures=True)
        if server.engine.hangs or not _workers_end():
            end_hard(server.exit_code)

    asyncio.run(serve(), loop_factory=server.config.get_loop_factory())


def _workers_end() -> bool:
    """Waits for the threads of the pool, which a usual end would do without any limit."""
    until = time.monotonic() + _FLUSH_SECONDS
    workers = [thread for thread in threading.enumerate() if thread.name.startswith(_WORKER)]
    for thread in workers:
        thread.join(max(0.0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in workers)


def end_early(server: HttpServer) -> None:
    """Takes SIGTERM and SIGINT now, before uvicorn does, and after it has given them back."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)


def end_hard(code: int) -> None:
    """Ends the process though a thread hangs in the device, which a usual end would wait for."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
