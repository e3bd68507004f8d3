"""Access log: request, outcome and times of each answer."""

import asyncio
import itertools
import json
import logging
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from serve.api.access_log import fields_of, log_answer
from serve.api.middleware import AnswerRecord
from serve.api.prompt_logprobs import RowWriter
from serve.server.console import JsonFormatter
from tests.support.http_client import Connection, ExactRunner, Gate, chat_body, completion_body, events_of, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize("stream", [False, True])
async def test_access_log_answer_has_times(stream: bool) -> None:
    records: list[AnswerRecord] = []
    async with serving(on_answer=records.append, api_key=("sk-1", "sk-2")) as server:
        gate = server.runner.before_call = Gate("decode", after=2)
        headers = {"X-Request-Id": "mine", "Authorization": "Bearer sk-2"}
        body = completion_body(n=2, max_tokens=4, stream=stream)
        post = asyncio.create_task(server.post(f"http://test/{COMPLETIONS}?a=b", body, **headers))
        await gate.reached()
        await asyncio.sleep(0.01)
        gate.open()
        response = await post
    [record] = records
    fields = fields_of(record)
    names = ("seconds", "queue_seconds", "prefill_seconds", "decode_seconds", "first_token_seconds")
    times: dict[str, Any] = {name: fields.pop(name) for name in names}
    assert fields == {
        "request_id": "mine",
        "method": "POST",
        "path": f"/{COMPLETIONS}",
        "status": 200,
        "client": "127.0.0.1",
        "key": "key2",
        "bytes": len(response.content),
        "prompt_tokens": 2,
        "cached_tokens": 0,
        "completion_tokens": 8,
    }
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in times.values())
    assert times["seconds"] >= times["decode_seconds"] >= 0.01
    assert times["seconds"] >= times["first_token_seconds"]
    assert record.handler == COMPLETIONS


async def test_access_log_scoring_has_no_decode_time() -> None:
    records: list[AnswerRecord] = []
    async with serving(None, on_answer=records.append) as server:
        await server.complete(prompt=[1] * 20, max_tokens=0, prompt_logprobs=1)
    fields = fields_of(records[0])
    assert fields["prompt_tokens"] == 20
    assert "prefill_seconds" in fields
    assert "decode_seconds" not in fields


async def test_access_log_error_codes() -> None:
    records: list[AnswerRecord] = []
    async with serving(on_answer=records.append) as server:
        await server.post(CHAT, chat_body(top_k="x"))
        await server.client.get("/nowhere")
        server.runner.fail_once("decode", after=3)
        events_of(await server.post(CHAT, chat_body(stream=True)))
        for stream in (False, True):
            gate = server.runner.before_call = Gate("decode", after=2)
            connection = Connection(CHAT, chat_body(stream=stream))
            run = asyncio.create_task(connection.run(server.app))
            await gate.reached()
            if stream:
                await connection.data()
            connection.leave()
            await run
            gate.open()
        text = (await server.client.get("/metrics")).text
    statuses = [(record.status, record.error) for record in records[:-1]]
    assert statuses == [
        (400, "invalid_type"),
        (404, "not_found"),
        (200, "engine_error"),
        (499, "client_gone"),
        (200, "client_gone"),
    ]
    for code, count in {"invalid_type": 1, "not_found": 1, "engine_error": 1, "client_gone": 2}.items():
        assert f'logprobd:request_errors_total{{code="{code}",engine="0",model_name="org/bytes"}} {count}.0' in text
    assert 'logprobd:engine_failures_total{engine="0",kind="step",model_name="org/bytes"} 1.0' in text


@pytest.mark.parametrize("foreseen", [True, False])
async def test_access_log_failing_rows_are_not_client_gone(foreseen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[AnswerRecord] = []
    row, written = RowWriter.row, itertools.count()

    def failing(*arguments: Any) -> bytes:
        if next(written) == 20:
            raise RuntimeError("nobody foresaw it")
        return row(*arguments)

    async with serving(runner=ExactRunner, on_answer=records.append, full_vocab=True) as server:
        if foreseen:
            server.runner.fail_once("vocabulary", after=8)
        else:
            monkeypatch.setattr(RowWriter, "row", failing)
        body = completion_body(prompt=[10] * 60, max_tokens=0, prompt_logprobs=-1)
        with suppress(httpx2.TransportError):
            await server.post(COMPLETIONS, body)
    assert [(record.status, record.error) for record in records] == [(200, "engine_error")]


def record(**fields: Any) -> AnswerRecord:
    usual: dict[str, Any] = {"request_id": "a", "method": "GET", "path": "/v1/models", "status": 200}
    return AnswerRecord(**usual | fields)


def test_access_log_line_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.api.access_log")
    log_answer(record(client="::1", body_bytes=12))
    assert caplog.messages == ["GET /v1/models 200 request_id=a client=::1 bytes=12 seconds=0.0"]
    line = json.loads(JsonFormatter().format(caplog.records[0]))
    assert (line["request_id"], line["status"], line["bytes"], line["path"]) == ("a", 200, 12, "/v1/models")


@pytest.mark.parametrize("handler", ["/health", "/metrics"])
def test_access_log_probes_at_debug_level(handler: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.api.access_log")
    log_answer(record(handler=handler))
    assert caplog.messages == []
    caplog.set_level(logging.DEBUG, "serve.api.access_log")
    log_answer(record(handler=handler))
    assert len(caplog.messages) == 1


def test_access_log_escapes_control_characters_in_path() -> None:
    path = fields_of(record(path="/a\nERROR all is lost\x1b[31m\u202e" + "x" * 1000))["path"]
    assert isinstance(path, str)
    assert path.startswith(r"/a\nERROR\x20all\x20is\x20lost\x1b[31m\u202e")
    assert path.isprintable()
    assert len(path) < 400


def test_access_log_fields_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.api.access_log")
    log_answer(record(method="A" * 5000, path="/x 200 key=key1", status=404))
    assert caplog.messages == ["A" * 20 + r" /x\x20200\x20key=key1 404 request_id=a bytes=0 seconds=0.0"]


@pytest.mark.parametrize(
    ("client", "expected"),
    [("10.0.0.9", "10.0.0.9"), ("::1", "::1"), ("10.0.0.9 key=key1 bytes=0", None), ("\x9b31m", None), (None, None)],
)
def test_access_log_client_only_if_ip_address(client: str | None, expected: str | None) -> None:
    """uvicorn takes the address from a header that a local proxy sets."""
    assert fields_of(record(client=client)).get("client") == expected
