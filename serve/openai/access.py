"""Pure ASGI middleware: API keys, request ids, double slashes, and an answer where nothing else has one."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai.errors import APIError, engine_error

logger = logging.getLogger(__name__)

# What says nothing of the model or of other requests.
_OPEN_PATHS = re.compile(r"/|/web/.*|/health|/ping|/openapi\.json|/docs(/.*)?")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")


type OnAnswer = Callable[[str, str, int, float], None]  # handler (a route), method, status, seconds

_NO_ROUTE = "none"


class Access:
    """Checks the key, names the request and tidies the path, then lets the request through."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], on_answer: OnAnswer) -> None:
        """`on_answer` is told of every answer when it has ended."""
        self._app = app
        self._on_answer = on_answer
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex

        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        path = re.sub("/{2,}", "/", scope["path"])  # clients with a base URL that ends in a slash
        scope = {**scope, "path": path, "headers": _with_request_id(scope["headers"], request_id)}
        if error := refusal(scope, self._keys):
            await error.response()(scope, receive, send_with_id)
            self._on_answer(_NO_ROUTE, scope["method"], status, time.monotonic() - began)
            return
        try:
            await self._answer(scope, receive, send_with_id)
        finally:
            handler = getattr(scope.get("route"), "path", _NO_ROUTE)
            self._on_answer(handler, scope["method"], status, time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Here and not in an exception handler of the app, whose answer would bear neither the id nor CORS headers."""
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except Exception:
            if started:
                raise
            logger.exception("a request failed")
            await engine_error("The server failed on this request.").response()(scope, receive, send)


def refusal(scope: Scope, keys: Sequence[bytes]) -> APIError | None:
    """The error for a request that bears none of the keys, where there are any and its path needs one."""
    if not keys or _OPEN_PATHS.fullmatch(route_path(scope)) or scope["method"] == "OPTIONS":
        return None
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(key.strip().encode(), known) for known in keys]
    if scheme.lower() == "bearer" and any(matches):
        return None
    return APIError(401, "The API key is missing or wrong.", None, "invalid_api_key")


def route_path(scope: Scope) -> str:
    """The path of a request, without the one under which a proxy serves this, and without double slashes."""
    return re.sub("/{2,}", "/", scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))


def _with_request_id(headers: list[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    rest = [(name, value) for name, value in headers if name != b"x-request-id"]
    return [*rest, (b"x-request-id", request_id.encode())]
