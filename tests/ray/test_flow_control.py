"""Flow control of responses on Ray: reports of the proxy, the front's window, batches of a replica."""

import asyncio
import json
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config.config import ServeConfig
from serve.ray import flow_control
from serve.ray.flow_control import Batches, SentReports, Window, proxy_middleware
from tests.support.http_client import COMPLETIONS, Server, completion_body, serving

PIECE = 32 << 10  # bytes
PIECES = 100
START: Message = {"type": "http.response.start", "status": 200, "headers": []}
SCOPE: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}


def piece(number: int) -> Message:
    body = b"%d" % number
    return {"type": "http.response.body", "body": body.ljust(PIECE), "more_body": number < PIECES - 1}


class Proxy:
    """Ray Serve's proxy and the front behind it: unbounded queues between the middleware and `respond`."""

    def __init__(self, respond: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming, outgoing = asyncio.Queue[Message](), asyncio.Queue[Message | None]()

        async def forward_incoming() -> None:
            while True:
                await incoming.put(await receive())

        async def forward_outgoing() -> None:
            while (message := await outgoing.get()) is not None:
                await send(message)

        tasks = [asyncio.create_task(forward_incoming()), asyncio.create_task(forward_outgoing())]
        try:
            await self._respond(scope, incoming.get, outgoing.put)
            await outgoing.put(None)
            await tasks[1]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Client:
    """Reads while `reads` is set."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.received: list[Message] = []
        self.incoming = asyncio.Queue[Message]()

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.received.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.received)

    async def run(self, respond: Callable[[Scope, Receive, Send], Awaitable[None]], **scope: Any) -> None:
        app: ASGIApp = Proxy(respond)
        for middleware in proxy_middleware():
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        async with asyncio.timeout(20):
            await app({**SCOPE, **scope}, self.incoming.get, self.send)


async def settle() -> None:
    """Let all tasks run until they wait for each other."""
    for _ in range(1000):
        await asyncio.sleep(0)


async def test_front_sends_no_more_than_its_client_reads() -> None:
    admitted = 0

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal admitted
        window = Window(scope, receive, seconds=20)
        reader = asyncio.create_task(window.receive())
        for message in (START, *map(piece, range(PIECES))):
            await send(await window.admit(message))
            admitted += 1
        reader.cancel()

    client = Client()
    run = asyncio.create_task(client.run(respond))
    await settle()
    bound = flow_control._WINDOW_BYTES // PIECE + 2
    assert 1 < admitted <= bound
    before = admitted
    await settle()
    assert admitted == before
    client.reads.set()
    await run
    assert client.received == [START, *map(piece, range(PIECES))]


async def test_reports_do_not_replace_the_messages_of_a_client() -> None:
    received: list[Message] = []

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        window = Window(scope, receive, seconds=20)

        async def read() -> None:
            received.extend([await window.receive(), await window.receive()])

        reader = asyncio.create_task(read())
        for message in (START, *map(piece, range(PIECES - 1))):
            await send(await window.admit(message))
        client.incoming.put_nowait({"type": "http.disconnect"})
        await reader
        await send(piece(PIECES - 1))

    client = Client()
    client.reads.set()
    body: Message = {"type": "http.request", "body": b"{}", "more_body": False}
    client.incoming.put_nowait(body)
    await client.run(respond)
    assert received == [body, {"type": "http.disconnect"}]


async def test_other_apps_get_no_reports() -> None:
    received: list[Message] = []

    async def respond(_: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            while True:
                received.append(await receive())

        reader = asyncio.create_task(read())
        for message in (START, *map(piece, range(PIECES))):
            await send(message)
        await settle()
        reader.cancel()

    client = Client()
    client.reads.set()
    await client.run(respond)
    assert received == []
    assert client.received == [START, *map(piece, range(PIECES))]


async def test_middleware_leaves_no_task_behind_and_no_other_kind_of_scope() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, _: Send) -> None:
        scopes.append(scope)
        if scope["type"] == "http":
            task = asyncio.ensure_future(receive())
            await settle()
            task.cancel()

    before = asyncio.all_tasks()
    middleware = SentReports(app)
    for kind in ("http", "lifespan"):
        await middleware({**SCOPE, "type": kind}, asyncio.Queue[Message]().get, Client().send)
    await settle()
    assert asyncio.all_tasks() == before
    assert ["extensions" in scope for scope in scopes] == [True, False]


async def test_window_is_unlimited_without_reports() -> None:
    window = Window(SCOPE, asyncio.Queue[Message]().get, seconds=20)
    assert not window.is_limited
    async with asyncio.timeout(20):
        messages = [START, *map(piece, range(PIECES))]
        assert [await window.admit(message) for message in messages] == messages


async def test_client_that_reads_nothing_is_given_up() -> None:
    scope = {**SCOPE, "extensions": {flow_control._SENT: {}}}
    window = Window(scope, asyncio.Queue[Message]().get, seconds=0.01)
    for message in map(piece, range(flow_control._WINDOW_BYTES // PIECE + 1)):
        await window.admit(message)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(window.admit(piece(0)), 20)


async def test_app_waits_until_its_batches_are_taken() -> None:
    batches, sent = Batches(), 0

    async def run() -> None:
        nonlocal sent
        for message in (START, *map(piece, range(PIECES))):
            await batches.send(message)
            sent += 1

    app = asyncio.create_task(run())
    await settle()
    bound = flow_control._BATCH_BYTES // PIECE + 2
    assert 1 < sent <= bound
    taken: list[Message] = []
    async with asyncio.timeout(20), aclosing(batches.until_done(app)) as pieces:
        async for batch in pieces:
            taken += batch
            await settle()
            assert sent <= len(taken) + bound
    assert taken == [START, *map(piece, range(PIECES))]


async def test_small_messages_are_sent_at_once() -> None:
    batches = Batches()

    async def run() -> None:
        for message in (START, {"type": "http.response.body", "body": b"x"}):
            await batches.send(message)

    app = asyncio.create_task(run())
    await app
    assert [batch async for batch in batches.until_done(app)] == [[START, {"type": "http.response.body", "body": b"x"}]]


async def test_batches_end_with_an_app_that_fails_or_sends_nothing() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    app = asyncio.create_task(fail())
    async with asyncio.timeout(20):
        assert [batch async for batch in Batches().until_done(app)] == []
    with suppress(ValueError):
        await app


class LocalCall:
    """A call of a replica in this process."""

    def __init__(self, batches: AsyncGenerator[list[Message]]) -> None:
        self._batches = batches

    def __aiter__(self) -> "LocalCall":
        return self

    async def __anext__(self) -> list[Message]:
        return await anext(self._batches)

    def cancel(self) -> None:
        self.closed = asyncio.ensure_future(self._batches.aclose())


class LocalReplicas:
    """Ray's handle of a replica in this process, without Ray's queue."""

    def __init__(self, server: Server) -> None:
        from serve.ray.replica import Replica

        self._replica = Replica.__new__(Replica)
        served: Any = SimpleNamespace(app=server.app, engine=SimpleNamespace(stop=lambda: None), tracer=None)
        self._replica._served = served

    def options(self, **_: Any) -> "LocalReplicas":
        return self

    def remote(self, *arguments: Any) -> LocalCall:
        return LocalCall(self._replica.answer(*arguments))


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: `make ray`")
    for name, size in {"_WINDOW_BYTES": 2000, "_REPORT_BYTES": 500, "_BATCH_BYTES": 500}.items():
        monkeypatch.setattr(flow_control, name, size)


def ask(server: Server, client: Client, body: dict[str, Any]) -> asyncio.Task[None]:
    """Send a request through proxy, front and replica."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from serve.ray.front import Front

    front = Front(LocalReplicas(server), ServeConfig()).__serve_build_asgi_app__()
    client.incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
    headers = [(b"content-type", b"application/json")]
    return asyncio.create_task(client.run(front, path=COMPLETIONS, headers=headers, root_path=""))


@pytest.mark.usefixtures("small_limits")
async def test_unread_stream_frees_the_engine_of_its_replica() -> None:
    async with serving(b"x" * 400, max_unread_tokens=8) as server:
        client = Client()
        run = ask(server, client, completion_body(stream=True, max_tokens=400))
        async with asyncio.timeout(20):
            while not server.engine.num_requests:
                await asyncio.sleep(0)
            while server.engine.num_requests:
                await asyncio.sleep(0)
        assert [name for name, _ in server.runner.calls].count("decode") < 100
        assert not run.done()
        client.reads.set()
        await run
        *_, error, done, _ = client.body.split(b"\n\n")
        assert (json.loads(error.removeprefix(b"data: "))["error"]["code"], done) == ("slow_reader", b"data: [DONE]")
        await server.assert_idle()


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("leaves", [True, False])
async def test_unread_answer_keeps_its_room_until_it_is_read(leaves: bool) -> None:
    async def unsent() -> float:
        lines = (await server.client.get("/metrics")).text.splitlines()
        return float(next(line for line in lines if line.startswith("logprobd:unsent_bytes{")).split()[-1])

    body = completion_body(max_tokens=150, n=16, logprobs=3)
    async with serving(b"x" * 150, max_unsent_bytes=1 << 20) as server:
        client = Client()
        run = ask(server, client, body)
        async with asyncio.timeout(20):
            while not await unsent() or server.engine.num_requests:
                await settle()
        await settle()
        assert await unsent() > 0
        assert not run.done()
        if leaves:
            client.incoming.put_nowait({"type": "http.disconnect"})
        client.reads.set()
        async with asyncio.timeout(20):
            await run
            while await unsent():
                await settle()
        if not leaves:
            alone = (await server.post(COMPLETIONS, body)).json()
            assert json.loads(client.body)["choices"] == alone["choices"]
        await server.assert_idle()
