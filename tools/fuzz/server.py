"""Asks a server of the tests, and looks at all that must be so whatever was asked."""

import asyncio
import json
from contextlib import AbstractAsyncContextManager

import httpx2
from pydantic import BaseModel

from serve.api import responses
from tests.support.http_client import ExactRunner, Server, chunks_of, error_of, serving, told
from tools.fuzz.bodies import DETOKENIZE, TOKENIZE

SECONDS = 20  # in which a request has to be answered
_REFUSALS = (400, 404, 413)
# By the `object` of an answer, which those of /tokenize and /detokenize lack.
_WHOLE: dict[str, type[BaseModel]] = {
    "chat.completion": responses.ChatCompletionAnswer,
    "text_completion": responses.CompletionAnswer,
    TOKENIZE: responses.Tokenized,
    DETOKENIZE: responses.Detokenized,
}
_CHUNKS: dict[str, type[BaseModel]] = {
    "chat.completion.chunk": responses.ChatChunk,
    "text_completion": responses.CompletionChunk,
}


def answering() -> AbstractAsyncContextManager[Server]:
    """A server on which as much as possible can be asked, and no answer takes long."""
    return serving(
        runner=ExactRunner,
        whole_vocabulary=True,
        max_model_len=64,
        pages=32,
        max_waiting=256,  # as on every server, more than one request may have at once
        logs_requests=True,
        trust_request_chat_template=True,
    )


async def asked(server: Server, path: str, body: bytes) -> int:
    """The status of an answer.

    Raises:
        AssertionError, ValueError: it is a failure, is not what the API describes, or leaves something in the engine.
        TimeoutError: there is none.
    """
    try:
        async with asyncio.timeout(SECONDS):
            response = await server.post(path, body)
            await _nothing_is_left(server)
        server.runner.calls.clear()
        hurried = b'"timeout"' in body  # by the client itself
        if response.status_code == 200:
            _check_shape(path, response, hurried=hurried)
        elif hurried and response.status_code == 504:
            assert error_of(response, 504)["code"] == "deadline_exceeded"
        else:
            assert response.status_code in _REFUSALS, (response.status_code, response.text)
            assert error_of(response, response.status_code)["type"] == "invalid_request_error"
    except Exception as error:
        error.add_note(f"POST {path} {body[:2000]!r}")
        raise
    return response.status_code


def _check_shape(path: str, response: httpx2.Response, *, hurried: bool) -> None:
    if response.headers["content-type"].startswith("text/event-stream"):
        for chunk in chunks_of(response):
            if hurried and chunk.get("error", {}).get("code") == "deadline_exceeded":
                continue
            _CHUNKS[chunk["object"]].model_validate_json(json.dumps(chunk))
    else:
        assert response.headers["content-type"] == "application/json"
        value = told(response.text)
        _WHOLE[value.get("object", path)].model_validate_json(json.dumps(value))


async def _nothing_is_left(server: Server) -> None:
    """The engine, when it has heard of all that has ended, has no request and all pages free."""
    await asyncio.to_thread(server.engine.assert_idle)
