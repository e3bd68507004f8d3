"""create_app: routes, middleware, exception handlers, and endpoints about the server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from datetime import UTC, datetime
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
from serve.api.decisions.endpoints import Decisions, SystemOne
from serve.api.errors import APIError, invalid
from serve.api.inspector import inspector
from serve.api.json_stream import json_response
from serve.api.keys import RATE_HEADERS, ApiKeys
from serve.api.messages.endpoints import CountTokens, Messages
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.middleware import Access, AnswerRecord, OnAnswer, Readiness, Tracer, record_of, route_path
from serve.api.openapi import documentation
from serve.api.prompt_logprobs import PromptLogprobsWriter
from serve.api.request_body import Bodies, Budget, json_object
from serve.api.responses_api.endpoints import Responses, StoredResponses
from serve.api.responses_api.store import ResponseStore
from serve.api.scoring import GenerativeScoring, Score
from serve.api.tokenize import Tokenization
from serve.api.unsent import unsent_bytes
from serve.api.validation import served_name
from serve.config.config import ServeConfig
from serve.config.generation_config import SamplingFields
from serve.engine.client import EngineClient
from serve.engine.request import SamplingParams
from serve.grammar.compiler import GrammarBusyError, GrammarCompiler
from serve.text.chat import ChatFormat, PromptError
from serve.text.chat_template import TemplateBusyError, TemplateSandbox
from serve.text.decisions.plan import DecisionFormat
from serve.tools.markup import markup_of


def create_app(
    engine: EngineClient,
    model: ServedModel,
    config: ServeConfig,
    metrics: Metrics,
    *,
    readiness: Readiness | None = None,
    api_keys: ApiKeys | None = None,
    on_answer: OnAnswer | None = None,
    tracer: Tracer | None = None,
) -> Starlette:
    """The ASGI app of a running engine. The caller starts and stops the engine and registers `metrics` with it.

    Args:
        readiness: whether requests are accepted; always, if None.
        api_keys: accepted keys; None: those of `config`.
        on_answer: called with the record of each answer, after `metrics`.
        tracer: makes a span of each request.

    Raises:
        ValueError: an option is too small for the engine, or its file cannot be used.
    """
    readiness = readiness or Readiness()
    context = _make_context(engine, model, config, metrics)

    def on_end(record: AnswerRecord) -> None:
        metrics.on_http(record)
        if on_answer is not None:
            on_answer(record)

    access = Middleware(
        Access,
        api_keys=api_keys or ApiKeys(config.api_key),
        allowed_hosts=config.accepted_hosts,
        readiness=readiness,
        on_answer=on_end,
        tracer=tracer,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        context.grammars.close()

    routes = [*_generation_routes(context), *_status_routes(context, readiness), *inspector()]
    if not config.disable_fastapi_docs:
        routes += documentation(secured=bool(config.api_key))
    app = Starlette(
        routes=routes,
        middleware=[*_cors(config), access],
        exception_handlers=dict.fromkeys(
            (APIError, PromptError, TemplateBusyError, GrammarBusyError, HTTPException), _error
        ),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _make_context(engine: EngineClient, model: ServedModel, config: ServeConfig, metrics: Metrics) -> Context:
    sandbox = TemplateSandbox() if config.trust_request_chat_template else None
    chat_format = ChatFormat(model.tokenizer, sandbox)
    unsent = Budget(unsent_bytes(config, engine.limits))
    grammars = GrammarCompiler(model.tokenizer, engine.limits.vocab_size, fast_forward=config.grammar_fast_forward)
    grammars.start()
    metrics.watch_unsent(lambda: unsent.used)
    return Context(
        engine,
        model,
        config,
        metrics,
        chat_format,
        DecisionFormat(chat_format, model.decisions),
        grammars,
        Bodies(max_bytes=config.max_body_bytes, seconds=config.client_timeout),
        unsent,
        PromptLogprobsWriter(engine, model.tokenizer),
        markup_of(
            model.tokenizer.chat_template,
            model.tokenizer.special_tokens,
            call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        ),
    )


def _response_store(config: ServeConfig) -> ResponseStore | None:
    if config.response_store is None:
        return None
    return ResponseStore(
        config.response_store, max_bytes=config.response_store_bytes, seconds=config.response_store_ttl
    )


def _generation_routes(context: Context) -> list[Route]:
    chat, completions, tokenization = ChatCompletions(context), Completions(context), Tokenization(context)
    store = _response_store(context.config)
    stored = StoredResponses(store)

    async def invocations(request: Request) -> Response:
        """SageMaker's single path for all requests to a model."""
        async with context.bodies.read(request) as data:
            handler = completions if "prompt" in await asyncio.to_thread(json_object, data) else chat
            respond = await handler.prepare(request, data)
        del data  # as in `Handler`
        return await respond()

    return [
        Route("/v1/chat/completions", chat.__call__, methods=["POST"]),
        Route("/v1/completions", completions.__call__, methods=["POST"]),
        Route("/invocations", invocations, methods=["POST"]),
        Route("/v1/responses", Responses(context, store).__call__, methods=["POST"]),
        Route("/v1/responses/{id}", stored.retrieve),
        Route("/v1/responses/{id}", stored.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/input_items", stored.input_items),
        Route("/v1/messages", Messages(context).__call__, methods=["POST"]),
        Route("/v1/messages/count_tokens", CountTokens(context).__call__, methods=["POST"]),
        Route("/v1/decisions", Decisions(context).__call__, methods=["POST"]),
        Route("/v1/systemone", SystemOne(context).__call__, methods=["POST"]),
        Route("/v1/score", Score(context).__call__, methods=["POST"]),
        Route("/generative_scoring", GenerativeScoring(context).__call__, methods=["POST"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenization.info),
    ]


def _sampling_defaults(model: ServedModel) -> dict[str, float]:
    """Values of the sampling fields that a request omits."""
    unset = {field.name: field.default for field in fields(SamplingParams) if field.name in SamplingFields.model_fields}
    return unset | model.defaults.model_dump(include=set(unset), exclude_none=True)


def _status_routes(context: Context, readiness: Readiness) -> list[Route]:
    engine, names = context.engine, context.model.names

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "logprobd",
            "root": names[0],
            "parent": None,
            "max_model_len": engine.limits.max_model_len,
            "max_logprobs": engine.limits.max_logprobs,
            "whole_vocabulary": engine.limits.full_vocab,
            "bits_per_weight": context.model.bits_per_weight,
            "sampling_defaults": _sampling_defaults(context.model),
        }

    def short_card(name: str) -> dict[str, str]:
        """The card that TypeSafe's clients read."""
        day = datetime.fromtimestamp(context.created, UTC).date().isoformat()
        text = f"{names[0]}: probabilities of options, and log-probs of up to {engine.limits.max_model_len} tokens"
        return {"name": name, "description": text, "release_date": day}

    async def models(_: Request) -> Response:
        cards = {"data": [card(name) for name in names], "models": [short_card(name) for name in names]}
        return json_response({"object": "list"} | cards)

    async def model(request: Request) -> Response:
        name = request.path_params["id"]
        if f"/{name}" in names:  # double slashes have been collapsed
            name = f"/{name}"
        return json_response(card(served_name(name, names)))

    async def health(_: Request) -> Response:
        return Response(status_code=200 if engine.ready and not readiness.draining else 503)

    async def live(_: Request) -> Response:
        return Response(status_code=200 if engine.ready or readiness.draining else 503)

    async def load(_: Request) -> Response:
        return json_response({"server_load": engine.num_requests})

    async def version(_: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(_: Request) -> Response:
        return Response(context.metrics.text(), media_type=CONTENT_TYPE)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/metrics", metrics),
        Route("/load", load),
        Route("/health", health),
        Route("/ready", health),
        Route("/live", live),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/version", version),
    ]


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
            expose_headers=["x-request-id", "retry-after", "traceresponse", *RATE_HEADERS],
        )
    ]


async def _error(request: Request, error: Exception) -> Response:
    match error:
        case PromptError():
            error = invalid(error.param, str(error), error.code)
        case TemplateBusyError():
            message = "Too many chat templates are being rendered. Try again later."
            error = APIError(503, message, None, "too_many_templates", {"Retry-After": "1"})
        case GrammarBusyError():
            message = "Too many grammars are being compiled. Try again later."
            error = APIError(503, message, None, "too_many_grammars", {"Retry-After": "1"})
        case HTTPException(status_code=status):  # the router's 404 and 405
            message = f"{error.detail}: {request.method} {request.url.path[:200]}"
            code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
            error = APIError(status, message, None, code, error.headers or {})
    assert isinstance(error, APIError)
    record_of(request).error = error.code
    return error.response(route_path(request.scope))
