"""Front: takes HTTP requests from Ray Serve's proxy and relays the answers of replicas. Knows nothing of the model."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError, engine_error
from serve.api.json_stream import dump
from serve.api.middleware import ApiKeys, route_path
from serve.ray.metrics import merged
from serve.ray.prefix_index import prompt_blocks

logger = logging.getLogger(__name__)

_TRIES = 3  # replicas that a request is sent to, one after the other has died of it or beside it
_WAIT = 5.0  # seconds for a replica to take a request, and then for a client to come again
_PLAIN = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")


class Front:
    """An ASGI app in front of the replicas of a model."""

    def __init__(self, replicas: DeploymentHandle[Any], api_keys: Sequence[str], max_body_bytes: int) -> None:
        """`replicas` are those of a `serve.ray.replica.Replica`. Where there are keys, no body is read without one."""
        self._max_body_bytes = max_body_bytes
        self._keys = ApiKeys(api_keys)
        self._one = replicas.options(method_name="answer", stream=True)
        self._all = replicas
        self._errors: Counter[str] = Counter()  # by code: those of which no replica knows

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray."""
        return Starlette(routes=[Mount("/", self._serve)])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relays one request; a client that goes away cancels it."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        try:
            if error := self._keys.refusal(scope, self._keys.name_of(scope)):
                raise error
            body = await _read(scope, receive, self._max_body_bytes)
            answer = asyncio.create_task(self._answer(_plain(scope), body, _Relay(send)))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    answer.result()
            finally:
                for each in (answer, gone):
                    each.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)
        except APIError as error:
            self._errors[error.code or ""] += 1
            await error.response()(scope, receive, send)

    async def _answer(self, scope: dict[str, Any], body: bytes, relay: "_Relay") -> None:
        if scope["method"] == "GET" and route_path(scope) in ("/metrics", "/load"):
            await relay.send_all(await self._sums(scope))
            return
        blocks = await asyncio.to_thread(prompt_blocks, body)
        for _ in range(_TRIES):
            try:
                async with aclosing(self._messages(blocks, scope, body)) as batches:
                    async for batch in batches:
                        await relay.send_all(batch)
            except RayTaskError:
                logger.exception("a request failed")
                if not relay.started:
                    raise engine_error("The server failed on this request.") from None
                await self._break_off(relay, "The server failed on this request.")
                return
            except RayError as error:  # its process, its machine, or Ray ended it for want of memory
                logger.warning("a replica died on a request: %s", type(error).__name__)
                if relay.started:
                    await self._break_off(relay, "The replica that answered has died.")
                    return
            else:
                return
        raise _unavailable()

    async def _break_off(self, relay: "_Relay", why: str) -> None:
        error = engine_error(why)
        self._errors[error.code or ""] += 1
        await relay.break_off(error)

    async def _messages(
        self, blocks: Sequence[bytes], scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[list[Message]]:
        """What one replica answers.

        Raises:
            APIError: 503, no replica takes the request.
            RayTaskError: it failed.
            RayError: the replica has died.
        """
        call = self._one.remote(blocks, scope, body)
        try:
            await _taken(call)
            async for batch in call:
                yield batch
        finally:
            call.cancel()  # harmless where it has ended

    async def _sums(self, scope: dict[str, Any]) -> list[Message]:
        """The answer for all replicas together; where one refuses, its refusal."""
        asked = self._all.broadcast("whole", (), scope, b"")
        try:
            answers = await asked.results_async(timeout_s=_WAIT, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            raise _unavailable() from None
        told: dict[str, list[Message]] = dict(each for each in answers if not isinstance(each, BaseException))
        if not told:
            raise _unavailable()
        for messages in told.values():
            if messages[0]["status"] != 200:
                return messages
        bodies = {replica: _body(messages) for replica, messages in told.items()}
        start = next(iter(told.values()))[0]
        if route_path(scope) == "/metrics":
            whole = await asyncio.to_thread(merged, bodies, self._errors.copy())
        else:
            whole = _total(bodies)
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        return [
            {**start, "headers": [*headers, (b"content-length", b"%d" % len(whole))]},
            {"type": "http.response.body", "body": whole},
        ]


class _Relay:
    """Sends a replica's messages, and knows how an answer is ended that has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self._is_events = False
        self._whole = True  # no event is torn

    async def send_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                # The proxy writes the request's id itself, the same one.
                headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
                self._is_events = any(
                    name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
                )
                self.started, message = True, {**message, "headers": headers}
            elif body := message.get("body", b""):
                self._whole = body.endswith(b"\n\n")
            await self._send(message)

    async def break_off(self, error: APIError) -> None:
        """Ends a stream with an error event; anything else in a way that nobody takes for whole.

        Raises:
            ConnectionError: to have the connection closed.
        """
        if not self._is_events:
            raise ConnectionError("an answer broke off")
        event = (b"" if self._whole else b"\n\n") + b"data: " + dump(error.body) + b"\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


async def _taken(call: AsyncIterator[Any]) -> None:
    """Waits until a replica takes a request, which it says with a first item that is empty.

    Raises:
        APIError: 503, none does.
    """
    try:
        async with asyncio.timeout(_WAIT):
            await anext(call)
    except (TimeoutError, DeploymentUnavailableError):
        raise _unavailable() from None


def _unavailable() -> APIError:
    message = "No replica of the model can take this request now."
    return APIError(503, message, None, "no_replica", {"retry-after": str(int(_WAIT))})


def _plain(scope: Scope) -> dict[str, Any]:
    """What a replica is told of a request."""
    plain = {name: scope[name] for name in _PLAIN if name in scope}
    addresses = {name: tuple(scope[name]) if scope.get(name) else None for name in ("client", "server")}
    return plain | addresses | {"headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]]}


async def _read(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        APIError: 413 for more than the server takes; 400 where the client went away before its end.
    """
    too_large = APIError(413, f"The body is larger than {max_bytes} bytes.", None, "request_too_large")
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise too_large
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise APIError(400, "The body is incomplete.", None, "invalid_json")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > max_bytes:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(messages: Sequence[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


def _total(bodies: Mapping[str, bytes]) -> bytes:
    return dump({"server_load": sum(orjson.loads(body)["server_load"] for body in bodies.values())})
