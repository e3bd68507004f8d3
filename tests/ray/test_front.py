"""The relay between clients and replicas. The replicas are scripts of responses and failures."""

import asyncio
import gzip
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

ray_exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed: `make ray` does it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from serve.ray import front as ray_front

from serve.config.api_keys import ApiKey  # noqa: E402
from serve.config.config import ServeConfig  # noqa: E402
from serve.ray import flow_control  # noqa: E402
from serve.ray.front import Front  # noqa: E402
from serve.ray.prefix_index import prompt_blocks  # noqa: E402

DIED = ray_exceptions.ActorDiedError()
OUT_OF_MEMORY = ray_exceptions.OutOfMemoryError("killed by Ray")
LATE = ray_exceptions.GetTimeoutError("its machine is silent")  # also a TimeoutError
HANGS = "hangs"
EVENT: dict[str, Any] = {"type": "http.response.body", "body": b'data: {"n":1}\n\n', "more_body": True}
END: dict[str, Any] = {"type": "http.response.body", "body": b"", "more_body": False}


def start(kind: str = "text/event-stream", status: int = 200) -> dict[str, Any]:
    headers = [(b"content-type", kind.encode()), (b"x-request-id", b"of the replica")]
    return {"type": "http.response.start", "status": status, "headers": headers}


type Step = list[dict[str, Any]] | Exception | str


@dataclass
class Call:
    """One request to a scripted replica."""

    steps: list[Step]
    cancelled: bool = False
    arguments: tuple[Any, ...] = ()

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> list[dict[str, Any]]:
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        if isinstance(step, str):
            await asyncio.Event().wait()
        return step  # type: ignore[return-value]

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Replicas:
    """Stand-in for Ray's handle: every call gets the next script."""

    scripts: Sequence[list[Step]] = ()
    all: Sequence[Any] = ()  # results of requests to all replicas
    calls: list[Call] = field(default_factory=list)

    def options(self, **_: Any) -> "Replicas":
        return self

    def remote(self, *arguments: Any) -> Call:
        self.calls.append(Call(list(self.scripts[len(self.calls)]), arguments=arguments))
        return self.calls[-1]

    def broadcast(self, method: str, *_: Any) -> "Replicas":
        assert method == "answer_all"
        return self

    async def results_async(self, **_: Any) -> Sequence[Any]:
        return self.all


@dataclass
class Received:
    """A response as the client received it."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    complete: bool

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


async def request(
    replicas: Replicas, body: bytes = b"{}", *, path: str = "/v1/completions", pieces: int = 1
) -> Received:
    """Send a request with its body in pieces, and return the response."""
    sent: list[Any] = []
    step = -(-len(body) // pieces) or 1
    starts = range(0, max(1, len(body)), step)
    parts = [
        {"type": "http.request", "body": body[start : start + step], "more_body": start != starts[-1]}
        for start in starts
    ]

    async def send(message: Any) -> None:
        sent.append(message)

    await app(replicas)(scope(path), receiver(parts), send)
    head, *rest = sent
    complete = not rest[-1].get("more_body", False)
    return Received(head["status"], dict(head["headers"]), b"".join(message["body"] for message in rest), complete)


def receiver(unread: list[dict[str, Any]]) -> Any:
    """A client that sends these messages, then waits."""

    async def receive() -> dict[str, Any]:
        if not unread:
            await asyncio.Event().wait()
        return unread.pop(0)

    return receive


MAX_BODY = 100_000  # bytes


def app(replicas: Any, *api_keys: str | ApiKey) -> Any:
    return Front(replicas, ServeConfig(api_key=api_keys, max_body_bytes=MAX_BODY)).__serve_build_asgi_app__()


def scope(path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET" if path in ("/metrics", "/load") else "POST",
        "path": path,
        "root_path": "",
        "headers": [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in {"content_type": "application/json", **headers}.items()
        ],
        "state": object(),  # cannot be sent to another process
    }


async def test_relay_leaves_the_response_as_it_is() -> None:
    replicas = Replicas([[[], [start(), EVENT], [EVENT, END]]])
    body = json.dumps({"prompt": "x" * 600}).encode()
    response = await request(replicas, body, pieces=3)
    headers = {b"content-type": b"text/event-stream", b"x-content-type-options": b"nosniff"}
    assert response == Received(200, headers, EVENT["body"] * 2, True)
    blocks, plain, sent = replicas.calls[0].arguments
    assert blocks == prompt_blocks(body)
    assert len(blocks) == 2
    assert sent == body
    assert plain["path"] == "/v1/completions"
    assert "state" not in plain


@pytest.mark.parametrize("death", [[DIED], [[], DIED], [[], OUT_OF_MEMORY], [[], LATE]])
async def test_request_whose_replica_died_is_not_sent_to_another(death: list[Step]) -> None:
    replicas = Replicas([death, [[], [start(), EVENT, END]]])
    response = await request(replicas)
    assert (response.status, response.error["code"]) == (500, "engine_error")
    assert response.error["message"] == "The replica that answered has died."
    assert len(replicas.calls) == 1
    assert replicas.calls[0].cancelled


async def test_request_without_a_replica_gets_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_front, "_WAIT", 0.01)
    replicas = Replicas([[HANGS]])
    response = await request(replicas)
    assert response.status == 503
    assert response.error["type"] == "service_unavailable"
    assert b"retry-after" in response.headers
    assert replicas.calls[0].cancelled


@pytest.mark.parametrize("death", [DIED, OUT_OF_MEMORY, LATE])
@pytest.mark.parametrize(("sent", "prefix"), [(EVENT, b""), (EVENT | {"body": b'data: {"n":'}, b"\n\n")])
async def test_stream_ends_with_an_error_event_if_its_replica_dies(
    sent: dict[str, Any], prefix: bytes, death: Exception
) -> None:
    replicas = Replicas([[[], [start(), sent], death]])
    response = await request(replicas)
    assert response.status == 200
    assert response.complete
    rest = response.body.removeprefix(sent["body"] + prefix)
    event, end, rest_of_stream = rest.split(b"\n\n")
    assert (end, rest_of_stream) == (b"data: [DONE]", b"")
    error = json.loads(event.removeprefix(b"data: "))["error"]
    assert error["message"] == "The replica that answered has died."
    assert error["type"] == "server_error"


async def test_json_response_is_cut_off_if_its_replica_dies() -> None:
    replicas = Replicas([[[], [start("application/json"), EVENT], DIED]])
    with pytest.raises(ConnectionError):
        await request(replicas)


async def test_failure_does_not_expose_internals() -> None:
    failed = ray_exceptions.RayTaskError("answer", "Traceback: secret", ValueError("secret"))
    response = await request(Replicas([[[], failed]]))
    assert response.status == 500
    assert b"secret" not in response.body
    response = await request(Replicas([[[], [start(), EVENT], failed]]))
    assert b"secret" not in response.body
    assert response.body.endswith(b"data: [DONE]\n\n")


async def test_disconnect_cancels_the_call() -> None:
    replicas = Replicas([[[], [start(), EVENT], HANGS]])
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": b"{}"})

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            incoming.put_nowait({"type": "http.disconnect"})

    async with asyncio.timeout(10):
        await app(replicas)(scope(), incoming.get, send)
    assert replicas.calls[0].cancelled


LIMITED: dict[str, Any] = {"extensions": {flow_control._SENT: {}}}  # as the proxy's middleware sets it
LARGE: dict[str, Any] = {"type": "http.response.body", "body": b"x" * (flow_control._WINDOW_BYTES + 1)}


@pytest.mark.parametrize("leaves", [True, False])
async def test_front_takes_only_what_its_client_reads(leaves: bool) -> None:
    script: list[Step] = [[], [start("application/json")], *[[LARGE | {"more_body": True}]] * 5, [END]]
    replicas = Replicas([script])
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": b"{}"})
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with asyncio.timeout(20):
        run = asyncio.create_task(app(replicas)(scope() | LIMITED, incoming.get, send))
        while len(sent) < 2:
            await asyncio.sleep(0)
        assert sent[0][flow_control._SENT]
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(sent) == 2
        assert len(replicas.calls[0].steps) == 4  # of the six bodies, the front has sent one and holds one
        if leaves:
            incoming.put_nowait({"type": "http.disconnect"})
        else:
            for _ in range(5):
                incoming.put_nowait({"type": flow_control._SENT, "bytes": len(LARGE["body"])})
        await run
    assert replicas.calls[0].cancelled
    assert sum(len(message["body"]) for message in sent[1:]) == len(LARGE["body"]) * (1 if leaves else 5)


async def test_client_that_stops_reading_is_counted_and_frees_its_replica() -> None:
    replicas = Replicas([[[], [start(), LARGE | {"more_body": True}, EVENT, END]]])
    front: Any = Front(replicas, ServeConfig(client_timeout=0.01))

    async def send(_: dict[str, Any]) -> None:
        pass

    with pytest.raises(ConnectionError):
        await front.__serve_build_asgi_app__()(
            scope() | LIMITED, receiver([{"type": "http.request", "body": b"{}"}]), send
        )
    assert replicas.calls[0].cancelled
    assert front._errors == {"stalled_reader": 1}


async def test_proxy_without_reports_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    front = app(Replicas([[[], [start(), EVENT, END]]] * 3))
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    for more in (LIMITED, {}, {}):
        await front(scope() | more, receiver([{"type": "http.request", "body": b"{}"}]), send)
        assert not sent[-1]["more_body"]
    assert caplog.messages == [flow_control.UNLIMITED]


@pytest.mark.parametrize("declared", [True, False])
async def test_body_too_large_gets_413(declared: bool) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        assert not declared, "it is not read"
        return {"type": "http.request", "body": b"x" * (MAX_BODY - 40), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(Replicas())(scope(**{"content_length": str(MAX_BODY + 1)} if declared else {}), receive, send)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("key", "method", "path", "host", "status", "reads"),
    [
        ("Bearer right", "POST", "/v1/completions", "mine", 200, True),
        ("Bearer right", "POST", "/v1/completions", "other", 403, False),
        ("Bearer wrong", "POST", "/v1/completions", "mine", 401, False),
        ("", "POST", "/v1/completions", "mine", 401, False),
        ("", "OPTIONS", "/v1/completions", "mine", 200, False),  # a browser's preflight request has no key
        ("", "GET", "/health", "mine", 200, False),
        ("", "POST", "/ping", "mine", 200, False),
        ("", "POST", "/web/page.js", "mine", 200, False),
        ("Bearer right", "GET", "/v1/completions", "mine", 200, False),
        ("Bearer right", "POST", "/v1/models", "mine", 200, False),
        ("Bearer right", "GET", "/metrics", "mine", 503, False),
    ],
)
async def test_body_is_read_only_with_a_key_and_for_an_endpoint(
    key: str, method: str, path: str, host: str, status: int, reads: bool
) -> None:
    replicas = Replicas([[[], [start(), EVENT, END]]])
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": b"{}"}]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    config = ServeConfig(api_key=("right",), allowed_hosts=("mine",))
    front: Any = Front(replicas, config).__serve_build_asgi_app__()
    sent_scope = {**scope(path, authorization=key, host=host, content_length="2"), "method": method}
    read: list[Any] = []

    async def receive() -> dict[str, Any]:
        if reads and not read:
            read.append(unread)
            return unread[0]
        assert status == 200 or path == "/metrics", "nothing is read, nor waited for"
        await asyncio.Event().wait()  # the body of an open path never comes
        raise AssertionError

    async with asyncio.timeout(10):
        await front(sent_scope, receive, send)
    assert sent[0]["status"] == status
    assert bool(read) == reads
    assert [call.arguments[2] for call in replicas.calls] == ([b"{}" if reads else b""] if status == 200 else [])


async def test_front_limits_requests_per_minute() -> None:
    replicas = Replicas([[[], [start(), EVENT, END]]])
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    front = app(replicas, ApiKey(name="alice", key="right", requests_per_minute=1))
    for _ in range(2):
        headers = {"authorization": "Bearer right"}
        await front(scope(**headers), receiver([{"type": "http.request", "body": b"{}"}]), send)
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert [message["status"] for message in starts] == [200, 429]
    assert [dict(message["headers"])[b"x-ratelimit-remaining-requests"] for message in starts] == [b"0", b"0"]
    assert len(replicas.calls) == 1


async def test_slow_body_gets_408_and_is_not_sent() -> None:
    replicas, sent = Replicas(), list[Any]()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    front: Any = Front(replicas, ServeConfig(client_timeout=0.01)).__serve_build_asgi_app__()
    async with asyncio.timeout(10):
        await front(scope(), receiver([{"type": "http.request", "body": b"{", "more_body": True}]), send)
    assert sent[0]["status"] == 408
    assert replicas.calls == []


async def test_body_with_too_many_brackets_or_of_another_type_is_not_sent() -> None:
    replicas, sent = Replicas(), list[Any]()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    body = b'{"prompt":[' + b"[]," * (1 << 20) + b"1]}"
    front: Any = Front(replicas, ServeConfig()).__serve_build_asgi_app__()
    await front(scope(), receiver([{"type": "http.request", "body": body}]), send)
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]) == (400, "invalid_json")
    await front(scope(content_type="text/plain"), receiver([]), send)
    assert (sent[2]["status"], json.loads(sent[3]["body"])["error"]["code"]) == (400, "invalid_content_type")
    assert replicas.calls == []


@pytest.mark.parametrize("accepts", [True, False])
async def test_memory_of_bodies_counts_until_a_replica_accepts(accepts: bool) -> None:
    size = 1 << 20
    body = b'{"prompt":"' + b"x" * (size - 13) + b'"}'
    replicas = Replicas([[[], [start(), EVENT], HANGS] if accepts else [HANGS]] * 5)
    front: Any = Front(replicas, ServeConfig(max_body_bytes=size)).__serve_build_asgi_app__()
    statuses: asyncio.Queue[int] = asyncio.Queue()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.put_nowait(message["status"])

    async with asyncio.timeout(10):
        tasks = []
        for _ in range(5):  # four fit together
            tasks.append(asyncio.create_task(front(scope(), receiver([{"type": "http.request", "body": body}]), send)))
            if accepts:
                assert await statuses.get() == 200
        if not accepts:
            assert await statuses.get() == 503
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(call.cancelled for call in replicas.calls)


async def test_replica_gets_the_decompressed_body() -> None:
    replicas = Replicas([[[], [start(), EVENT, END]]])
    body = json.dumps({"prompt": "x" * 600}).encode()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    packed = [{"type": "http.request", "body": gzip.compress(body)}]
    await app(replicas)(scope(content_encoding="gzip"), receiver(packed), send)
    assert sent[0]["status"] == 200
    blocks, forwarded, received = replicas.calls[0].arguments
    assert (blocks, received) == (prompt_blocks(body), body)
    assert b"content-encoding" not in dict(forwarded["headers"])


async def test_prompt_nested_too_deep_is_sent_to_a_replica() -> None:
    body = b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}"
    replicas = Replicas([[[], [start(), EVENT, END]]])
    assert (await request(replicas, body)).status == 200
    assert replicas.calls[0].arguments[0] == ()


def text_response(text: str, status: int = 200) -> list[dict[str, Any]]:
    return [start("text/plain", status), {"type": "http.response.body", "body": text.encode()}]


async def test_metrics_of_all_replicas_are_merged() -> None:
    text = (
        '# HELP x_total Things\n# TYPE x_total counter\nx_total{{kind="a\\"b"}} {}\n'
        "# HELP y Now\n# TYPE y gauge\ny {}\n"
    )
    replicas = Replicas(
        all=[("r2", text_response(text.format(3, 0.5))), DIED, ("r1", text_response(text.format(4, 7)))]
    )
    response = await request(replicas, path="/metrics")
    assert response.body.decode().splitlines() == [
        "# HELP x_total Things",
        "# TYPE x_total counter",
        'x_total{kind="a\\"b",replica="r1"} 4.0',
        'x_total{kind="a\\"b",replica="r2"} 3.0',
        "# HELP y Now",
        "# TYPE y gauge",
        'y{replica="r1"} 7.0',
        'y{replica="r2"} 0.5',
    ]
    assert response.headers[b"content-length"] == str(len(response.body)).encode()
    refused = await request(Replicas(all=[("r1", text_response("no key", 401))]), path="/metrics")
    assert (refused.status, refused.body) == (401, b"no key")
    assert (await request(Replicas(all=[DIED]), path="/metrics")).status == 503


async def test_metrics_count_errors_of_the_front() -> None:
    counted = (
        "# TYPE logprobd:request_errors_total counter\n"
        'logprobd:request_errors_total{code="queue_full",engine="0",model_name="m"} 2\n'
    )
    scripts: list[list[Step]] = [[[], [start(), EVENT], DIED]]
    front = app(Replicas(scripts, all=[("r1", text_response(counted))]), "right")
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    for path, headers in (
        ("/v1/completions", {"authorization": "Bearer wrong"}),
        ("/v1/completions", {"authorization": ""}),
        ("/v1/completions", {"authorization": "Bearer right", "content_length": str(MAX_BODY + 1)}),
        ("/v1/completions", {"authorization": "Bearer right"}),
        ("/metrics", {"authorization": "Bearer right"}),
    ):
        await front(scope(path, **headers), receiver([{"type": "http.request", "body": b"{}"}]), send)
    assert sorted(line for line in sent[-1]["body"].decode().splitlines() if not line.startswith("#")) == [
        'logprobd:request_errors_total{code="engine_error",model_name="m",replica="front"} 1.0',
        'logprobd:request_errors_total{code="invalid_api_key",model_name="m",replica="front"} 2.0',
        'logprobd:request_errors_total{code="queue_full",engine="0",model_name="m",replica="r1"} 2.0',
        'logprobd:request_errors_total{code="request_too_large",model_name="m",replica="front"} 1.0',
    ]


async def test_load_is_the_sum_of_all_replicas() -> None:
    replicas = Replicas(all=[("r1", text_response('{"server_load":2}')), ("r2", text_response('{"server_load":3}'))])
    assert json.loads((await request(replicas, path="/load")).body) == {"server_load": 5}


@pytest.mark.parametrize(("path", "root"), [("/api/load", "/api"), ("//load", ""), ("/api//load", "/api/")])
async def test_load_under_a_root_path(path: str, root: str) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(Replicas(all=[("r1", text_response('{"server_load":2}'))]))(
        {**scope("/load"), "path": path, "root_path": root},
        receiver([{"type": "http.request", "body": b""}]),
        send,
    )
    assert json.loads(sent[1]["body"]) == {"server_load": 2}
