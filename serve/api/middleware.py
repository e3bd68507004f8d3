"""Pure ASGI middleware: API keys, hosts, request ids, double slashes, and an answer where nothing else has one."""

import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.auth import ApiKeys, route_path
from serve.api.errors import APIError, engine_error
from serve.api.readiness import PROBES, Readiness
from serve.api.record import NO_ROUTE, AnswerRecord, OnAnswer, recorded

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
_PORT = re.compile(r":\d*$")

# Whatever a browser is sent, it takes it for what it is said to be.
_ALWAYS = {"x-content-type-options": "nosniff"}


class Access:
    """Names the request, tidies its path and lets it through, or says why not."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        allowed_hosts: Sequence[str],
        readiness: Readiness,
        on_answer: OnAnswer,
    ) -> None:
        """Wraps an app.

        Args:
            allowed_hosts: that the Host header may name, whatever the port; none: any.
            on_answer: is told of every answer when it has ended.
        """
        self._app = app
        self._keys = ApiKeys(api_keys)
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._readiness = readiness
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        client = scope.get("client")
        record = AnswerRecord(request_id, scope["method"], scope["path"], client[0] if client else None)
        record.key = self._keys.name_of(scope)
        path = re.sub("/{2,}", "/", scope["path"])  # clients with a base URL that ends in a slash
        scope = {**scope, "path": path, "headers": _with_request_id(scope["headers"], request_id), **recorded(record)}
        try:
            await self._answer(scope, receive, _noted(send, record), record)
        finally:
            record.end(getattr(scope.get("route"), "path", NO_ROUTE))
            self._on_answer(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: AnswerRecord) -> None:
        """Here and not in an exception handler of the app, whose answer would bear neither the id nor CORS headers."""
        error = self._refusal(scope, record.key)
        if error is None:
            counted = route_path(scope) not in PROBES
            self._readiness.running += counted
            try:
                await self._app(scope, receive, send)
            except Exception:
                if record.status:
                    raise
                logger.exception("request %s failed", record.request_id)
                error = engine_error("The server failed on this request.")
            finally:
                self._readiness.running -= counted
                self._readiness.ended += counted
        if error is not None:
            record.error = error.code
            await error.response()(scope, receive, send)

    def _refusal(self, scope: Scope, key: str | None) -> APIError | None:
        if error := self._wrong_host(scope) or self._keys.refusal(scope, key):
            return error
        return None if route_path(scope) in PROBES else self._readiness.refusal()

    def _wrong_host(self, scope: Scope) -> APIError | None:
        """The error for a name that is none of ours: a page of that name would take our answers for its own."""
        host = _PORT.sub("", Headers(scope=scope).get("host", "")).lower()
        if not self._hosts or not host or host in self._hosts:
            return None
        message = f"The host {host[:100]!r} is none of --allowed-hosts."
        return APIError(403, message, None, "host_not_allowed")


def _noted(send: Send, record: AnswerRecord) -> Send:
    """Sends, and writes into the record what is sent; every answer bears the request's id."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = record.request_id
            for name, value in _ALWAYS.items():
                headers.setdefault(name, value)
        elif message["type"] == "http.response.body":
            record.sent += len(message.get("body", b""))
        await send(message)

    return noted


def _with_request_id(headers: list[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    rest = [(name, value) for name, value in headers if name != b"x-request-id"]
    return [*rest, (b"x-request-id", request_id.encode())]
