"""Pure ASGI middleware around the app: request ids, API keys, allowed hosts, draining, and a record of each answer.

The Ray front uses parts of it, so it imports nothing heavy.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError, engine_error, shutting_down
from serve.api.keys import ApiKeys, Key, RateLimit
from serve.api.request_body import BODY_PATHS
from serve.api.trace_context import TraceContext, read_traceparent

logger = logging.getLogger(__name__)

# Polled by machines. Answered while the server drains, and not counted as running requests.
PROBES = ("/health", "/ready", "/live", "/ping", "/metrics", "/load")
NO_ROUTE = "none"

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
_PORT = re.compile(r":\d*$")
_RECORD = "logprobd.record"  # key in the ASGI scope


@dataclass(slots=True)
class Readiness:
    """Whether an app accepts requests. The process sets `draining` before it exits; the middleware counts."""

    draining: bool = False  # running requests finish, new ones are rejected
    running: int = 0  # accepted requests that have not ended
    ended: int = 0  # accepted requests that have ended


@dataclass(frozen=True, slots=True)
class Work:
    """The engine's work for one HTTP request. Times are the maximum over its choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float | None  # from arrival in the engine until the request ran; None if it never ran
    prefill_seconds: float | None  # from there to the first token, or to the last log-prob of the prompt
    decode_seconds: float | None  # from the first token to the last
    first_token_seconds: float | None  # from arrival to the first token of any choice

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens; 0 if it never ran."""
        return 0 if self.queue_seconds is None else self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class AnswerRecord:
    """Facts about one HTTP request for the access log and the metrics; complete when its answer has ended."""

    request_id: str
    method: str
    path: str
    client: str | None = None  # IP address
    api_key: Key | None = None
    trace: TraceContext | None = None  # of the server's span if there is a tracer, else of the client's
    span: Any = None  # of the tracer
    generation: dict[str, Any] = field(default_factory=dict)  # attributes of the span about the model and its answer
    charged: int = 0  # tokens, of `limit`
    limit: RateLimit | None = None  # the API key's when the request started; SIGHUP may have replaced it
    start_time: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # until the end of the answer
    handler: str = NO_ROUTE  # path of the route, such as "/v1/models/{id:path}"
    status: int = 0  # 0 if no answer was sent
    body_bytes: int = 0  # of the answer
    error: str | None = None  # code of the error in the answer or in the stream
    measure: Callable[[], Work] | None = None  # set by handlers that use the engine
    work: Work | None = None

    def end(self, handler: str) -> None:
        """Complete the record after the last byte."""
        self.handler = handler
        self.seconds = time.monotonic() - self.start_time
        if self.measure is not None:
            self.work, self.measure = self.measure(), None
        if self.limit is not None:
            self.limit.refund(self.charged - (self.work.num_tokens if self.work is not None else 0))

    @property
    def key(self) -> str | None:
        """Name of the API key, such as "key1"."""
        return None if self.api_key is None else self.api_key.name

    @property
    def owner(self) -> str:
        """Owner of the stored responses that the request may read; empty without an API key."""
        return "" if self.api_key is None else self.api_key.owner

    def priority(self, requested: int) -> int:
        """The request's priority in the engine."""
        return requested if self.api_key is None else self.api_key.priority(requested)

    def cache_salt(self, requested: str | None, *, per_key: bool) -> str:
        """The request's salt in the engine; `per_key`: requests with different keys share nothing."""
        salt = requested or ""
        return f"{self.key}/{salt}" if per_key and self.key else salt  # unambiguous: a name contains no slash

    def deadline(self, timeout: float | None, maximum: float) -> float:
        """time.monotonic() at which the request must have finished; `timeout` is the client's, in seconds."""
        return self.start_time + (maximum if timeout is None else min(timeout, maximum))

    def charge(self, tokens: int) -> None:
        """Count tokens towards the API key's limit; unused ones are returned at the end. Raises APIError."""
        if self.api_key is not None:
            self.limit, self.charged = self.api_key.charge(tokens), tokens


class Tracer(Protocol):
    def start(self, record: AnswerRecord) -> None:
        """Start the span of a request and set `span` and `trace` of its record."""

    def end(self, record: AnswerRecord) -> None:
        """End the span of a complete record."""


type OnAnswer = Callable[[AnswerRecord], None]


def record_of(connection: HTTPConnection) -> AnswerRecord:
    """The record that `Access` keeps for a request."""
    record = connection.scope[_RECORD]
    assert isinstance(record, AnswerRecord)
    return record


def route_path(scope: Scope) -> str:
    """The request's path without double slashes and without the prefix `root_path`; empty for the prefix alone.

    uvicorn puts the prefix before the path that it receives, from which a proxy may have stripped the prefix or not.
    """
    root = root_path(scope)
    path = _single_slashes(scope["path"]).removeprefix(root)
    repeated = "/v1/v1/" if root == "/v1" else f"{root}/"  # /v1/models is a route, /models is not
    while root and f"{path}/".startswith(repeated):  # all, so that a second call returns the same
        path = path.removeprefix(root)
    return path


def _sent_path(scope: Scope) -> str:
    """The request's path as it was sent, without the prefix that uvicorn puts before a path that has it already."""
    root, path = root_path(scope), str(scope["path"])
    sent = path.removeprefix(root)
    return sent if f"{_single_slashes(sent)}/".startswith(f"{root}/") else path


def root_path(scope: Scope) -> str:
    """The prefix with a slash before it and none after it; empty without one."""
    return f"/{scope.get('root_path', '').strip('/')}".rstrip("/")


class Access:
    """Assign a request id, normalize the path, check host and key, and record the answer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: ApiKeys,
        allowed_hosts: Sequence[str],  # names in the Host header, without port; empty accepts any
        readiness: Readiness,
        on_answer: OnAnswer,  # called with the record of every answer when it has ended
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._keys = api_keys
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._readiness = readiness
        self._on_answer = on_answer
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope)
        requested = sent.get("x-request-id", "")
        request_id = requested if _REQUEST_ID.fullmatch(requested) else uuid.uuid4().hex
        client = scope.get("client")
        record = AnswerRecord(request_id, scope["method"], _sent_path(scope), client[0] if client else None)
        if self._keys.required:
            record.api_key = self._keys.find(scope)
        if "traceparent" in sent:
            record.trace = read_traceparent(sent)
        if self._tracer is not None and route_path(scope) not in PROBES:
            _trace(self._tracer.start, record)
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        headers.append((b"x-request-id", request_id.encode()))
        root = root_path(scope)
        path = root + route_path(scope)
        scope = {**scope, "root_path": root, "path": path, "headers": headers, _RECORD: record}
        try:
            await self._answer(scope, receive, _recorder(send, record), record)
        finally:
            record.end(getattr(scope.get("route"), "path", NO_ROUTE))
            if self._tracer is not None:
                _trace(self._tracer.end, record)
            self._on_answer(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: AnswerRecord) -> None:
        """Answer, with a 500 for unexpected exceptions: Starlette's own would lack the request id and CORS headers."""
        path, key, error = route_path(scope), record.api_key, None
        counted = path not in PROBES
        limited = scope["method"] == "POST" and path in BODY_PATHS
        try:
            self._check_host(scope)
            if not path.isprintable():  # a route's regular expression matches its path with a line break, too
                raise APIError(404, "The path contains control characters.", None, "not_found")
            if self._keys.required:
                self._keys.check(scope["method"], path, key)
            if scope["path"] == scope["root_path"] != "":
                await RedirectResponse(f"{scope['root_path']}/")(scope, receive, send)  # the page's links are relative
                return
            if self._readiness.draining and counted:
                raise shutting_down()
            with key.request() if limited and key is not None else nullcontext():
                error = await self._run(scope, receive, send, record, counted=counted)
        except APIError as refused:
            error = refused
        if error is not None:
            record.error = error.code
            await error.response(path)(scope, receive, send)

    async def _run(
        self, scope: Scope, receive: Receive, send: Send, record: AnswerRecord, *, counted: bool
    ) -> APIError | None:
        """Run the app; returns the error to answer with if it raises before it answers."""
        self._readiness.running += counted
        try:
            await self._app(scope, receive, send)
        except Exception:
            if record.status:
                raise
            logger.exception("request %s failed", record.request_id)
            return engine_error("The server failed on this request.")
        finally:
            self._readiness.running -= counted
            self._readiness.ended += counted
        return None

    def _check_host(self, scope: Scope) -> None:
        """Raise APIError 403 for a host name that is not ours (DNS rebinding)."""
        host = _PORT.sub("", Headers(scope=scope).get("host", "")).lower()
        if self._hosts and host and host not in self._hosts:
            raise APIError(403, f"Host {host[:100]!r} is not in --allowed-hosts.", None, "host_not_allowed")


def _trace(step: Callable[[AnswerRecord], None], record: AnswerRecord) -> None:
    """Start or end a span. A tracer that fails must not affect the request."""
    try:
        step(record)
    except Exception:
        logger.exception("the tracer failed on request %s", record.request_id)


def _recorder(send: Send, record: AnswerRecord) -> Send:
    """`send` that adds the common headers and records status and size."""

    async def record_and_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = record.request_id
            if record.path.endswith("/v1/systemone"):
                headers["x-typesafe-request-id"] = record.request_id
            if record.path.endswith(("/v1/messages", "/v1/messages/count_tokens")):
                headers["request-id"] = record.request_id
            headers.setdefault("x-content-type-options", "nosniff")
            if record.span is not None and record.trace is not None:
                headers["traceresponse"] = record.trace.header
            for name, value in (record.api_key.headers if record.api_key else {}).items():
                headers[name] = value
        elif message["type"] == "http.response.body":
            record.body_bytes += len(message.get("body", b""))
        await send(message)

    return record_and_send


def _single_slashes(path: str) -> str:
    """Collapse double slashes, which clients send whose base URL ends in a slash."""
    return re.sub("/{2,}", "/", path)
