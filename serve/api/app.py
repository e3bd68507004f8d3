"""create_app: routes, middleware, exception handlers, and endpoints about the server."""

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve import __version__
from serve.api.chat import ChatCompletions
from serve.api.completions import Completions
from serve.api.context import Context, ServedModel
from serve.api.errors import APIError, invalid
from serve.api.inspector import inspector
from serve.api.json_stream import dump
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.middleware import Access, AnswerRecord, OnAnswer, Readiness, record_of
from serve.api.openapi import documentation
from serve.api.parsing import json_object
from serve.api.prompt_logprobs import PromptLogprobsWriter
from serve.api.request_body import Bodies
from serve.api.tokenize import Tokenization
from serve.api.validation import served_name
from serve.config.config import ServeConfig
from serve.engine.client import EngineClient
from serve.text.chat import ChatFormat, PromptError
from serve.text.chat_template import TemplateBusyError, TemplateSandbox
from serve.text.tokenizer import Tokenizer


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    model: ServedModel,
    config: ServeConfig,
    metrics: Metrics,
    *,
    readiness: Readiness | None = None,
    on_answer: OnAnswer | None = None,
) -> Starlette:
    """The ASGI app of a running engine. The caller starts and stops the engine and registers `metrics` with it.

    Args:
        readiness: whether requests are accepted; always, if None.
        on_answer: called with the record of each answer, after `metrics`.
    """
    readiness = readiness or Readiness()
    sandbox = TemplateSandbox() if config.trust_request_chat_template else None
    context = Context(
        engine,
        tokenizer,
        model,
        config,
        ChatFormat(tokenizer, model.chat_template, sandbox),
        Bodies(max_bytes=config.max_body_bytes, seconds=config.client_timeout),
        PromptLogprobsWriter(engine, tokenizer),
        metrics.on_answers,
        metrics.on_rejected,
    )

    def on_end(record: AnswerRecord) -> None:
        metrics.on_http(record)
        if on_answer is not None:
            on_answer(record)

    access = Middleware(
        Access, api_keys=config.api_key, allowed_hosts=config.accepted_hosts, readiness=readiness, on_answer=on_end
    )
    app = Starlette(
        routes=_routes(context, _Status(context, metrics, readiness)),
        middleware=[*_cors(config), access],
        exception_handlers={
            APIError: _api_error,
            PromptError: _prompt_error,
            TemplateBusyError: _template_busy,
            HTTPException: _http_error,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Status:
    """GET endpoints about the server."""

    def __init__(self, context: Context, metrics: Metrics, readiness: Readiness) -> None:
        self._context = context
        self._metrics = metrics
        self._readiness = readiness

    async def models(self, _: Request) -> Response:
        cards = [self._card(name) for name in self._context.model.names]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if f"/{name}" in self._context.model.names:  # double slashes have been collapsed
            name = f"/{name}"
        return _json(self._card(served_name(name, self._context.model.names)))

    async def health(self, _: Request) -> Response:
        """200 if requests are accepted, else 503."""
        return Response(status_code=200 if self._context.engine.ready and not self._readiness.draining else 503)

    async def load(self, _: Request) -> Response:
        return _json({"server_load": self._context.engine.load})

    async def version(self, _: Request) -> Response:
        return _json({"version": __version__})

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _card(self, name: str) -> dict[str, Any]:
        limits = self._context.engine.limits
        return {
            "id": name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "logprobd",
            "root": self._context.model.names[0],
            "parent": None,
            "max_model_len": limits.max_model_len,
            "max_logprobs": limits.max_logprobs,
            "whole_vocabulary": limits.full_vocab,
        }


def _routes(context: Context, status: _Status) -> list[Route]:
    chat, completions, tokenization = ChatCompletions(context), Completions(context), Tokenization(context)

    async def invocations(request: Request) -> Response:
        """SageMaker's single path for all requests to a model."""
        async with context.bodies.read(request) as data:
            handler = completions if "prompt" in await asyncio.to_thread(json_object, data) else chat
            respond = await handler.prepare(request, data)
        del data  # as in `Handler`
        return await respond()

    routes = [
        Route("/v1/models", status.models),
        Route("/v1/models/{id:path}", status.model),
        Route("/v1/chat/completions", chat.__call__, methods=["POST"]),
        Route("/v1/completions", completions.__call__, methods=["POST"]),
        Route("/invocations", invocations, methods=["POST"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenization.info),
        Route("/metrics", status.metrics),
        Route("/load", status.load),
        Route("/health", status.health),
        Route("/ping", status.health, methods=["GET", "POST"]),
        Route("/version", status.version),
        *inspector(),
    ]
    if not context.config.disable_fastapi_docs:
        routes += documentation(secured=bool(context.config.api_key))
    return routes


def _cors(config: ServeConfig) -> list[Middleware]:
    if not config.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=["x-request-id", "retry-after"],
        )
    ]


def _json(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    record_of(request).error = error.code
    return error.response()


async def _prompt_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PromptError)
    return await _api_error(request, invalid(error.param, str(error), error.code))


async def _template_busy(request: Request, _: Exception) -> Response:
    message = "Too many chat templates are being rendered. Try again later."
    return await _api_error(request, APIError(503, message, None, "too_many_templates", {"Retry-After": "1"}))


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's 404 and 405."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return await _api_error(request, APIError(error.status_code, message, None, code, error.headers or {}))
