"""An in-process server for fuzzing, and the invariants that hold after every request."""

import asyncio
import json
from contextlib import AbstractAsyncContextManager

import httpx2
from pydantic import BaseModel

from serve.api import responses
from serve.api.decisions.responses import DecisionsAnswer, SystemOneAnswer, ValidationErrors
from serve.api.messages.responses import MessageAnswer, MessageErrorAnswer, MessageEvent, TokenCount
from serve.api.responses_api.responses import ResponsesAnswer, ResponsesEvent
from tests.support.engines import assert_idle
from tests.support.events import named_events
from tests.support.http_client import ExactRunner, Server, chunks_of, error_of, parse_unique, serving
from tools.fuzz.bodies import COUNT_TOKENS, DECISIONS, DETOKENIZE, MESSAGES, RESPONSES, SYSTEM_ONE, TOKENIZE

SECONDS = 20  # per request
_REJECTIONS = (400, 404, 413)
# Keyed by the answer's `object`, or by the path if it has none.
_ANSWERS: dict[str, type[BaseModel]] = {
    "chat.completion": responses.ChatCompletionAnswer,
    "text_completion": responses.CompletionAnswer,
    TOKENIZE: responses.Tokenized,
    DETOKENIZE: responses.Detokenized,
    DECISIONS: DecisionsAnswer,
    SYSTEM_ONE: SystemOneAnswer,
    "scoring": responses.ScoreAnswer,
    "list": responses.GenerativeScoringAnswer,
    "response": ResponsesAnswer,
    MESSAGES: MessageAnswer,
    COUNT_TOKENS: TokenCount,
}
_CHUNKS: dict[str, type[BaseModel]] = {
    "chat.completion.chunk": responses.ChatChunk,
    "text_completion": responses.CompletionChunk,
}
_EVENTS: dict[str, type[BaseModel]] = {RESPONSES: ResponsesEvent, MESSAGES: MessageEvent}


def fuzz_server() -> AbstractAsyncContextManager[Server]:
    """A server with all features enabled, whose answers are short."""
    return serving(
        runner=ExactRunner,
        full_vocab=True,
        max_model_len=64,
        pages=32,
        max_waiting=256,  # more than one request can have at a time, as on every server
        enable_log_requests=True,
        trust_request_chat_template=True,
    )


async def send(server: Server, path: str, body: bytes) -> int:
    """Send a request, check the answer and return its status.

    Raises:
        AssertionError, ValueError: the answer is a 5xx, violates the schema, or leaves a request in the engine.
        TimeoutError: there is no answer.
    """
    try:
        async with asyncio.timeout(SECONDS):
            response = await server.post(path, body)
            await asyncio.to_thread(assert_idle, server.engine)
        server.runner.calls.clear()
        with_timeout = b'"timeout"' in body
        if response.status_code == 200:
            _check_shape(path, response, with_timeout=with_timeout)
        elif path == SYSTEM_ONE and response.status_code == 422:
            ValidationErrors.model_validate_json(response.content)
        elif with_timeout and response.status_code == 504:
            assert _code(path, response) == "deadline_exceeded"
        else:
            assert response.status_code in _REJECTIONS, (response.status_code, response.text)
            assert _code(path, response)
    except Exception as error:
        error.add_note(f"POST {path} {body[:2000]!r}")
        raise
    return response.status_code


def _code(path: str, response: httpx2.Response) -> str | None:
    """The code of an error, whose envelope is checked."""
    if path in (MESSAGES, COUNT_TOKENS):
        return MessageErrorAnswer.model_validate_json(response.content).error.details["error_code"]
    error = error_of(response, response.status_code)
    assert error["type"] == ("timeout" if response.status_code == 504 else "invalid_request_error")
    return str(error["code"])


def _check_shape(path: str, response: httpx2.Response, *, with_timeout: bool) -> None:
    is_stream = response.headers["content-type"].startswith("text/event-stream")
    if is_stream and path in _EVENTS:
        for event in named_events(response):
            _EVENTS[path].model_validate_json(json.dumps(event))
            assert event["type"] != "error" or with_timeout
    elif is_stream:
        for chunk in chunks_of(response):
            if with_timeout and chunk.get("error", {}).get("code") == "deadline_exceeded":
                continue
            _CHUNKS[chunk["object"]].model_validate_json(json.dumps(chunk))
    else:
        assert response.headers["content-type"] == "application/json"
        value = parse_unique(response.text)
        _ANSWERS[value.get("object", path)].model_validate_json(json.dumps(value))
