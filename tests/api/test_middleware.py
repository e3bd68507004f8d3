"""Common to all answers: API keys, request ids, paths, CORS, models and health."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.routing import Route

from serve import __version__
from serve.api.middleware import AnswerRecord
from serve.api.request_body import BODY_PATHS
from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import CHAT, MODEL, Server, chat_body, completion_body, error_of, serving


@pytest.fixture
async def locked_server() -> AsyncIterator[Server]:
    async with serving(api_key=("sk-1", "sk-2")) as server:
        yield server


@pytest.mark.parametrize(
    "header", [None, "", "sk-1", "Basic sk-1", "Bearer", "Bearer ", "Bearer sk-", "Bearer sk-11", "Bearer sk-1 sk-2"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/version", "/nowhere", "//v1//models"])
async def test_api_key_invalid(locked_server: Server, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    response = await locked_server.client.get(f"http://test{path}", headers=headers)
    error = error_of(response, 401)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert response.headers["x-request-id"]
    assert response.headers["www-authenticate"] == "Bearer"


async def test_api_key_not_ascii(locked_server: Server) -> None:
    headers = [(b"authorization", "Bearer sk-é".encode())]
    error_of(await locked_server.client.get("/v1/models", headers=headers), 401)


async def test_api_key_invalid_does_not_reach_engine(locked_server: Server) -> None:
    error_of(await locked_server.post("/v1/completions", completion_body()), 401)
    assert locked_server.runner.calls == []


@pytest.mark.parametrize("header", ["Bearer sk-1", "Bearer sk-2", "bearer sk-1", "Bearer  sk-2 "])
async def test_api_key_valid(locked_server: Server, header: str) -> None:
    response = await locked_server.post("/v1/chat/completions", chat_body(), Authorization=header)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"X-Api-Key": "sk-1"}, "key1"),
        ({"X-Api-Key": " sk-2"}, "key2"),
        ({"X-Api-Key": "sk-2", "Authorization": "Bearer sk-1"}, "key1"),
        ({"X-Api-Key": "sk-2", "Authorization": "Basic sk-1"}, "key2"),  # the credentials of a proxy
        ({"X-Api-Key": "sk-3"}, None),
        ({"X-Api-Key": "Bearer sk-1"}, None),
        ({"X-Api-Key": ""}, None),
    ],
)
async def test_api_key_in_its_own_header(headers: dict[str, str], key: str | None) -> None:
    records: list[AnswerRecord] = []
    async with serving(api_key=("sk-1", "sk-2"), on_answer=records.append) as server:
        response = await server.post("/v1/completions", completion_body(), **headers)
    assert (response.status_code, records[0].key) == (401 if key is None else 200, key)


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/ping"])
async def test_health_is_public(locked_server: Server, path: str) -> None:
    response = await locked_server.client.get(path)
    assert (response.status_code, response.content) == (200, b"")


async def test_health_follows_engine(fresh_server: Server) -> None:
    assert (await fresh_server.client.get("/health")).status_code == 200
    assert (await fresh_server.client.post("/ping")).status_code == 200
    await asyncio.to_thread(fresh_server.engine.stop)
    for path in ("/health", "/ready", "/live", "/ping"):
        assert (await fresh_server.client.get(path)).status_code == 503


async def test_version(server: Server) -> None:
    assert (await server.client.get("/version")).json() == {"version": __version__}


@pytest.mark.parametrize(("path", "prefix"), [("/v1/chat/completions", "chatcmpl"), ("/v1/completions", "cmpl")])
@pytest.mark.parametrize("stream", [False, True])
async def test_request_id_is_returned(server: Server, path: str, prefix: str, stream: bool) -> None:
    body = (chat_body if prefix == "chatcmpl" else completion_body)(stream=stream)
    response = await server.post(path, body, **{"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert f'"id":"{prefix}-mine-1"' in response.text


@pytest.mark.parametrize("request_id", ["", "two words", "x" * 201, "\x7f"])
async def test_request_id_invalid_is_replaced(server: Server, request_id: str) -> None:
    response = await server.post("/v1/completions", completion_body(), **{"X-Request-Id": request_id})
    new_id = response.headers["x-request-id"]
    assert len(new_id) == 32
    assert response.json()["id"] == f"cmpl-{new_id}"


async def test_request_id_unique_and_in_errors(server: Server) -> None:
    responses = [await server.post("/v1/completions", body) for body in (completion_body(), completion_body(), {})]
    assert len({response.headers["x-request-id"] for response in responses}) == 3
    response = await server.client.get("/nowhere", headers={"X-Request-Id": "a"})
    assert response.headers["x-request-id"] == "a"


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/v1///models"])
async def test_path_double_slashes(server: Server, path: str) -> None:
    assert (await server.client.get(f"http://test{path}")).json()["object"] == "list"


async def test_models_list(server: Server) -> None:
    answer = (await server.client.get("/v1/models")).json()
    assert [card["id"] for card in answer["data"]] == [MODEL, "alias"]
    card = answer["data"][0]
    assert card.pop("created") > 1_700_000_000
    assert card == {
        "id": MODEL,
        "object": "model",
        "owned_by": "logprobd",
        "root": MODEL,
        "parent": None,
        "max_model_len": MAX_MODEL_LEN,
        "max_logprobs": K,
        "whole_vocabulary": False,
        "bits_per_weight": None,
        "sampling_defaults": {
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
        },
    }


async def test_models_one(server: Server) -> None:
    cards = (await server.client.get("/v1/models")).json()["data"]
    assert (await server.client.get("/v1/models/alias")).json() == cards[1]
    assert (await server.client.get("/v1/models/org/bytes")).json() == cards[0]
    assert (await server.client.get("/v1/models/org%2Fbytes")).json() == cards[0]


@pytest.mark.parametrize("name", ["gpt-9", "org", "org/bytes/", "x" * 5000])
async def test_models_unknown_is_404(server: Server, name: str) -> None:
    error = error_of(await server.client.get(f"/v1/models/{name}"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("PUT", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/models/alias"),
        ("POST", "/health"),
    ],
)
async def test_method_not_allowed(server: Server, method: str, path: str) -> None:
    response = await server.client.request(method, path)
    error = error_of(response, 405)
    assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_allowed")
    assert method not in response.headers["allow"]


@pytest.mark.parametrize(
    "path",
    [
        "/web",
        "/web/../app.py",
        "/web/pages.py",
        "/v1",
        "/v1/chat",
        "/v1/completions/",
        "/v1/embeddings",
        "/" + "x" * 5000,
    ],
)
async def test_path_not_found(server: Server, path: str) -> None:
    error = error_of(await server.client.post(path), 404)
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")
    assert len(error["message"]) < 300


PREFLIGHT = {
    "Origin": "https://page.test",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_cors_allowed_origin() -> None:
    every: dict[str, Any] = {"allowed_origins": ("*",), "allowed_methods": ("*",), "allowed_headers": ("*",)}
    async with serving(api_key=("sk-1",), **every) as server:
        for key, status in (("sk-1", 200), ("wrong", 401)):
            headers = {"Origin": "https://page.test", "Authorization": f"Bearer {key}"}
            response = await server.client.get("/v1/models", headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "*"
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        response = await server.client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert response.status_code == 200
        assert "authorization" in response.headers["access-control-allow-headers"].lower()


async def test_cors_other_origin(server: Server) -> None:
    response = await server.client.options("/v1/chat/completions", headers=PREFLIGHT)
    error_of(response, 405)
    answer = await server.post("/v1/completions", completion_body(), Origin="https://page.test")
    for reply in (response, answer):
        assert not [name for name in reply.headers if name.startswith("access-control-")]


async def test_ray_front_reads_the_bodies_of_all_endpoints(server: Server) -> None:
    posts = {route.path for route in server.app.routes if isinstance(route, Route) and "POST" in (route.methods or ())}
    assert posts == {*BODY_PATHS, "/ping"}


@pytest.mark.parametrize("step", ["start", "end"])
@pytest.mark.parametrize("stream", [False, True])
async def test_tracer_that_fails_loses_no_request(step: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    class BrokenTracer:
        def start(self, _: AnswerRecord) -> None:
            if step == "start":
                raise ValueError("broken")

        def end(self, _: AnswerRecord) -> None:
            if step == "end":
                raise ValueError("broken")

    records: list[AnswerRecord] = []
    async with serving(tracer=BrokenTracer(), on_answer=records.append) as server:
        response = await server.post(CHAT, chat_body(stream=stream, request_id="mine"))
        assert response.status_code == 200
        assert "logprobd:request_success_total" in (await server.client.get("/metrics")).text
    assert records[0].status == 200
    assert records[0].work is not None
    failures = [record.getMessage() for record in caplog.records if record.exc_info]
    assert f"the tracer failed on request {records[0].request_id}" in failures
