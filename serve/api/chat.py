"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from serve.api.chat_prompt import chat_prompt
from serve.api.context import Usage, usage_of
from serve.api.errors import invalid
from serve.api.generation import Choice, Delta, Finished, finish_all
from serve.api.handler import Answering
from serve.api.job import Job, make_job
from serve.api.json_stream import Body, make_body
from serve.api.logprobs import chat_content
from serve.api.middleware import AnswerRecord
from serve.api.parsing import parse
from serve.api.requests import ChatCompletionRequest
from serve.api.validation import (
    check_common,
    check_logprob_token_ids,
    check_prompt_logprobs,
    check_top_k,
    prompt_numbers,
)

type _Job = Job[ChatCompletionRequest]


class ChatCompletions(Answering[ChatCompletionRequest]):
    """The endpoint."""

    def _prepare(self, data: bytes, record: AnswerRecord) -> _Job:
        at, limits = self._at, self._at.engine.limits
        body = at.filled(parse(ChatCompletionRequest, data, at.fields))
        check_common(body)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        check_top_k("top_logprobs", body.top_logprobs or 0, limits)
        check_logprob_token_ids(body, shown=bool(body.logprobs), limits=limits)
        numbers = prompt_numbers(body, None, limits)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        header = at.header("chatcmpl", kind, body, record.request_id)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        prompt, room = chat_prompt(body, asked, at)
        check_prompt_logprobs(numbers, [prompt.ids], 1, limits)
        usual = at.model.defaults.max_new_tokens
        if asked is None and usual is not None:
            room = min(room, usual)
        shown = body.top_logprobs or 0 if body.logprobs else None
        return make_job(at, body, record, header, [prompt], max_tokens=[room], top_k=shown, numbers=numbers)

    async def _answer(self, job: _Job) -> Body:
        results = await finish_all(job.choices, job.deltas())
        return await asyncio.to_thread(self._body, job, results)

    def _body(self, job: _Job, results: Sequence[Finished]) -> Body:
        answer = job.header.fields() | {
            "choices": [self._choice(job, result) for result in results],
            "usage": usage_of(results).fields(),
            "prompt_token_ids": job.prompts[0].ids if job.body.return_token_ids else None,
        }
        if job.body.return_prompt_text:
            answer["prompt_text"] = job.prompts[0].text
        return make_body(answer | job.prompt_fields(0, results[0].prompt_scores))

    def _choice(self, job: _Job, result: Finished) -> dict[str, Any]:
        logprobs = None
        if job.body.logprobs:
            content = chat_content(job.names, result.token_ids, result.all_scores(), job.alternatives)
            logprobs = {"content": content, "refusal": None}
        return {
            "index": result.choice.index,
            "message": {
                "role": self._at.config.response_role,
                "content": job.prompts[0].echo + result.text,
                "refusal": None,
            },
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "token_ids": result.token_ids if job.body.return_token_ids else None,
        }

    async def _chunks(self, job: _Job) -> AsyncGenerator[dict[str, Any]]:
        usage = Usage.of_prompts(job.choices)
        final, continuous = self._at.wants_usage(job.body)
        opened: set[int] = set()
        async with aclosing(job.deltas()) as deltas:
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
        opening = {"role": self._at.config.response_role, "content": job.prompts[0].echo}
        chunk = job.header.fields() | {
            "choices": [{"index": choice.index, "delta": opening, "logprobs": None, "finish_reason": None}]
        }
        if job.body.return_token_ids:
            chunk["prompt_token_ids"] = job.prompts[0].ids
        if job.body.return_prompt_text:
            chunk["prompt_text"] = job.prompts[0].text
        if choice.first and job.numbers.shown is not None:
            chunk |= await asyncio.to_thread(job.prompt_fields, 0, delta.prompt_scores)
        return chunk

    def _delta(self, job: _Job, choice: Choice, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": choice.index, "delta": {"content": delta.text}, "logprobs": None}
        if job.body.logprobs:
            content = chat_content(job.names, delta.token_ids, delta.scores, job.alternatives)
            fields["logprobs"] = {"content": content, "refusal": None}
        fields["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            fields["stop_reason"] = delta.stop_reason
        if job.body.return_token_ids:
            fields["token_ids"] = delta.token_ids
        return fields
