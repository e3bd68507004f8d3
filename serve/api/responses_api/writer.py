"""ResponseWriter: a response of OpenAI's Responses API, and the events of its stream."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.json_stream import dump
from serve.api.responses_api.requests import ResponsesRequest
from serve.api.responses_api.store import ResponseStore, StoredResponse
from serve.api.translation import Item, TranslatedJob, item_logprobs, warnings_of
from serve.jobs.output import Output

_EVENTS = {"content": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


@dataclass(slots=True)
class ResponseSource:
    """What a response needs of its request."""

    body: ResponsesRequest
    owner: str
    items: bytes | None  # JSON of the items to store


class ResponseWriter:
    """Writes one response."""

    def __init__(self, job: TranslatedJob, store: ResponseStore | None) -> None:
        self._job = job
        self._call: ResponseSource = job.body.source
        self._store = store
        self._number = 0  # of events
        self._done: list[dict[str, Any]] = []  # items
        self._id = job.header["id"].removeprefix("resp_")

    def start(self, cached_tokens: int) -> Iterator[dict[str, Any]]:
        del cached_tokens
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def open(self, item: Item) -> Iterator[dict[str, Any]]:
        added = self._item(item, "in_progress", "", {})
        if item.kind != "call":
            added["content"] = []
        yield self._event("response.output_item.added", output_index=item.index, item=added)
        if item.kind == "content":
            yield self._part_event(item, "response.content_part.added", part=_text_part("", []))

    def extend(self, item: Item, text: str, logprobs: Any) -> Iterator[dict[str, Any]]:
        event = self._part_event(item, f"response.{_EVENTS[item.kind]}.delta", delta=text)
        yield event | ({} if logprobs is None and item.kind != "content" else {"logprobs": logprobs or []})

    def close(self, item: Item, output: Output) -> Iterator[dict[str, Any]]:
        done, name = self._complete(item, output), f"response.{_EVENTS[item.kind]}.done"
        match item.kind:
            case "content":
                [part] = done["content"]
                yield self._part_event(item, name, text=item.text, logprobs=part["logprobs"])
                yield self._part_event(item, "response.content_part.done", part=part)
            case "reasoning":
                yield self._part_event(item, name, text=item.text)
            case "call":
                yield self._part_event(item, name, name=done["name"], arguments=item.text)
        yield self._event("response.output_item.done", output_index=item.index, item=done)

    def end(self, items: Sequence[Item], output: Output) -> Iterator[dict[str, Any]]:
        yield from self.close(items[-1], output)
        response = self._final(items, output)
        yield self._event(f"response.{response['status']}", response=response)

    def document(self, items: Sequence[Item], output: Output) -> dict[str, Any]:
        for item in items:
            self._complete(item, output)
        return self._final(items, output)

    def _complete(self, item: Item, output: Output) -> dict[str, Any]:
        """The item as the response contains it."""
        cut = output.finish_reason == "length" and item.tokens.stop == len(output.token_ids)
        cut = cut or (item.kind == "call" and item.end is None)
        logprobs = item_logprobs(self._job, item, output)
        self._done.append(self._item(item, "incomplete" if cut else "completed", item.text, logprobs))
        return self._done[-1]

    def _final(self, items: Sequence[Item], output: Output) -> dict[str, Any]:
        """The finished response, stored."""
        cut = output.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed") | {"usage": _usage(self._job, items, output)}
        if self._store is not None and self._call.items is not None:
            self._store.put(self._call.owner, response["id"], StoredResponse(dump(response), self._call.items))
        return response

    def _item(self, item: Item, status: str, text: str, logprobs: dict[str, Any]) -> dict[str, Any]:
        """OpenAI has a place for the log-probs of messages alone; other items have them in fields of their own."""
        fields: dict[str, Any] = {"id": self._item_id(item), "status": status}
        match item.kind:
            case "content":
                content = [_text_part(text, logprobs.get("logprobs", []))]
                return {"type": "message", **fields, "role": "assistant", "content": content}
            case "reasoning":
                content = [{"type": "reasoning_text", "text": text}]
                return {"type": "reasoning", **fields, "summary": [], "content": content} | logprobs
            case "call":
                assert item.call is not None
                call = {"call_id": item.call.id, "name": item.call.name, "arguments": text}
                return {"type": "function_call", **fields, **call} | logprobs

    def _item_id(self, item: Item) -> str:
        prefix = {"content": "msg", "reasoning": "rs", "call": "fc"}[item.kind]
        return f"{prefix}_{self._id}_{item.index}"

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1} | fields

    def _part_event(self, item: Item, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self._item_id(item), "output_index": item.index}
        return self._event(kind, **place, **({} if item.kind == "call" else {"content_index": 0}), **fields)

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._call.body, self._job.choices[0].request.params
        return self._job.header | {
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": [*self._done],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self._call.items is not None,
            "temperature": params.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **warnings_of(self._job),
        }


def _text_part(text: str, logprobs: Any) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(job: TranslatedJob, items: Sequence[Item], output: Output) -> dict[str, Any]:
    prompt, generated = job.prompt_tokens, len(output.token_ids)
    thought = sum(len(item.tokens) for item in items if item.kind == "reasoning")
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": output.cached_tokens,
            "cache_write_tokens": prompt - output.cached_tokens,
        },
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": prompt + generated,
    }
