"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve.openai.body import Body, make_body
from serve.openai.checks import check_common, check_logprob_token_ids, check_room, check_top_k
from serve.openai.endpoint import Endpoint, Header, Usage, usage_of, wants_usage
from serve.openai.errors import invalid, unsupported
from serve.openai.generation import Choice, Delta, Finished, finish_all, merge
from serve.openai.job import Job, Prompt, make_job
from serve.openai.logprobs import chat_content
from serve.openai.prompt_numbers import prompt_numbers
from serve.openai.schema import ChatCompletionRequest, ChatMessage, parse, read_body
from serve.openai.stream import json_or_disconnect, stream_or_disconnect
from serve.text.chat_template import ChatTemplateError
from serve.text.tokenizer import TokenizerError

type _Job = Job[ChatCompletionRequest]

_ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatCompletions:
    """The endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._at = endpoint

    async def __call__(self, request: Request) -> Response:
        """Answers with JSON, or with server-sent events where `stream` is true."""
        data = await read_body(request, self._at.config.max_body_bytes)
        job = await asyncio.to_thread(self._prepare, data, request.headers.get("x-request-id"))
        abort = self._at.abort_all(job.request_ids)
        if job.body.stream:
            return await stream_or_disconnect(request, self._chunks(job), abort)
        return await json_or_disconnect(request, self._answer(job), abort)

    def _prepare(self, data: bytes, request_id: str | None) -> _Job:
        at, limits = self._at, self._at.engine.limits
        body = parse(ChatCompletionRequest, data, at.fields)
        check_common(body)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        if body.echo:
            raise unsupported("echo", "`echo` is not supported on chat; use /v1/completions.")
        check_top_k("top_logprobs", body.top_logprobs or 0, limits)
        check_logprob_token_ids(body, shown=bool(body.logprobs), limits=limits)
        numbers = prompt_numbers(body, None, limits)
        name = at.model_name(body.model)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        header = Header.make("chatcmpl", kind, name, at.config.system_fingerprint, request_id)
        ids = self._prompt(body)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        room = check_room("messages", len(ids), asked, limits)
        return make_job(at, body, header, [Prompt(ids)], max_tokens=[room], top_k=body.top_logprobs, numbers=numbers)

    def _prompt(self, body: ChatCompletionRequest) -> list[int]:
        if not body.messages:
            raise invalid("messages", "`messages` must hold at least one message.", "empty_array")
        continues = bool(body.continue_final_message)
        # Both true is a contradiction unless the first is only a default.
        generates = not continues if body.add_generation_prompt is None else body.add_generation_prompt
        if continues and generates:
            message = "`continue_final_message` and `add_generation_prompt` cannot both be true."
            raise invalid("continue_final_message", message)
        messages = [_message(message, i) for i, message in enumerate(body.messages)]
        try:
            text = self._at.tokenizer.render_chat(
                messages,
                add_generation_prompt=generates,
                continue_final_message=continues,
                chat_template_kwargs=body.chat_template_kwargs or {},
                chat_template=self._at.config.chat_template,
            )
            ids = self._at.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
        except ChatTemplateError as error:
            raise invalid("messages", f"The chat template refused the messages: {error}") from None
        except TokenizerError as error:
            raise invalid("messages", str(error)) from None
        if not ids:
            raise invalid("messages", "The messages give an empty prompt.")
        return ids

    async def _answer(self, job: _Job) -> Body:
        results = await finish_all(job.choices, self._at.engine, self._at.tokenizer)
        return await asyncio.to_thread(self._body, job, results)

    def _body(self, job: _Job, results: Sequence[Finished]) -> Body:
        answer = job.header.fields() | {
            "choices": [self._choice(job, result) for result in results],
            "usage": usage_of(results).fields(),
            "prompt_token_ids": job.prompts[0].ids if job.body.return_token_ids else None,
            "prompt_logprobs": job.prompt_logprobs(0, results[0].prompt_scores),
        }
        return make_body(answer)

    def _choice(self, job: _Job, result: Finished) -> dict[str, Any]:
        logprobs = None
        if job.body.logprobs:
            content = chat_content(job.names, result.token_ids, result.all_scores(), job.alternatives)
            logprobs = {"content": content, "refusal": None}
        return {
            "index": result.choice.index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "token_ids": result.token_ids if job.body.return_token_ids else None,
        }

    async def _chunks(self, job: _Job) -> AsyncGenerator[dict[str, Any]]:
        usage = Usage.of_prompts(job.choices)
        final, continuous = wants_usage(job.body)
        opened: set[int] = set()
        async with aclosing(merge(job.choices, self._at.engine, self._at.tokenizer)) as deltas:
            async for choice, delta in deltas:
                if choice.index not in opened:
                    opened.add(choice.index)
                    usage.open(choice, delta)
                    opening = await self._opening(job, choice, delta)
                    yield opening | ({"usage": usage.fields()} if continuous else {})
                usage.completion_tokens += len(delta.token_ids)
                chunk = job.header.fields() | {"choices": [self._delta(job, choice, delta)]}
                yield chunk | ({"usage": usage.fields()} if continuous else {})
        if final:
            yield job.header.fields() | {"choices": [], "usage": usage.fields()}

    async def _opening(self, job: _Job, choice: Choice, delta: Delta) -> dict[str, Any]:
        """The chunk that opens a choice: its role; the prompt's ids and, with the first, its numbers."""
        opening = {"role": "assistant", "content": ""}
        chunk = job.header.fields() | {
            "choices": [{"index": choice.index, "delta": opening, "logprobs": None, "finish_reason": None}]
        }
        if job.body.return_token_ids:
            chunk["prompt_token_ids"] = job.prompts[0].ids
        if choice.first and job.numbers.shown is not None:
            chunk["prompt_logprobs"] = await asyncio.to_thread(job.prompt_logprobs, 0, delta.prompt_scores)
        return chunk

    def _delta(self, job: _Job, choice: Choice, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": choice.index, "delta": {"content": delta.text}, "logprobs": None}
        if job.body.logprobs:
            content = chat_content(job.names, delta.token_ids, delta.scores, job.alternatives)
            fields["logprobs"] = {"content": content}
        fields["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            fields["stop_reason"] = delta.stop_reason
        if job.body.return_token_ids:
            fields["token_ids"] = delta.token_ids
        return fields


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message for the template, its text parts joined."""
    where = f"messages[{index}]"
    if message.role not in _ROLES:
        raise invalid(f"{where}.role", f"`{where}.role` must be one of {', '.join(_ROLES)}.")
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and message.role != "assistant":
        raise invalid(f"{where}.content", f"`{where}.content` is missing.", "missing_required_parameter")
    return {"role": message.role, "content": content, **(message.model_extra or {})}


def _part(part: dict[str, Any], where: str) -> str:
    if part.get("type") != "text":
        raise unsupported(f"{where}.type", f"`{where}.type`: only parts of type text are supported.")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text", f"`{where}.text` must be a string.", "invalid_type")
    return text
