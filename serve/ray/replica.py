"""Replica: one engine and its HTTP app in an actor of Ray Serve."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray import serve
from starlette.types import Message

from serve.config.config import ServeConfig
from serve.engine.watchdog import Watchdog
from serve.ray.flow_control import Batches
from serve.server.console import start_reporting
from serve.server.server import assemble

_LATE_SECONDS = 10.0  # Ray checks more often


class Replica:
    """Answers requests with the app of `logprobd serve`."""

    def __init__(self, config: ServeConfig) -> None:
        """Load and compile; raises STARTUP_ERRORS. Ray sends requests after this returns."""
        self._watchdog = Watchdog(config.watchdog_timeout, interval=_LATE_SECONDS)
        self._served = assemble(config, start_reporting(config))
        self._id = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises."""
        engine = self._served.engine
        if not engine.ready:
            raise RuntimeError("the engine has stopped")
        if self._watchdog.expires(engine.busy_since):
            raise RuntimeError("a step of the engine hangs")

    def __del__(self) -> None:
        """Called by Ray when the replica is idle and to be stopped."""
        if hasattr(self, "_served"):
            self._served.engine.stop()
            if self._served.tracer is not None:
                self._served.tracer.close()

    async def answer(
        self, blocks: tuple[bytes, ...], scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[list[Message]]:
        """Yield the ASGI messages of a response in batches. The first batch is empty and acknowledges the request.

        If the caller disconnects, this is cancelled, and the app with it, which frees the request in the engine.
        """
        del blocks  # for the router
        yield []
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not unread:
                await asyncio.Event().wait()  # a disconnect cancels
            return unread.pop()

        batches = Batches()
        app = asyncio.ensure_future(self._served.app(scope, receive, batches.send))
        try:
            async for batch in batches.until_done(app):
                yield batch
        finally:
            app.cancel()
            with suppress(asyncio.CancelledError):
                await app

    async def answer_all(
        self, blocks: tuple[bytes, ...], scope: dict[str, Any], body: bytes
    ) -> tuple[str, list[Message]]:
        """Return this replica's id and all messages of its response, for requests that go to every replica."""
        return self._id, [message async for batch in self.answer(blocks, scope, body) for message in batch]
