"""Replica: one engine and its HTTP app in an actor of Ray Serve."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message

from serve.config.config import ServeConfig
from serve.server.assembly import assemble
from serve.server.console import start_reporting


class Replica:
    """Answers requests with the very app that `python -m serve` runs."""

    def __init__(self, config: ServeConfig) -> None:
        """Loads and compiles; Ray sends requests when this has returned.

        Raises:
            serve.server.model_files.STARTUP_ERRORS: what is wrong, in words for the user.
        """
        self._watchdog_timeout = config.watchdog_timeout
        self._served = assemble(config, start_reporting(config))
        self._id = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises."""
        engine = self._served.engine
        if not engine.ready:
            raise RuntimeError("the engine has stopped")
        if self._watchdog_timeout and engine.silent_for > self._watchdog_timeout:
            raise RuntimeError("a step of the engine does not end")

    def __del__(self) -> None:
        """Called by Ray when the replica has nothing left to do."""
        if hasattr(self, "_served"):
            self._served.engine.stop()

    async def answer(
        self, blocks: tuple[bytes, ...], scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[list[Message]]:
        """The ASGI messages of an answer, as many at a time as there are; first none, which says that it is begun.

        A caller that goes away cancels this, and this the app, which frees what the request has in the engine.

        Args:
            blocks: of the prompt; they were for the router.
            scope: ASGI's, as far as it is plain data.
            body: the request's, whole.
        """
        del blocks
        yield []
        messages: asyncio.Queue[Message] = asyncio.Queue()
        app = asyncio.create_task(_run(self._served.app, scope, body, messages))
        try:
            async for some in _batches(messages, app):
                yield some
        finally:
            app.cancel()
            with suppress(asyncio.CancelledError):
                await app

    async def whole(self, blocks: tuple[bytes, ...], scope: dict[str, Any], body: bytes) -> tuple[str, list[Message]]:
        """This replica's id, and its whole answer: for what is asked of all replicas."""
        return self._id, [message async for some in self.answer(blocks, scope, body) for message in some]


async def _run(app: ASGIApp, scope: dict[str, Any], body: bytes, messages: asyncio.Queue[Message]) -> None:
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # who goes away cancels
        raise AssertionError

    await app(scope, receive, messages.put)


async def _batches(messages: asyncio.Queue[Message], app: asyncio.Task[None]) -> AsyncGenerator[list[Message]]:
    """What comes into the queue until the app has ended and all is out.

    Raises:
        Exception: what the app raised, after all it had sent.
    """
    while True:
        some = [messages.get_nowait() for _ in range(messages.qsize())]
        if not some:
            if app.done():
                break
            next_one = asyncio.create_task(messages.get())
            await asyncio.wait((next_one, app), return_when=asyncio.FIRST_COMPLETED)
            if next_one.done():
                some.append(next_one.result())
            next_one.cancel()
        if some:
            yield some
    app.result()
