"""/openapi.json, generated from the request models, and /docs: Swagger UI 5.32.6 from serve/api/swagger."""

import functools
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from serve import __version__
from serve.api import responses
from serve.api.decisions.requests import DecisionsRequest, SystemOneRequest
from serve.api.decisions.responses import DecisionsAnswer, SystemOneAnswer, ValidationErrors
from serve.api.json_stream import dump
from serve.api.messages.requests import CountTokensRequest, MessagesRequest
from serve.api.messages.responses import MessageAnswer, MessageErrorAnswer, MessageEvent, TokenCount
from serve.api.requests import ChatCompletionRequest, CompletionRequest, GenerativeScoringRequest, ScoreRequest
from serve.api.responses_api.requests import ResponsesRequest
from serve.api.responses_api.responses import DeletedResponse, InputItems, ResponsesAnswer, ResponsesEvent
from serve.api.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest

_REFERENCE = "#/components/schemas/{model}"
_SWAGGER = Path(__file__).parent / "swagger"
_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#ui"})'
_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>logprobd</title>
<link rel="icon" href="web/icon.svg"><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="ui"></div><script src="docs/swagger-ui-bundle.js"></script>
<script>{_SCRIPT}</script></body></html>
"""
_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)  # of a POST
_STORED = (401, 404, 500)  # of a stored response
_POLICY = (
    f"default-src 'none'; script-src 'self' 'sha256-{b64encode(sha256(_SCRIPT.encode()).digest()).decode()}'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class _Operation:
    """A POST if it has a body, else a GET or `method`."""

    path: str
    summary: str
    body: tuple[type[BaseModel], ...] = ()  # alternatives
    answer: type[BaseModel] | None = None
    event: type[BaseModel] | None = None  # of a streamed answer
    errors: tuple[int, ...] = ()  # by default those that every operation of its method has
    query: tuple[tuple[str, dict[str, Any]], ...] = ()  # schemas of parameters
    other_method: str | None = None

    @property
    def method(self) -> str:
        return self.other_method or ("post" if self.body else "get")

    @property
    def statuses(self) -> tuple[int, ...]:
        return self.errors or (_ERRORS if self.body else (401,))


_OPERATIONS = (
    _Operation(
        "/v1/chat/completions",
        "Generate a chat reply with the log-prob and rank of every token",
        (ChatCompletionRequest,),
        responses.ChatCompletionAnswer,
        responses.ChatChunk,
    ),
    _Operation(
        "/v1/completions",
        "Continue or score texts or token ids",
        (CompletionRequest,),
        responses.CompletionAnswer,
        responses.CompletionChunk,
    ),
    _Operation(
        "/invocations",
        "Completion if the body has `prompt`, else chat completion (SageMaker)",
        (CompletionRequest, ChatCompletionRequest),
    ),
    _Operation(
        "/v1/responses",
        "Generate a response with the log-prob and rank of every token (OpenAI)",
        (ResponsesRequest,),
        ResponsesAnswer,
        ResponsesEvent,
    ),
    _Operation("/v1/responses/{id}", "Return a stored response", answer=ResponsesAnswer, errors=_STORED),
    _Operation(
        "/v1/responses/{id}",
        "Delete a stored response",
        answer=DeletedResponse,
        errors=_STORED,
        other_method="delete",
    ),
    _Operation(
        "/v1/responses/{id}/input_items",
        "List the input items of a stored response",
        answer=InputItems,
        errors=(400, *_STORED),
        query=(
            ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
            ("order", {"enum": ["asc", "desc"], "default": "desc"}),
            ("after", {"type": "string"}),
        ),
    ),
    _Operation(
        "/v1/messages",
        "Generate a message with the log-prob and rank of every token (Anthropic)",
        (MessagesRequest,),
        MessageAnswer,
        MessageEvent,
    ),
    _Operation(
        "/v1/messages/count_tokens", "Count the tokens of a prompt (Anthropic)", (CountTokensRequest,), TokenCount
    ),
    _Operation(
        "/v1/decisions",
        "Probabilities of the options of questions about an input (OpenAI)",
        (DecisionsRequest,),
        DecisionsAnswer,
    ),
    _Operation(
        "/v1/systemone",
        "Probabilities of the options of questions about a state (TypeSafe)",
        (SystemOneRequest,),
        SystemOneAnswer,
        errors=(*_ERRORS, 422),
    ),
    _Operation(
        "/v1/score", "Score tokens after each item with the query (SGLang)", (ScoreRequest,), responses.ScoreAnswer
    ),
    _Operation(
        "/generative_scoring",
        "Score tokens after each item with the query (vLLM)",
        (GenerativeScoringRequest,),
        responses.GenerativeScoringAnswer,
    ),
    _Operation(
        "/v1/models",
        "List the served models; `sampling_defaults` has the values of fields that a request omits",
        answer=responses.ModelList,
    ),
    _Operation("/v1/models/{id}", "Describe a model", answer=responses.ModelCard, errors=(401, 404)),
    _Operation(
        "/tokenize", "Tokenize a text or a chat", (TokenizeTextRequest, TokenizeChatRequest), responses.Tokenized
    ),
    _Operation("/detokenize", "Decode token ids", (DetokenizeRequest,), responses.Detokenized),
    _Operation(
        "/tokenizer_info", "Describe the tokenizer: special tokens, chat template", answer=responses.TokenizerInfo
    ),
    _Operation("/health", "Readiness: 200 if requests are accepted, else 503", errors=(503,)),
    _Operation("/ready", "Same as /health", errors=(503,)),
    _Operation("/live", "Liveness: 200 during start-up and shutdown, too; 503 if the engine is lost", errors=(503,)),
    _Operation("/ping", "Same as /health", errors=(503,)),
    _Operation("/version", "Version of the server", answer=responses.Version),
    _Operation("/metrics", "Prometheus text"),
    _Operation("/load", "Number of unfinished requests", answer=responses.Load),
)


def openapi(*, secured: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; `secured` declares the API key."""
    models = {model for o in _OPERATIONS for model in (*o.body, o.answer, o.event) if model}
    models |= {responses.ErrorAnswer, ValidationErrors, MessageErrorAnswer}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "logprobd",
            "version": __version__,
            "description": "OpenAI-compatible LLM server for exact log-probs.",
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
    if secured:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
    return document


def documentation(*, secured: bool) -> list[Route]:
    # Generated on the first request: it takes longer than starting the rest of the app.
    document = functools.cache(lambda: dump(openapi(secured=secured)))

    async def serve_document(_: Any) -> Response:
        return Response(document(), media_type="application/json")

    async def serve_page(_: Any) -> Response:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"})

    return [Route("/openapi.json", serve_document), Route("/docs", serve_page), *map(_file, _FILES)]


def _file(name: str) -> Route:
    async def serve_file(_: Any) -> Response:
        return FileResponse(_SWAGGER / name)

    return Route(f"/docs/{name}", serve_file)


def _describe(operation: _Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Success"}
    if operation.answer is not None:
        answer["content"] = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.event is not None:
        answer["content"]["text/event-stream"] = {"schema": _event(operation.event)}
    description: dict[str, Any] = {"summary": operation.summary, "responses": {"200": answer}}
    envelope = MessageErrorAnswer if operation.path.startswith("/v1/messages") else responses.ErrorAnswer
    bare = operation.path in ("/health", "/ready", "/live", "/ping")
    for status in operation.statuses:
        error = _reference(ValidationErrors if status == 422 else envelope)
        content = {} if bare else {"content": {"application/json": {"schema": error}}}
        description["responses"][str(status)] = {"description": "Error"} | content
    if operation.body:
        kinds = [_reference(model) for model in operation.body]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        description["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "schema": schema} for name, schema in operation.query
    ]
    if "{id}" in operation.path:
        parameters.insert(0, {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        description["parameters"] = parameters
    return description


def _event(model: type[BaseModel]) -> dict[str, Any]:
    """Schema of a server-sent event. If events have no names, the data of the last one is [DONE]."""
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(model)}
    if "type" in model.model_fields:
        names = model.model_json_schema()["properties"]["type"]
        return {"type": "object", "properties": {"event": names, "data": chunk}, "required": ["event", "data"]}
    data = {"anyOf": [{"const": "[DONE]"}, chunk]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
