"""POST /v1/completions: the place for echo, for prompts of token ids and for lists of prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from serve.api.context import Usage, usage_of
from serve.api.errors import engine_error, invalid
from serve.api.generation import Choice, Delta, Finished, finish_all
from serve.api.handler import Answering
from serve.api.job import Job, Prompt, make_job
from serve.api.json_stream import Body, Hole, dump, make_body
from serve.api.logprobs import CompletionLogprobs, joined
from serve.api.middleware import AnswerRecord
from serve.api.parsing import parse
from serve.api.requests import CompletionRequest
from serve.api.validation import (
    check_answers,
    check_common,
    check_length,
    check_logprob_token_ids,
    check_number_of_ids,
    check_prompt_logprobs,
    check_top_k,
    prompt_numbers,
    truncated,
)
from serve.engine.request import TokenScores
from serve.text.chat import encode_text, generation_room

type _Job = Job[CompletionRequest]

_MAX_PROMPTS = 2048
_DEFAULT_MAX_TOKENS = 16


class Completions(Answering[CompletionRequest]):
    """The endpoint."""

    def _prepare(self, data: bytes, record: AnswerRecord) -> _Job:
        at, limits = self._at, self._at.engine.limits
        body = at.filled(parse(CompletionRequest, data, at.fields))
        check_common(body)
        check_top_k("logprobs", body.logprobs or 0, limits)
        check_logprob_token_ids(body, shown=body.logprobs is not None, limits=limits)
        numbers = prompt_numbers(body, body.logprobs if body.echo else None, limits)
        header = at.header("cmpl", "text_completion", body, record.request_id)
        asked = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        prompts = [self._truncated(body, prompt, asked) for prompt in self._prompts(body)]
        room = [generation_room("prompt", len(prompt.ids), asked, limits) for prompt in prompts]
        copies = 1 if body.stream else body.n or 1  # a choice of a stream is sent before the next one is written
        check_prompt_logprobs(numbers, [prompt.ids for prompt in prompts], copies, limits)
        return make_job(at, body, record, header, prompts, max_tokens=room, top_k=body.logprobs, numbers=numbers)

    def _prompts(self, body: CompletionRequest) -> list[Prompt]:
        given = body.prompt
        if given is None or given in ("", []):
            raise invalid("prompt", "`prompt` must not be empty.", "missing_required_parameter")
        if isinstance(given, str):
            return [self._text_prompt(body, given, "prompt")]
        if not isinstance(given, list):
            raise invalid("prompt", "`prompt` must be a string, token ids, or a list of either.", "invalid_type")
        if isinstance(given[0], int):
            return [self._id_prompt(body, given, "prompt")]
        if len(given) > _MAX_PROMPTS:
            raise invalid("prompt", f"`prompt` holds more than {_MAX_PROMPTS} prompts.", "array_above_max_length")
        check_answers(len(given), body.n or 1)
        return [
            self._text_prompt(body, one, f"prompt[{i}]")
            if isinstance(one, str)
            else self._id_prompt(body, one, f"prompt[{i}]")
            for i, one in enumerate(given)
        ]

    def _text_prompt(self, body: CompletionRequest, text: str, where: str) -> Prompt:
        tokenizer = self._at.tokenizer
        check_length(where, text, body, tokenizer, self._at.engine.limits)
        ids = encode_text(tokenizer, text, add_special_tokens=body.add_special_tokens is not False, param=where)
        if not ids:
            raise invalid(where, f"`{where}` gives no tokens.")
        added = tokenizer.is_special(ids[0]) and not text.startswith(tokenizer.token_text(ids[0]))
        return Prompt(ids, text, [added] + [False] * (len(ids) - 1))

    def _id_prompt(self, body: CompletionRequest, ids: Any, where: str) -> Prompt:
        vocabulary = self._at.engine.limits.vocab_size
        if not isinstance(ids, list) or not ids:
            raise invalid(where, f"`{where}` must be a string or a non-empty list of token ids.", "invalid_type")
        check_number_of_ids(where, ids, body, self._at.engine.limits)
        for i, token_id in enumerate(ids):
            if type(token_id) is not int:
                raise invalid(f"{where}[{i}]", f"`{where}[{i}]` must be a token id.", "invalid_type")
            if not 0 <= token_id < vocabulary:
                raise invalid(f"{where}[{i}]", f"`{where}[{i}]` is not in the vocabulary of {vocabulary} tokens.")
        return self._read_back(body, ids)

    def _truncated(self, body: CompletionRequest, prompt: Prompt, asked: int) -> Prompt:
        ids = truncated(prompt.ids, body, asked, self._at.engine.limits)
        return prompt if len(ids) == len(prompt.ids) else self._read_back(body, ids)

    def _read_back(self, body: CompletionRequest, ids: list[int]) -> Prompt:
        """A prompt whose text is what its ids read."""
        skips = body.skip_special_tokens is not False
        hidden = [skips and self._at.tokenizer.is_special(token_id) for token_id in ids]
        text = self._at.tokenizer.decode(ids, skip_special_tokens=skips) if body.echo else ""
        return Prompt(ids, text, hidden)

    async def _answer(self, job: _Job) -> Body:
        results = await finish_all(job.choices, job.deltas())
        return await asyncio.to_thread(self._body, job, results)

    def _body(self, job: _Job, results: Sequence[Finished]) -> Body:
        choices: list[dict[str, Any]] = []
        shown: dict[str, orjson.Fragment | Hole | None] = {}
        scores: TokenScores | None = None
        for result in results:
            if result.choice.first:  # it has the prompt's scores, which are written once for all its choices
                scores = result.prompt_scores
                fields = job.prompt_fields(result.choice.prompt_index, scores)
                shown = {name: _written(numbers) for name, numbers in fields.items()}
            choices.append(self._choice(job, result, scores) | shown)
            if job.numbers.whole:  # too large to be repeated
                shown = dict.fromkeys(shown)
        return make_body(job.header.fields() | {"choices": choices, "usage": usage_of(results).fields()})

    def _choice(self, job: _Job, result: Finished, scores: TokenScores | None) -> dict[str, Any]:
        prompt, logprobs = job.prompt(result.choice), None
        if job.body.logprobs is not None:
            columns = self._columns(job)
            echo = self._echo(job, columns, prompt, scores)
            output = columns.output(result.token_ids, result.all_scores())
            logprobs = output if echo is None else joined([echo, output])
        return {
            "index": result.choice.index,
            "text": (prompt.text if job.body.echo else "") + result.text,
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "prompt_token_ids": prompt.ids if job.body.return_token_ids else None,
            "token_ids": result.token_ids if job.body.return_token_ids else None,
        }

    def _columns(self, job: _Job) -> CompletionLogprobs:
        skips = job.body.skip_special_tokens is not False
        return CompletionLogprobs(job.names, job.alternatives, skip_special_tokens=skips)

    def _echo(
        self, job: _Job, columns: CompletionLogprobs, prompt: Prompt, scores: TokenScores | None
    ) -> dict[str, Any] | None:
        """The columns of an echoed prompt, None where there are none. They come before the output's."""
        k, start = job.numbers.echoed, job.numbers.start
        if k is None:
            return None
        if scores is None:
            raise engine_error("The engine returned no log-probabilities of the prompt.")
        return columns.echo(prompt.ids, scores, prompt.text, prompt.hidden, k=k, start=start)

    async def _chunks(self, job: _Job) -> AsyncGenerator[dict[str, Any]]:
        usage = Usage.of_prompts(job.choices)
        final, continuous = self._at.wants_usage(job.body)
        columns: dict[int, CompletionLogprobs] = {}
        scores: dict[int, TokenScores | None] = {}  # by prompt; its first choice opens first and brings them
        async with aclosing(job.deltas()) as deltas:
            async for choice, delta in deltas:
                usage.completion_tokens += len(delta.token_ids)
                if choice.index in columns:
                    fields = self._delta(job, delta, columns[choice.index])
                else:
                    usage.open(choice, delta)
                    columns[choice.index] = self._columns(job)
                    shared = scores.setdefault(choice.prompt_index, delta.prompt_scores)
                    fields = await asyncio.to_thread(self._opening, job, choice, delta, columns[choice.index], shared)
                chunk = job.header.fields() | {"choices": [{"index": choice.index} | fields]}
                yield chunk | ({"usage": usage.fields()} if continuous else {})
        if final:
            yield job.header.fields() | {"choices": [], "usage": usage.fields()}

    def _opening(
        self, job: _Job, choice: Choice, delta: Delta, columns: CompletionLogprobs, scores: TokenScores | None
    ) -> dict[str, Any]:
        """What opens a choice: also the prompt's text, ids and numbers."""
        prompt = job.prompt(choice)
        echo = self._echo(job, columns, prompt, scores)
        fields = self._delta(job, delta, columns)
        if echo is not None:
            fields["logprobs"] = joined([echo, fields["logprobs"]])
        if job.body.echo:
            fields["text"] = prompt.text + delta.text
        if job.numbers.shown is not None and (choice.first or not job.numbers.whole):
            fields |= job.prompt_fields(choice.prompt_index, scores)
        return fields | ({"prompt_token_ids": prompt.ids} if job.body.return_token_ids else {})

    def _delta(self, job: _Job, delta: Delta, columns: CompletionLogprobs) -> dict[str, Any]:
        """What an event adds to a choice."""
        wanted = job.body.logprobs is not None
        fields: dict[str, Any] = {
            "text": delta.text,
            "logprobs": columns.output(delta.token_ids, delta.scores) if wanted else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            fields["stop_reason"] = delta.stop_reason
        if job.body.return_token_ids:
            fields["token_ids"] = delta.token_ids
        return fields


def _written(numbers: Any) -> orjson.Fragment | Hole | None:
    """Numbers of a prompt as the JSON that all its choices show."""
    return numbers if numbers is None or isinstance(numbers, Hole | orjson.Fragment) else orjson.Fragment(dump(numbers))
