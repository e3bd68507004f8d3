"""Front: relays HTTP requests from Ray Serve's proxy to the replicas that PrefixRouter chooses. Loads no model."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.common import RunningReplicaInfo
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError, engine_error
from serve.api.json_stream import dump
from serve.api.keys import ApiKeys
from serve.api.metrics import ERRORS_TEXT, OWN_PREFIX
from serve.api.middleware import Access, AnswerRecord, Readiness, record_of, route_path
from serve.api.request_body import BODY_PATHS, Bodies
from serve.api.sse import unless_disconnected
from serve.config.config import ServeConfig
from serve.ray.flow_control import MAX_BATCHES, UNLIMITED, Window
from serve.ray.prefix_index import PrefixIndex, prompt_blocks

logger = logging.getLogger(__name__)

_WAIT = 5.0  # seconds for a replica to accept a request, and after which a client may retry
_PLAIN = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")


class Front:
    """An ASGI app in front of the replicas of a model."""

    def __init__(self, replicas: DeploymentHandle[Any], config: ServeConfig) -> None:
        self._bodies = Bodies(max_bytes=config.max_body_bytes, seconds=config.client_timeout)
        self._access = Access(
            self._respond,
            api_keys=ApiKeys(config.api_key),
            allowed_hosts=config.accepted_hosts,
            readiness=Readiness(),
            on_answer=self._count,
        )
        self._client_timeout = config.client_timeout
        self._has_warned = False
        self._any_replica = replicas.options(method_name="answer", stream=True)
        self._replicas = replicas
        self._errors: Counter[str] = Counter()  # code -> errors that no replica has counted

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray."""
        return Starlette(routes=[Mount("/", self._serve)])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":  # the proxy adds the request id itself
                headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self._access(scope, receive, send_without_id)

    def _count(self, record: AnswerRecord) -> None:
        if record.error is not None:
            self._errors[record.error] += 1

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay one request; a disconnect cancels it."""
        window = Window(scope, receive, seconds=self._client_timeout)
        if not window.is_limited and not self._has_warned:
            self._has_warned = True
            logger.warning(UNLIMITED)
        request = Request(scope, window.receive)
        relay = _Relay(send, record_of(request), window, route_path(scope))
        try:
            if scope["method"] == "GET" and route_path(scope) in ("/metrics", "/load"):
                messages = await unless_disconnected(request, self._aggregate(_plain(scope)))
                await relay.send_all(messages)
                return
            async with self._body(request) as body:
                blocks = await asyncio.to_thread(prompt_blocks, body) if body else ()
                call = self._any_replica.remote(blocks, _plain(scope), body)
                try:
                    await _accepted(call)
                except BaseException:
                    call.cancel()
                    raise
            del body
            await unless_disconnected(request, relay.send_response(call))
        except APIError as error:
            if error.status == 499:  # the client has disconnected
                return
            record_of(request).error = error.code
            await error.response(route_path(scope))(scope, receive, send)

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, whose memory counts until the block ends. Empty without reading if no endpoint would read it."""
        if request.method == "POST" and route_path(request.scope) in BODY_PATHS:
            async with self._bodies.read(request) as body:
                yield body
        else:
            yield b""

    async def _aggregate(self, scope: dict[str, Any]) -> list[Message]:
        """The response for all replicas together: their metrics, or their load. An error of one is the response."""
        call = self._replicas.broadcast("answer_all", (), scope, b"")
        try:
            results = await call.results_async(timeout_s=_WAIT, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            raise _unavailable() from None
        responses: dict[str, list[Message]] = dict(item for item in results if not isinstance(item, BaseException))
        if not responses:
            raise _unavailable()
        for messages in responses.values():
            if messages[0]["status"] != 200:
                return messages
        start = messages[0]
        bodies = {name: b"".join(part.get("body", b"") for part in parts) for name, parts in responses.items()}
        if route_path(scope) == "/metrics":
            body = await asyncio.to_thread(merge_metrics, bodies, self._errors.copy())
        else:
            body = dump({"server_load": sum(orjson.loads(load)["server_load"] for load in bodies.values())})
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        return [
            {**start, "headers": [*headers, (b"content-length", b"%d" % len(body))]},
            {"type": "http.response.body", "body": body},
        ]


async def _accepted(call: DeploymentResponseGenerator[list[Message]]) -> None:
    """Wait until a replica has accepted a request, which it does with an empty first batch.

    Ray tries replicas until one accepts. No other gets the request afterwards: it may be what kills them.

    Raises:
        APIError: 503, no replica accepts the request; 500, the replica died.
    """
    try:
        async with asyncio.timeout(_WAIT):
            await anext(call)
    except (TimeoutError, DeploymentUnavailableError):
        raise _unavailable() from None
    except RayError as cause:
        raise _failure(cause) from None


def _failure(cause: RayError) -> APIError:
    if isinstance(cause, RayTaskError):
        logger.error("a request failed", exc_info=cause)
        return engine_error("The server failed on this request.")
    # Its process or machine has died, or Ray has killed it for lack of memory.
    logger.warning("a replica died during a request: %s", type(cause).__name__)
    return engine_error("The replica that answered has died.")


class _Relay:
    def __init__(self, send: Send, record: AnswerRecord, window: Window, path: str) -> None:
        self._send, self._record, self._window, self._path = send, record, window, path
        self._started = self._is_events = False
        self._event_complete = True  # the last body ended an event
        self._num_events = 0  # ended events

    async def send_response(self, call: DeploymentResponseGenerator[list[Message]]) -> None:
        """Relay the response of the replica that has accepted a request.

        Raises:
            APIError: 500, the replica failed or died before its response started.
            ConnectionError: as `_abort`, or the client has stopped reading.
        """
        try:
            async for batch in call:
                await self.send_all(batch)
        except RayError as cause:
            error = _failure(cause)
            if not self._started:
                raise error from None
            self._record.error = error.code
            await self._abort(error)
        finally:
            call.cancel()  # no effect after the end

    async def send_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                self._is_events = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                self._started = True
            elif body := message.get("body", b""):
                self._event_complete = body.endswith(b"\n\n")
                self._num_events += body.count(b"\n\n")
            try:
                message = await self._window.admit(message)
            except TimeoutError:
                self._record.error = "stalled_reader"
                raise ConnectionError("the client has stopped reading") from None
            await self._send(message)

    async def _abort(self, error: APIError) -> None:
        """End a stream with an error event, and any other response such that the client notices that it is incomplete.

        Raises:
            ConnectionError: to have the connection closed.
        """
        if not self._is_events:
            raise ConnectionError("the response is incomplete")
        event = (b"" if self._event_complete else b"\n\n") + error.event(self._path, self._num_events)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not read
    """Chooses the replica for a request. Ray Serve runs it in each Front.

    It prefers the replica that has the prompt's prefix in its cache, unless that replica has too many requests. The
    first argument of a call must be the blocks of its prompt.
    """

    queue_len_response_deadline_s = 1.0  # a replica that computes on all cores may be slow to report its queue

    def initialize_state(self, max_blocks: int, margin: int) -> None:
        """Called by Ray with the deployment's request_router_kwargs; see PrefixIndex."""
        self._index: PrefixIndex[ReplicaID] = PrefixIndex(max_blocks=max_blocks, margin=margin)

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        """Called by Ray. A replica waits while MAX_BATCHES batches of a response have not been taken."""
        replica: RunningReplica = super().create_replica_wrapper(replica_info)
        for name in ("handle_request_with_rejection", "handle_request_streaming"):
            replica._actor_handle._method_shells[name]._generator_backpressure_num_objects = MAX_BATCHES
        return replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the candidates, one per rank. Ray takes the first that is not full."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        lengths = {replica_id: self.replica_queue_len_cache.get(replica_id) or 0 for replica_id in by_id}
        blocks = ()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray retries without delay while all are full
            blocks = pending_request.args[0]
        return [[by_id[replica_id]] for replica_id in self._index.ranked(blocks, lengths)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called before a request is sent to a replica, which may still reject it."""
        super().on_send_request(replica_id)
        self._index.start(replica_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Called when a replica has accepted a request, which may have ended already."""
        del result
        self._index.add(replica_id, pending_request.args[0])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called when a request has ended for any reason."""
        del internal_request_id
        self._index.finish(replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._index.retain(self.curr_replicas)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._index.retain(self.curr_replicas)


def merge_metrics(texts: Mapping[str, bytes], errors: Mapping[str, int]) -> bytes:
    """Merge the metrics of replicas into one Prometheus text, with a label `replica` for each sample.

    `errors` maps codes to numbers of errors that the front has sent; their replica is "front".
    """
    families: dict[str, Metric] = {}
    model = ""
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                model = sample.labels.get("model_name", model)
                merged.samples.append(sample._replace(labels=sample.labels | {"replica": replica}))
    name = f"{OWN_PREFIX}request_errors"
    for code, count in sorted(errors.items()):
        counter = families.setdefault(name, CounterMetricFamily(name, ERRORS_TEXT))
        counter.add_sample(f"{name}_total", {"model_name": model, "code": code, "replica": "front"}, count)
    return generate_latest(_Collected(families.values()))


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _unavailable() -> APIError:
    message = "No replica of the model can take this request now."
    return APIError(503, message, None, "no_replica", {"retry-after": str(int(_WAIT))})


def _plain(scope: Scope) -> dict[str, Any]:
    """The part of the scope that can be sent to another process. The body that goes with it is decompressed."""
    plain = {name: scope[name] for name in _PLAIN if name in scope}
    addresses = {name: tuple(scope[name]) if scope.get(name) else None for name in ("client", "server")}
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name != b"content-encoding"]
    return plain | addresses | {"headers": headers}
