"""/openapi.json describes actual requests and responses; /docs shows it without network access."""

import asyncio
import base64
import hashlib
import json
import re
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from serve.api import responses
from serve.api.openapi import openapi
from serve.api.requests import ChatCompletionRequest, CompletionRequest
from tests.support.http_client import MODEL, Gate, Server, answered, chat_body, completion_body, error_of, serving

NUMBERS: dict[str, Any] = {
    "prompt_logprobs": 2,
    "return_token_ids": True,
    "max_tokens": 2,
    "logprobs_mode": "raw_logprobs",
}


SERVER_OPTIONS: dict[str, Any] = {"script": None}


def has_shape(kind: type[BaseModel], value: Any) -> None:
    """Fails if a field is missing, unknown or of the wrong type."""
    kind.model_validate_json(json.dumps(value))


async def test_openapi_document_has_every_route(server: Server) -> None:
    document = answered(await server.client.get("/openapi.json"))
    assert document == openapi(secured=False)
    served = {getattr(route, "path", "").replace(":path", "") for route in server.app.routes}
    pages = {path for path in served if path in ("/", "/openapi.json") or path.startswith(("/docs", "/web/"))}
    assert len(pages) > 3
    assert set(document["paths"]) == served - pages
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_openapi_describes_every_field(kind: type[BaseModel]) -> None:
    schema = openapi(secured=False)["components"]["schemas"][kind.__name__]
    assert schema["properties"].keys() == kind.model_fields.keys()
    if kind is ChatCompletionRequest:
        assert schema["anyOf"] == [{"required": ["messages"]}, {"required": ["prompt_token_ids"]}]
    else:
        assert schema["required"] == ["prompt"]


@pytest.mark.parametrize("extra", [{}, NUMBERS, NUMBERS | {"prompt_logprobs_format": "columns"}])
async def test_openapi_answer_shapes(server: Server, extra: dict[str, Any]) -> None:
    chat = {"logprobs": True, "top_logprobs": 2} | extra
    has_shape(responses.ChatCompletionAnswer, await server.chat(**chat))
    for chunk in await server.chat_stream(**chat, stream_options={"include_usage": True}, return_prompt_text=True):
        has_shape(responses.ChatChunk, chunk)
    completion = {"logprobs": 2, "echo": True, "n": 2} | extra
    has_shape(responses.CompletionAnswer, await server.complete(**completion))
    for chunk in await server.complete_stream(**completion, stream_options={"include_usage": True}):
        has_shape(responses.CompletionChunk, chunk)


async def test_openapi_shapes_of_small_answers(server: Server) -> None:
    kinds: dict[str, type[BaseModel]] = {
        "/v1/models": responses.ModelList,
        f"/v1/models/{MODEL}": responses.ModelCard,
        "/tokenizer_info": responses.TokenizerInfo,
        "/version": responses.Version,
        "/load": responses.Load,
    }
    for path, kind in kinds.items():
        has_shape(kind, answered(await server.client.get(path)))
    has_shape(
        responses.Tokenized, answered(await server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}))
    )
    has_shape(responses.Detokenized, answered(await server.post("/detokenize", {"tokens": [72]})))
    for path, body in (("/v1/completions", completion_body(n=0)), ("/v1/chat/completions", chat_body(n=0))):
        has_shape(responses.ErrorAnswer, (await server.post(path, body)).json())


async def test_docs_page_and_files_are_local() -> None:
    async with serving() as server:
        page = await server.client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "http" not in page.text
        for name, kind in {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}.items():
            assert f"docs/{name}" in page.text
            file = await server.client.get(f"/docs/{name}")
            assert file.headers["content-type"].startswith(kind)
            assert len(file.content) > 50_000
        [script] = re.findall("<script>(.*)</script>", page.text)
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'self' 'sha256-{allowed}'" in page.headers["content-security-policy"]


async def test_openapi_with_api_keys() -> None:
    async with serving(api_key=("sk-1",)) as server:
        for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
            error_of(await server.client.get(path), 401)
        response = await server.client.get("/openapi.json", headers={"Authorization": "Bearer sk-1"})
        assert answered(response)["security"] == [{"bearer": []}, {"header": []}]


async def test_openapi_disabled() -> None:
    async with serving(disable_fastapi_docs=True) as server:
        for path in ("/docs", "/openapi.json", "/docs/swagger-ui.css"):
            response: httpx2.Response = await server.client.get(path)
            assert response.status_code == 404


async def test_load_counts_unfinished_requests(fresh_server: Server) -> None:
    gate = Gate("decode")
    fresh_server.runner.before_call = gate
    task = asyncio.create_task(fresh_server.complete(n=3))
    await gate.reached()
    assert answered(await fresh_server.client.get("/load")) == {"server_load": 3}
    gate.open()
    await task
    assert answered(await fresh_server.client.get("/load")) == {"server_load": 0}
