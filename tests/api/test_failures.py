"""The engine is full, has stopped or fails: the client is told so in OpenAI's envelope, and learns no internals."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.http_client import (
    Connection,
    Gate,
    Server,
    chat_body,
    completion_body,
    error_of,
    events_of,
    serving,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


async def test_the_queue_is_full() -> None:
    async with serving(max_waiting=1) as server:
        gate = server.runner.before_call = Gate("prefill")
        first = asyncio.create_task(server.complete())
        await gate.reached()
        for stream in (False, True):
            response = await server.post(COMPLETIONS, completion_body(stream=stream))
            error = error_of(response, 429)
            assert (error["type"], error["code"]) == ("rate_limit_exceeded", "rate_limit_exceeded")
            assert response.headers["retry-after"] == "1"
        gate.open()
        assert (await first)["choices"][0]["text"] == "Hello"
        assert (await server.complete())["choices"][0]["text"] == "Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_request_does_not_fill_the_queue_with_what_it_has_ended(stream: bool) -> None:
    """Choices that a stop string ends leave their places at once, though the engine hears of it after its step."""
    async with serving(b"Hello" * 20, max_waiting=64) as server:
        response = await server.post(COMPLETIONS, completion_body(n=128, stop="l", max_tokens=60, stream=stream))
        assert response.status_code == 200
        assert "rate_limit_exceeded" not in response.text
        await server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limits", [{"max_waiting": 6}, {"max_waiting_tokens": 6 * len("Hi")}])
async def test_only_the_first_choice_of_a_request_can_be_refused(stream: bool, limits: dict[str, Any]) -> None:
    """The others wait for one of theirs, however few places there are."""
    async with serving(**limits) as server:
        response = await server.post(COMPLETIONS, completion_body(prompt="Hi", n=100, max_tokens=2, stream=stream))
        assert response.status_code == 200
        assert "rate_limit_exceeded" not in response.text
        gate = server.runner.before_call = Gate("prefill")
        others = [asyncio.create_task(server.complete(prompt="Hi", n=5)) for _ in range(2)]
        async with asyncio.timeout(20):
            while server.engine.load < 6:
                await asyncio.sleep(0)
        response = await server.post(COMPLETIONS, completion_body(prompt="Hi", n=3))
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        assert server.engine.load == 6
        gate.open()
        for other in others:
            assert [choice["text"] for choice in (await other)["choices"]] == ["Hello"] * 5
        text = (await server.client.get("/metrics")).text
        assert len(re.findall(r"^logprobd:admission_rejections_total\{.*\} 1\.0$", text, re.MULTILINE)) == 1
        await server.assert_idle()


async def test_the_engine_has_stopped(server: Server) -> None:
    await asyncio.to_thread(server.engine.stop)
    for stream in (False, True):
        error = error_of(await server.post(CHAT, chat_body(stream=stream)), 503)
        assert (error["type"], error["code"]) == ("service_unavailable", "engine_stopped")


async def test_the_engine_stops_under_a_request(server: Server) -> None:
    server.runner.before_call = lambda name: server.engine._stop() if name == "decode" else None
    response = await server.post(COMPLETIONS, completion_body())
    assert error_of(response, 503)["code"] == "engine_stopped"
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("name", ["prefill", "decode", "read"])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (COMPLETIONS, completion_body(n=2))])
async def test_a_step_fails(server: Server, name: str, path: str, body: Any) -> None:
    server.runner.fail_once(name)
    error = error_of(await server.post(path, body), 500)
    assert (error["type"], error["code"], error["param"]) == ("server_error", "engine_error", None)
    assert "Injected" not in error["message"]
    assert (await server.complete())["choices"][0]["text"] == "Hello"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_fails_before_its_first_byte(server: Server, path: str) -> None:
    server.runner.fail_once("decode")
    body = chat_body(stream=True) if path == CHAT else completion_body(stream=True)
    assert error_of(await server.post(path, body), 500)["code"] == "engine_error"
    assert await server.chat_stream()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_fails_on_its_way(server: Server, path: str) -> None:
    body = chat_body(stream=True) if path == CHAT else completion_body(stream=True)
    server.runner.fail_once("decode", after=3)  # two tokens have been read when the fourth is begun
    *chunks, error, done = events_of(await server.post(path, body))
    assert len(chunks) == (3 if path == CHAT else 2)
    assert json.loads(error)["error"]["code"] == "engine_error"
    assert done == "[DONE]"
    assert (await server.complete())["choices"][0]["text"] == "Hello"


async def test_nan_is_an_error() -> None:
    async with serving(None) as server:
        server.runner.nan_token = 5
        response = await server.post(COMPLETIONS, completion_body(prompt=[4, 5], prompt_logprobs=1, max_tokens=0))
        assert "not a number" in error_of(response, 500)["message"]
        assert (await server.complete(prompt=[4, 6], prompt_logprobs=1))["choices"][0]["prompt_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_that_nobody_foresaw(server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(_: object) -> None:
        raise RuntimeError("the secret")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "submit", submit)
        response = await server.post(CHAT, chat_body(stream=stream))
    error = error_of(response, 500)
    assert (error["type"], error["param"]) == ("server_error", None)
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    await server.chat()


async def test_a_stream_fails_on_its_way_as_nobody_foresaw(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.chat.chat_content", lambda *_: 1 / 0)
    *_, error, done = events_of(await server.post(CHAT, chat_body(stream=True, logprobs=True)))
    assert json.loads(error)["error"]["message"] == "The engine failed on this request."
    assert done == "[DONE]"
    await server.assert_idle()


async def test_the_client_leaves_while_it_sends(server: Server) -> None:
    connection = Connection(CHAT, None)
    torn = json.dumps(chat_body()).encode()  # it looks whole
    connection._incoming.put_nowait({"type": "http.request", "body": torn, "more_body": True})
    connection.leave()
    await connection.run(server.app)
    assert connection.sent.get_nowait()["status"] == 499  # nobody reads it, but the request has ended
    assert (await server.complete())["choices"][0]["text"] == "Hello"
    await server.assert_idle()
