"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve.engine.request import TokenScores
from serve.openai.checks import check_room, check_stream_options, check_top_k, prompt_top_k
from serve.openai.endpoint import Endpoint, Header, Usage, usage_of, wants_usage
from serve.openai.errors import invalid, unsupported
from serve.openai.generation import (
    Choice,
    Delta,
    Finished,
    finish_all,
    make_choices,
    merge,
)
from serve.openai.logprobs import TokenNames, chat_content, prompt_logprobs
from serve.openai.schema import ChatCompletionRequest, ChatMessage, parse, read_body
from serve.openai.stream import dump, json_or_disconnect, stream_or_disconnect
from serve.text.chat_template import ChatTemplateError
from serve.text.tokenizer import TokenizerError

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request."""

    body: ChatCompletionRequest
    header: Header
    choices: list[Choice]
    names: TokenNames
    prompt_k: int | None

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.choices[0].request.prompt_token_ids


class ChatCompletions:
    """The endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._at = endpoint

    async def __call__(self, request: Request) -> Response:
        """Answers with JSON, or with server-sent events where `stream` is true."""
        data = await read_body(request, self._at.config.max_body_bytes)
        job = await asyncio.to_thread(self._prepare, data, request.headers.get("x-request-id"))
        if job.body.stream:
            return await stream_or_disconnect(request, self._chunks(job), self._at.abort_all(job.choices))
        return await json_or_disconnect(request, self._answer(job))

    def _prepare(self, data: bytes, request_id: str | None) -> _Job:
        at, limits = self._at, self._at.engine.limits
        body = parse(ChatCompletionRequest, data, at.fields)
        check_stream_options(body)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        if body.echo:
            raise unsupported("echo", "`echo` is not supported on chat; use /v1/completions.")
        check_top_k("top_logprobs", body.top_logprobs or 0, limits)
        prompt_k = prompt_top_k(body, limits)
        name = at.model_name(body.model)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        ids = self._prompt(body)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        choices = make_choices(
            body,
            [ids],
            [check_room("messages", len(ids), asked, limits)],
            score_prompts=prompt_k is not None,
            limits=limits,
            tokenizer=at.tokenizer,
        )
        header = Header.make("chatcmpl", kind, name, at.config.system_fingerprint, request_id)
        return _Job(body, header, choices, TokenNames(at.tokenizer, bool(body.return_tokens_as_token_ids)), prompt_k)

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

    async def _answer(self, job: _Job) -> bytes:
        results = await finish_all(job.choices, self._at.engine, self._at.tokenizer)
        return await asyncio.to_thread(self._body, job, results)

    def _body(self, job: _Job, results: Sequence[Finished]) -> bytes:
        answer = job.header.fields() | {
            "choices": [self._choice(job, result) for result in results],
            "usage": usage_of(results).fields(),
            "prompt_token_ids": job.prompt_token_ids if job.body.return_token_ids else None,
            "prompt_logprobs": self._prompt_logprobs(job, results[0].prompt_scores),
        }
        return dump(answer)

    def _choice(self, job: _Job, result: Finished) -> dict[str, Any]:
        logprobs = None
        if job.body.logprobs:
            content = chat_content(job.names, result.token_ids, result.all_scores(), job.body.top_logprobs or 0)
            logprobs = {"content": content, "refusal": None}
        return {
            "index": result.choice.index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "token_ids": result.token_ids if job.body.return_token_ids else None,
        }

    def _prompt_logprobs(self, job: _Job, scores: TokenScores | None) -> list[Any] | None:
        if job.prompt_k is None or scores is None:
            return None
        return prompt_logprobs(self._at.tokenizer, job.prompt_token_ids, scores, job.prompt_k)

    async def _chunks(self, job: _Job) -> AsyncGenerator[dict[str, Any]]:
        usage = Usage.of_prompts(job.choices)
        final, continuous = wants_usage(job.body)
        opened: set[int] = set()
        async for choice, delta in merge(job.choices, self._at.engine, self._at.tokenizer):
            if choice.index not in opened:
                opened.add(choice.index)
                opening = await self._opening(job, choice, delta)
                yield opening | ({"usage": usage.fields()} if continuous else {})
            usage.completion_tokens += len(delta.token_ids)
            chunk = job.header.fields() | {"choices": [self._delta(job, choice, delta)]}
            yield chunk | ({"usage": usage.fields()} if continuous else {})
        if final:
            yield job.header.fields() | {"choices": [], "usage": usage.fields()}

    async def _opening(self, job: _Job, choice: Choice, delta: Delta) -> dict[str, Any]:
        """The chunk that opens a choice: its role; the prompt's ids and numbers come with the first."""
        opening = {"role": "assistant", "content": ""}
        chunk = job.header.fields() | {
            "choices": [{"index": choice.index, "delta": opening, "logprobs": None, "finish_reason": None}]
        }
        if job.body.return_token_ids:
            chunk["prompt_token_ids"] = job.prompt_token_ids
        if delta.prompt_scores is not None and job.prompt_k is not None:
            chunk["prompt_logprobs"] = await asyncio.to_thread(self._prompt_logprobs, job, delta.prompt_scores)
        return chunk

    def _delta(self, job: _Job, choice: Choice, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": choice.index, "delta": {"content": delta.text}, "logprobs": None}
        if job.body.logprobs:
            content = chat_content(job.names, delta.token_ids, delta.scores, job.body.top_logprobs or 0)
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
