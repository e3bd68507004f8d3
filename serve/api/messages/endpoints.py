"""POST /v1/messages and POST /v1/messages/count_tokens."""

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve.api.chat import chat_text
from serve.api.context import Context
from serve.api.errors import invalid
from serve.api.json_stream import json_response
from serve.api.messages.requests import (
    AnthropicTool,
    CountTokensRequest,
    MessagesPromptFields,
    MessagesRequest,
    chat_choice,
    chat_messages,
)
from serve.api.middleware import AnswerRecord
from serve.api.parsing import check_extra, check_levels, validate
from serve.api.request_body import json_object
from serve.api.requests import ChatPromptFields
from serve.api.translation import (
    Item,
    TranslatedChat,
    TranslatedHandler,
    TranslatedJob,
    Translation,
    item_logprobs,
    renamed,
    warnings_of,
)
from serve.api.validation import check_size, served_name
from serve.jobs.output import Output

_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
_THINKS = {"enabled": True, "disabled": False}  # type -> value of the template's variables


class Messages(TranslatedHandler):
    renames = (
        (r"^max_completion_tokens$", "max_tokens"),
        (r"^stop$", "stop_sequences"),
        (r"^response_format", "output_config.format"),
        (r"^thinking_token_budget$", "thinking.budget_tokens"),
        (r"^reasoning_effort$", "output_config.effort"),
        (r"^tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
        (r"^tools\[(\d+)\]\.function", r"tools[\1]"),
        (r"^tool_choice\.function", "tool_choice"),
    )

    def _translated(self, data: dict[str, Any], record: AnswerRecord) -> Translation:
        del record
        body = validate(MessagesRequest, data, self._context.unknown_fields)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        form = body.output_config.format if body.output_config else None
        fields = {
            "thinking_token_budget": body.thinking.budget_tokens if body.thinking else None,
            "response_format": None if form is None else form.model_dump(by_alias=True),
            "stop": body.stop_sequences,
            "max_completion_tokens": body.max_tokens,
            "logprobs": body.logprobs,
            "top_logprobs": body.top_logprobs,
        }
        return Translation(body, _prompt(body, self._context) | fields)

    def _header(self, body: TranslatedChat, record: AnswerRecord) -> dict[str, Any]:
        header = super()._header(body, record)
        message_id = f"msg_{uuid.uuid4().hex}"
        record.generation["gen_ai.response.id"] = message_id
        return {"id": message_id, "type": "message", "role": "assistant"} | {
            name: value for name, value in header.items() if name not in ("id", "object", "created")
        }

    def _writer(self, job: TranslatedJob) -> "_Writer":
        return _Writer(job)


class _Writer:
    """Writes one message."""

    def __init__(self, job: TranslatedJob) -> None:
        self._job = job

    def start(self, cached_tokens: int) -> Iterator[dict[str, Any]]:
        usage = _usage(self._job, cached_tokens, 0)
        yield {
            "type": "message_start",
            "message": self._message([], {"stop_reason": None, "stop_sequence": None}, usage),
        }

    def open(self, item: Item) -> Iterator[dict[str, Any]]:
        block = _block(item, "") | ({"input": {}} if item.kind == "call" else {})
        yield {"type": "content_block_start", "index": item.index, "content_block": block}

    def extend(self, item: Item, text: str, logprobs: Any) -> Iterator[dict[str, Any]]:
        kind, name = _DELTAS[item.kind]
        event = {"type": "content_block_delta", "index": item.index, "delta": {"type": kind, name: text}}
        yield event | ({} if logprobs is None else {"logprobs": logprobs})

    def close(self, item: Item, output: Output) -> Iterator[dict[str, Any]]:
        logprobs = item_logprobs(self._job, item, output) if item.end is not None else {}
        others = {name: value for name, value in logprobs.items() if name != "logprobs"}
        yield {"type": "content_block_stop", "index": item.index} | others

    def end(self, items: Sequence[Item], output: Output) -> Iterator[dict[str, Any]]:
        yield from self.close(items[-1], output)
        usage = _usage(self._job, output.cached_tokens, len(output.token_ids))
        yield {"type": "message_delta", "delta": _stop(items, output), "usage": usage}
        yield {"type": "message_stop"}

    def document(self, items: Sequence[Item], output: Output) -> dict[str, Any]:
        blocks = [_block(item, item.text) | item_logprobs(self._job, item, output) for item in items]
        usage = _usage(self._job, output.cached_tokens, len(output.token_ids))
        return self._message(blocks, _stop(items, output), usage)

    def _message(self, content: list[Any], stop: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        return self._job.header | {"content": content} | stop | {"usage": usage} | warnings_of(self._job)


def _block(item: Item, text: str) -> dict[str, Any]:
    """The item as a block of the content."""
    match item.kind:
        case "content":
            return {"type": "text", "text": text}
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        case "call":
            assert item.call is not None
            return {"type": "tool_use", "id": item.call.id, "name": item.call.name, "input": _input(text)}


def _input(arguments: str) -> Any:
    """Arguments as an object; those that are cut off or no object as a text in one."""
    try:
        value = orjson.loads(arguments or b"{}")
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _stop(items: Sequence[Item], output: Output) -> dict[str, Any]:
    """Why the message ended."""
    sequence = output.stop_reason if isinstance(output.stop_reason, str) else None
    if output.finish_reason == "length":
        reason = "max_tokens"
    elif any(item.kind == "call" for item in items):
        reason = "tool_use"
    else:
        reason = "stop_sequence" if sequence else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(job: TranslatedJob, cached_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Anthropic counts cached tokens apart from the others of the prompt."""
    return {
        "input_tokens": job.prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _prompt(body: MessagesPromptFields, context: Context) -> dict[str, Any]:
    """Fields of a chat. An assistant's message at the end is continued."""
    variables = body.chat_template_kwargs
    check_levels({"messages": body.messages, "system": body.system, "chat_template_kwargs": variables})
    messages, unread = chat_messages(body)
    check_extra(unread, (), context.unknown_fields, "messages[].content[].")
    tools = [tool.model_dump() for tool in body.tools or ()]
    check_levels({"tools": tools})
    for tool in body.tools or ():
        check_extra(tool.model_extra or {}, AnthropicTool.model_fields, context.unknown_fields, "tools[].")
    thinking = body.thinking
    if thinking is not None and (thinking.type == "enabled") == (thinking.budget_tokens is None):
        message = "`thinking.budget_tokens` is needed for the type enabled, and for no other."
        raise invalid("thinking.budget_tokens", message)
    prefilled = messages[-1]["role"] == "assistant"
    return {
        "messages": messages,
        "continue_final_message": prefilled or None,
        "chat_template_kwargs": variables,
        "enable_thinking": _THINKS.get(thinking.type) if thinking else None,
        "tools": [tool.chat_form for tool in body.tools] if body.tools else None,
        "reasoning_effort": body.output_config.effort if body.output_config else None,
        **chat_choice(body.tool_choice),
    }


class CountTokens:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, request: Request) -> Response:
        async with self._context.bodies.read(request) as data:
            return await asyncio.to_thread(self._count, data)

    def _count(self, data: bytes) -> Response:
        context = self._context
        body = validate(CountTokensRequest, json_object(data), context.unknown_fields)
        served_name(body.model, context.model.names)
        fields = _prompt(body, context)
        with renamed(Messages.renames):
            text = chat_text(validate(ChatPromptFields, fields, context.unknown_fields), context)
            check_size("messages", text, context.engine.limits)
            return json_response({"input_tokens": len(context.chat_format.encode(text))})
