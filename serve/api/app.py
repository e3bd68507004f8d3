"""create_app: the routes, and what is common to all answers."""

import asyncio

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
from serve.api.context import Endpoint, ServedModel
from serve.api.errors import APIError, invalid
from serve.api.full_vocab_logprobs import RowWriter
from serve.api.inspector import inspector
from serve.api.json_stream import dump
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.middleware import Access, AnswerRecord, OnAnswer, Readiness, record_of
from serve.api.models import Models
from serve.api.openapi import documentation
from serve.api.parsing import json_object
from serve.api.prompt_logprobs import EntryWriter
from serve.api.request_body import Bodies
from serve.api.tokenize import Tokenization
from serve.config.config import ServeConfig
from serve.engine.client import EngineClient
from serve.text.chat import PromptError
from serve.text.template_sandbox import TemplateBusyError, TemplateSandbox
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
    """The ASGI app around a running engine, whose life is the caller's business; so is who tells `metrics` of it.

    Args:
        readiness: the caller's word on whether requests are taken; always, if None.
        on_answer: is told of each answer, after `metrics`.
    """
    limits, readiness = engine.limits, readiness or Readiness()
    bodies = Bodies(max_bytes=config.max_body_bytes, seconds=config.client_timeout)
    writer = RowWriter(tokenizer, limits.vocab_size) if limits.whole_vocabulary else None
    jail = TemplateSandbox() if config.trust_request_chat_template else None
    endpoint = Endpoint(
        engine,
        tokenizer,
        model,
        config,
        writer,
        EntryWriter(tokenizer),
        bodies,
        metrics.on_answers,
        metrics.on_rejected,
        jail,
    )
    models, chat, completions = Models(endpoint), ChatCompletions(endpoint), Completions(endpoint)
    tokenization = Tokenization(endpoint)

    async def health(_: Request) -> Response:
        return Response(status_code=200 if engine.ready and not readiness.draining else 503)

    def told(record: AnswerRecord) -> None:
        metrics.on_http(record)
        if on_answer is not None:
            on_answer(record)

    async def invocations(request: Request) -> Response:  # SageMaker has one path for all that a model does
        async with bodies.read(request) as data:
            kind = completions if "prompt" in await asyncio.to_thread(json_object, data) else chat
            answer = await kind.checked(request, data)
        del data  # as in `Answering`
        return await answer()

    async def prometheus(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def load(_: Request) -> Response:
        return Response(dump({"server_load": engine.load}), media_type="application/json")

    async def version(_: Request) -> Response:
        return Response(dump({"version": __version__}), media_type="application/json")

    routes = [
        Route("/v1/models", models.list),
        Route("/v1/models/{id:path}", models.one),
        Route("/v1/chat/completions", chat.__call__, methods=["POST"]),
        Route("/v1/completions", completions.__call__, methods=["POST"]),
        Route("/invocations", invocations, methods=["POST"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenization.info),
        Route("/metrics", prometheus),
        Route("/load", load),
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/version", version),
        *inspector(),
    ]
    if not config.disable_fastapi_docs:
        routes += documentation(secured=bool(config.api_key))
    access = Middleware(
        Access,
        api_keys=config.api_key,
        allowed_hosts=config.accepted_hosts,
        readiness=readiness,
        on_answer=told,
    )
    app = Starlette(
        routes=routes,
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


def _cors(config: ServeConfig) -> list[Middleware]:
    """Nothing, unless pages of other origins may ask."""
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
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return await _api_error(request, APIError(error.status_code, message, None, code, error.headers or {}))
