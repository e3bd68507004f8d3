"""POST /tokenize and /detokenize, GET /tokenizer_info, compatible with vLLM; lm-eval and others use them."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from serve.api.chat import chat_text
from serve.api.context import Context
from serve.api.errors import invalid
from serve.api.json_stream import json_response
from serve.api.parsing import validate
from serve.api.request_body import json_object
from serve.api.requests import ChatPromptFields, TokenId
from serve.api.validation import check_ids, check_size, served_name
from serve.text.chat import encode_text

_MAX_IDS = 1 << 20


class TokenizeTextRequest(BaseModel):
    """POST /tokenize with a text."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None  # default true, as for completions
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatPromptFields):
    """POST /tokenize with a chat."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"required": ["messages"]})

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    model: str | None = None
    return_token_bytes: bool | None = None


class Tokenization:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or a chat, equal to those that a generating endpoint uses."""
        return await self._answer(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids with special tokens, and optionally the bytes of each token."""
        return await self._answer(request, self._detokenize)

    async def info(self, _: Request) -> Response:
        tokenizer, limits = self._context.model.tokenizer, self._context.engine.limits
        fields = {
            **tokenizer.special_tokens,
            "tokenizer_class": tokenizer.class_name,
            "chat_template": tokenizer.chat_template,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "special_token_ids": sorted(tokenizer.special_ids),
            "model_max_length": limits.max_model_len,
            "vocab_size": limits.vocab_size,
        }
        return json_response({"bos_token": None, "eos_token": None, "pad_token": None} | fields)

    async def _answer(self, request: Request, work: Callable[[bytes], Response]) -> Response:
        async with self._context.bodies.read(request) as data:
            return await asyncio.to_thread(work, data)

    def _tokenize(self, data: bytes) -> Response:
        context, values, limits = self._context, json_object(data), self._context.engine.limits
        kind: type[TokenizeChatRequest | TokenizeTextRequest]
        kind = TokenizeChatRequest if "messages" in values else TokenizeTextRequest
        body = validate(kind, values, context.unknown_fields)
        served_name(body.model, context.model.names)
        if isinstance(body, TokenizeChatRequest):
            text = chat_text(body, context)
            check_size("messages", text, limits)
            ids = context.chat_format.encode(text, add_special_tokens=bool(body.add_special_tokens))
        else:
            check_size("prompt", body.prompt, limits)
            special = body.add_special_tokens is not False
            ids = encode_text(context.model.tokenizer, body.prompt, add_special_tokens=special, param="prompt")
        strings = (
            [context.model.tokenizer.token_piece(token_id) for token_id in ids] if body.return_token_strs else None
        )
        counts = {"count": len(ids), "max_model_len": limits.max_model_len}
        return json_response(counts | {"tokens": ids, "token_strs": strings})

    def _detokenize(self, data: bytes) -> Response:
        body = validate(DetokenizeRequest, json_object(data), self._context.unknown_fields)
        served_name(body.model, self._context.model.names)
        if len(body.tokens) > _MAX_IDS:
            message = f"`tokens` has {len(body.tokens)} ids, more than the maximum of {_MAX_IDS}."
            raise invalid("tokens", message, "array_above_max_length")
        check_ids("tokens", body.tokens, self._context.engine.limits)
        tokenizer = self._context.model.tokenizer
        answer: dict[str, Any] = {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
        if body.return_token_bytes:
            answer["token_bytes"] = [list(tokenizer.token_bytes(token_id)) for token_id in body.tokens]
        return json_response(answer)
