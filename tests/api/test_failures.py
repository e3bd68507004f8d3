"""The engine is full, has stopped or fails: an error in OpenAI's envelope, without internals."""

import asyncio
import json
import re
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


async def test_queue_full_is_429() -> None:
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
async def test_queue_not_filled_by_finished_choices(stream: bool) -> None:
    """Choices that a stop string ends leave the queue at once, although the engine learns of it after its step."""
    async with serving(b"Hello" * 20, max_waiting=64) as server:
        response = await server.post(COMPLETIONS, completion_body(n=128, stop="l", max_tokens=60, stream=stream))
        assert response.status_code == 200
        assert "rate_limit_exceeded" not in response.text
        await server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limits", [{"max_waiting": 6}, {"max_waiting_tokens": 6 * len("Hi")}])
async def test_queue_full_refuses_first_choice_only(stream: bool, limits: dict[str, Any]) -> None:
    """The other choices wait for one of the same request, however short the queue is."""
    async with serving(**limits) as server:
        response = await server.post(COMPLETIONS, completion_body(prompt="Hi", n=100, max_tokens=2, stream=stream))
        assert response.status_code == 200
        assert "rate_limit_exceeded" not in response.text
        gate = server.runner.before_call = Gate("prefill")
        others = [asyncio.create_task(server.complete(prompt="Hi", n=5)) for _ in range(2)]
        async with asyncio.timeout(20):
            while server.engine.num_requests < 6:
                await asyncio.sleep(0)
        response = await server.post(COMPLETIONS, completion_body(prompt="Hi", n=3))
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        assert server.engine.num_requests == 6
        gate.open()
        for other in others:
            assert [choice["text"] for choice in (await other)["choices"]] == ["Hello"] * 5
        text = (await server.client.get("/metrics")).text
        assert len(re.findall(r"^logprobd:admission_rejections_total\{.*\} 1\.0$", text, re.MULTILINE)) == 1
        await server.assert_idle()


async def test_engine_stopped_is_503(fresh_server: Server) -> None:
    await asyncio.to_thread(fresh_server.engine.stop)
    for stream in (False, True):
        error = error_of(await fresh_server.post(CHAT, chat_body(stream=stream)), 503)
        assert (error["type"], error["code"]) == ("service_unavailable", "engine_stopped")


async def test_engine_stops_during_request(fresh_server: Server) -> None:
    fresh_server.runner.before_call = lambda name: fresh_server.engine._stop() if name == "decode" else None
    response = await fresh_server.post(COMPLETIONS, completion_body())
    assert error_of(response, 503)["code"] == "engine_stopped"
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("name", ["prefill", "decode", "read"])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (COMPLETIONS, completion_body(n=2))])
async def test_engine_step_failure_is_500(fresh_server: Server, name: str, path: str, body: Any) -> None:
    fresh_server.runner.fail_once(name)
    error = error_of(await fresh_server.post(path, body), 500)
    assert (error["type"], error["code"], error["param"]) == ("server_error", "engine_error", None)
    assert "Injected" not in error["message"]
    assert (await fresh_server.complete())["choices"][0]["text"] == "Hello"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_stream_failure_before_first_byte_is_status(fresh_server: Server, path: str) -> None:
    fresh_server.runner.fail_once("decode")
    body = chat_body(stream=True) if path == CHAT else completion_body(stream=True)
    assert error_of(await fresh_server.post(path, body), 500)["code"] == "engine_error"
    assert await fresh_server.chat_stream()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_stream_failure_later_is_event(fresh_server: Server, path: str) -> None:
    body = chat_body(stream=True) if path == CHAT else completion_body(stream=True)
    fresh_server.runner.fail_once("decode", after=3)  # two tokens have been read when the fourth starts
    *chunks, error, done = events_of(await fresh_server.post(path, body))
    assert len(chunks) == (3 if path == CHAT else 2)
    assert json.loads(error)["error"]["code"] == "engine_error"
    assert done == "[DONE]"
    assert (await fresh_server.complete())["choices"][0]["text"] == "Hello"


async def test_nan_logprob_is_500() -> None:
    async with serving(None) as server:
        server.runner.nan_token = 5
        response = await server.post(COMPLETIONS, completion_body(prompt=[4, 5], prompt_logprobs=1, max_tokens=0))
        assert "not a number" in error_of(response, 500)["message"]
        assert (await server.complete(prompt=[4, 6], prompt_logprobs=1))["choices"][0]["prompt_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
async def test_unexpected_exception_is_500(server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def admit(*_: object, **__: object) -> None:
        raise RuntimeError("the secret")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "admit", admit)
        response = await server.post(CHAT, chat_body(stream=stream))
    error = error_of(response, 500)
    assert (error["type"], error["param"]) == ("server_error", None)
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    await server.chat()


async def test_stream_unexpected_exception_is_event(fresh_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.chat.chat_content", lambda *_: 1 / 0)
    *_, error, done = events_of(await fresh_server.post(CHAT, chat_body(stream=True, logprobs=True)))
    assert json.loads(error)["error"]["message"] == "The engine failed on this request."
    assert done == "[DONE]"
    await fresh_server.assert_idle()


async def test_disconnect_while_sending_body(fresh_server: Server) -> None:
    connection = Connection(CHAT, None)
    torn = json.dumps(chat_body()).encode()  # looks complete
    connection._incoming.put_nowait({"type": "http.request", "body": torn, "more_body": True})
    connection.leave()
    await connection.run(fresh_server.app)
    assert connection.sent.get_nowait()["status"] == 499  # never sent, but the request has ended
    assert (await fresh_server.complete())["choices"][0]["text"] == "Hello"
    await fresh_server.assert_idle()
