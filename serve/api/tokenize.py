"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM's shapes, which lm-eval and others look for."""

import asyncio
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from serve.api.chat_prompt import chat_ids, chat_text
from serve.api.context import Endpoint
from serve.api.errors import invalid
from serve.api.json_stream import dump
from serve.api.parsing import json_object, validated
from serve.api.requests import ChatPromptFields, TokenId
from serve.api.validation import check_ids, check_size
from serve.text.chat import encode_text

_JSON = "application/json"
_MAX_IDS = 1 << 20


class TokenizeTextRequest(BaseModel):
    """POST /tokenize of a text."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None  # true: as completions do
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatPromptFields):
    """POST /tokenize of a chat."""

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
    """The endpoints."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._at = endpoint

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or a chat, as a request to generate would have them."""
        return await self._answer(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens written out; on demand the bytes of each."""
        return await self._answer(request, self._detokenize)

    async def info(self, _: Request) -> Response:
        """What clients want to know of a tokenizer that they do not have."""
        tokenizer, limits = self._at.tokenizer, self._at.engine.limits
        fields = {
            **tokenizer.special_tokens,
            "chat_template": self._at.model.chat_template or tokenizer.chat_template,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "special_token_ids": sorted(tokenizer.special_ids),
            "model_max_length": limits.max_model_len,
            "vocab_size": limits.vocab_size,
        }
        return Response(dump({"bos_token": None, "eos_token": None, "pad_token": None} | fields), media_type=_JSON)

    async def _answer(self, request: Request, work: Any) -> Response:
        async with self._at.bodies.read(request) as data:
            return Response(await asyncio.to_thread(work, data), media_type=_JSON)

    def _tokenize(self, data: bytes) -> bytes:
        at, values = self._at, json_object(data)
        if "messages" in values:
            chat = validated(TokenizeChatRequest, values, at.fields)
            at.model_name(chat.model)
            text = chat_text(chat, at)
            check_size("messages", text, at.engine.limits)
            return self._tokens(chat_ids(chat, text, at), shown=bool(chat.return_token_strs))
        body = validated(TokenizeTextRequest, values, at.fields)
        at.model_name(body.model)
        check_size("prompt", body.prompt, at.engine.limits)
        specials = body.add_special_tokens is not False
        ids = encode_text(at.tokenizer, body.prompt, add_special_tokens=specials, param="prompt")
        return self._tokens(ids, shown=bool(body.return_token_strs))

    def _tokens(self, ids: list[int], *, shown: bool) -> bytes:
        names = [self._at.tokenizer.token_piece(token_id) for token_id in ids] if shown else None
        limit = self._at.engine.limits.max_model_len
        return dump({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names})

    def _detokenize(self, data: bytes) -> bytes:
        body = validated(DetokenizeRequest, json_object(data), self._at.fields)
        self._at.model_name(body.model)
        if len(body.tokens) > _MAX_IDS:
            message = f"`tokens` has {len(body.tokens)} ids, of at most {_MAX_IDS}."
            raise invalid("tokens", message, "array_above_max_length")
        check_ids("tokens", body.tokens, self._at.engine.limits)
        tokenizer = self._at.tokenizer
        answer: dict[str, Any] = {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
        if body.return_token_bytes:
            answer["token_bytes"] = [list(tokenizer.token_bytes(token_id)) for token_id in body.tokens]
        return dump(answer)
