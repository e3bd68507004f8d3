"""POST /v1/responses, and GET and DELETE of stored responses."""

import asyncio
import re
import uuid
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve.api.context import Context
from serve.api.errors import APIError, invalid, unsupported
from serve.api.json_stream import json_response
from serve.api.middleware import AnswerRecord, record_of
from serve.api.parsing import check_extra, check_levels, validate
from serve.api.responses_api.input_items import chat_messages, listed, read_input, unread_fields
from serve.api.responses_api.requests import LOGPROBS, ResponsesRequest, ResponsesTool, chat_choice
from serve.api.responses_api.store import ResponseStore, StoredResponse
from serve.api.responses_api.writer import ResponseSource, ResponseWriter
from serve.api.translation import TranslatedChat, TranslatedHandler, TranslatedJob, Translation

_FLAG = "start the server with --response-store"
_MAX_LISTED, _DEFAULT_LISTED = 100, 20  # items of a page
_METADATA = (16, 64, 512)  # pairs, characters of a key and of a value


class Responses(TranslatedHandler):
    renames = (
        (r"^messages.*", "input"),
        (r"^(max_tokens|max_completion_tokens)$", "max_output_tokens"),
        (r"^response_format(\.json_schema)?", "text.format"),
        (r"^reasoning_effort$", "reasoning.effort"),
        (r"^tools\[(\d+)\]\.function", r"tools[\1]"),
        (r"^tool_choice\.function", "tool_choice"),
        (r"^tool_choice\.allowed_tools\.tools\[(\d+)\]\.function", r"tool_choice.tools[\1]"),
        (r"^tool_choice\.allowed_tools", "tool_choice"),
    )

    def __init__(self, context: Context, store: ResponseStore | None) -> None:
        super().__init__(context)
        self._store = store

    def _translated(self, data: dict[str, Any], record: AnswerRecord) -> Translation:
        unknown = self._context.unknown_fields
        body = validate(ResponsesRequest, data, unknown)
        names = ("input", "metadata", "chat_template_kwargs", "tools", "tool_choice")
        check_levels({name: data.get(name) for name in names})
        for tool in body.tools or ():
            check_extra(tool.model_extra or {}, ResponsesTool.model_fields, unknown, "tools[].")
        _check_metadata(body.metadata or {})
        items = read_input(body.input)
        earlier = self._earlier(body, record)
        messages = chat_messages(earlier + items, stored=len(earlier))
        for prefix, unread in zip(("input[].", "input[].content[]."), unread_fields(items), strict=True):
            check_extra(unread, (), unknown, prefix)
        instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
        with_logprobs = LOGPROBS in (body.include or ())
        if body.top_logprobs and not with_logprobs:
            raise invalid("top_logprobs", f"`top_logprobs` needs {LOGPROBS!r} in `include`.")
        fields = {
            "messages": instructions + messages,
            "stop": body.stop,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": with_logprobs,
            "top_logprobs": body.top_logprobs,
            "response_format": body.text.chat_form if body.text else None,
            "structured_outputs": body.structured_outputs,
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "chat_template_kwargs": body.chat_template_kwargs,
            "tools": [tool.chat_form for tool in body.tools] if body.tools else None,
            "tool_choice": chat_choice(body.tool_choice),
            "parallel_tool_calls": body.parallel_tool_calls,
        }
        # Not needed while the response is generated.
        body.input = body.chat_template_kwargs = body.structured_outputs = None
        kept = orjson.dumps(earlier + items) if self._stores(body) else None
        return Translation(body, fields, ResponseSource(body, record.owner, kept))

    def _stores(self, body: ResponsesRequest) -> bool:
        if body.store and self._store is None:
            raise invalid("store", f"`store` needs a store of responses: {_FLAG}.", "unsupported_parameter")
        return body.store is True

    def _earlier(self, body: ResponsesRequest, record: AnswerRecord) -> list[dict[str, Any]]:
        """The items of the previous response: its input and its output."""
        previous = body.previous_response_id
        if previous is None:
            return []
        if self._store is None:
            message = f"`previous_response_id` needs a store of responses: {_FLAG}."
            raise invalid("previous_response_id", message, "unsupported_parameter")
        stored = self._store.get(record.owner, previous)
        if stored is None:
            message = f"The previous response with the id {previous[:200]!r} is not stored."
            raise invalid("previous_response_id", message, "previous_response_not_found")
        items: list[dict[str, Any]] = orjson.loads(stored.items)
        return items + [_without_logprobs(item) for item in orjson.loads(stored.response)["output"]]

    def _header(self, body: TranslatedChat, record: AnswerRecord) -> dict[str, Any]:
        header = super()._header(body, record)
        response_id = f"resp_{uuid.uuid4().hex}"
        record.generation["gen_ai.response.id"] = response_id
        created = header.pop("created")
        return header | {"id": response_id, "object": "response", "created_at": created}

    def _writer(self, job: TranslatedJob) -> ResponseWriter:
        return ResponseWriter(job, self._store)


def _without_logprobs(item: dict[str, Any]) -> dict[str, Any]:
    content = item.get("content") or ()
    parts = [{name: value for name, value in part.items() if name != "logprobs"} for part in content]
    others = {name: value for name, value in item.items() if name not in ("logprobs", "call_logprobs")}
    return others | ({"content": parts} if parts else {})


def _check_metadata(metadata: dict[str, Any]) -> None:
    pairs, key_length, value_length = _METADATA
    if len(metadata) > pairs:
        raise invalid("metadata", f"`metadata` has more than {pairs} keys.", "object_above_max_properties")
    if any(len(key) > key_length for key in metadata):
        raise invalid("metadata", f"`metadata` has a key of more than {key_length} characters.")
    if any(not isinstance(value, str) or len(value) > value_length for value in metadata.values()):
        raise invalid("metadata", f"The values of `metadata` must be strings of at most {value_length} characters.")


class StoredResponses:
    """GET and DELETE of stored responses, and GET of their input items."""

    def __init__(self, store: ResponseStore | None) -> None:
        self._store = store

    async def retrieve(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") != "false":
            raise unsupported("stream", "`stream` of a stored response is not supported.")
        return Response((await self._find(request)).response, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        store, response_id = self._store_of(request), request.path_params["id"]
        if not await asyncio.to_thread(store.delete, record_of(request).owner, response_id):
            raise _not_found(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """A page of the items, the latest first unless `order` is "asc"."""
        limit, order, after = _page(request)
        items = [listed(item) for item in orjson.loads((await self._find(request)).items)]
        if order == "desc":
            items.reverse()
        if after is not None:
            indices = [i for i, item in enumerate(items) if item["id"] == after]
            if not indices:
                raise invalid("after", f"`after`: no item has the id {after[:200]!r}.")
            items = items[indices[0] + 1 :]
        page = items[:limit]
        ids = [item["id"] for item in page] or [None]
        more = {"first_id": ids[0], "last_id": ids[-1], "has_more": len(items) > limit}
        return json_response({"object": "list", "data": page} | more)

    async def _find(self, request: Request) -> StoredResponse:
        store, response_id = self._store_of(request), request.path_params["id"]
        stored = await asyncio.to_thread(store.get, record_of(request).owner, response_id)
        if stored is None:
            raise _not_found(response_id)
        return stored

    def _store_of(self, request: Request) -> ResponseStore:
        if self._store is None:
            message = f"Responses are not stored: {_FLAG}, and send `store`."
            raise APIError(404, message, "id", "response_not_found")
        del request
        return self._store


def _page(request: Request) -> tuple[int, str, str | None]:
    """`limit`, `order` and `after` of a query."""
    query = request.query_params
    limit, order = query.get("limit", str(_DEFAULT_LISTED)), query.get("order", "desc")
    if not re.fullmatch(r"\d{1,3}", limit) or not 1 <= int(limit) <= _MAX_LISTED:
        raise invalid("limit", f"`limit` must be from 1 to {_MAX_LISTED}.")
    if order not in ("asc", "desc"):
        raise invalid("order", "`order` must be asc or desc.")
    return int(limit), order, query.get("after")


def _not_found(response_id: str) -> APIError:
    return APIError(404, f"No response with the id {response_id[:200]!r} is stored.", "id", "response_not_found")
