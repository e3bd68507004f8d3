"""POST /v1/completions: the place for echo, for prompts of token ids and for lists of prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve.engine.request import TokenScores
from serve.openai.checks import check_room, check_stream_options, check_top_k, prompt_top_k
from serve.openai.endpoint import Endpoint, Header, Usage, usage_of, wants_usage
from serve.openai.errors import invalid
from serve.openai.generation import (
    Choice,
    Delta,
    Finished,
    finish_all,
    make_choices,
    merge,
)
from serve.openai.logprobs import CompletionLogprobs, TokenNames, joined, prompt_logprobs
from serve.openai.schema import CompletionRequest, parse, read_body
from serve.openai.stream import dump, json_or_disconnect, stream_or_disconnect
from serve.text.tokenizer import TokenizerError

_MAX_PROMPTS = 2048
_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt: its ids, and how they read."""

    ids: list[int]
    text: str  # what echo returns
    hidden: list[bool]  # for each id, whether it is no part of the text


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request."""

    body: CompletionRequest
    header: Header
    prompts: list[_Prompt]
    choices: list[Choice]
    names: TokenNames
    prompt_k: int | None  # alternatives of `prompt_logprobs`, None where it is not to be shown

    @property
    def n(self) -> int:
        return self.body.n or 1

    def prompt(self, choice: Choice) -> _Prompt:
        return self.prompts[choice.prompt_index]


class Completions:
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
        body = parse(CompletionRequest, data, at.fields)
        check_stream_options(body)
        check_top_k("logprobs", body.logprobs or 0, limits)
        prompt_k = prompt_top_k(body, limits)
        if prompt_k is None and body.echo:
            prompt_k = body.logprobs  # as in vLLM: echo with logprobs also returns prompt_logprobs
        name = at.model_name(body.model)
        prompts = self._prompts(body)
        asked = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        room = [check_room("prompt", len(prompt.ids), asked, limits) for prompt in prompts]
        choices = make_choices(
            body,
            [prompt.ids for prompt in prompts],
            room,
            score_prompts=prompt_k is not None,
            limits=limits,
            tokenizer=at.tokenizer,
        )
        header = Header.make("cmpl", "text_completion", name, at.config.system_fingerprint, request_id)
        names = TokenNames(at.tokenizer, bool(body.return_tokens_as_token_ids))
        return _Job(body, header, prompts, choices, names, prompt_k)

    def _prompts(self, body: CompletionRequest) -> list[_Prompt]:
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
        return [
            self._text_prompt(body, one, f"prompt[{i}]")
            if isinstance(one, str)
            else self._id_prompt(body, one, f"prompt[{i}]")
            for i, one in enumerate(given)
        ]

    def _text_prompt(self, body: CompletionRequest, text: str, where: str) -> _Prompt:
        tokenizer = self._at.tokenizer
        try:
            ids = tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False)
        except TokenizerError as error:
            raise invalid(where, str(error)) from None
        if not ids:
            raise invalid(where, f"`{where}` gives no tokens.")
        added = tokenizer.is_special(ids[0]) and not text.startswith(tokenizer.token_text(ids[0]))
        return _Prompt(ids, text, [added] + [False] * (len(ids) - 1))

    def _id_prompt(self, body: CompletionRequest, ids: Any, where: str) -> _Prompt:
        vocabulary = self._at.engine.limits.vocab_size
        if not isinstance(ids, list) or not ids:
            raise invalid(where, f"`{where}` must be a string or a non-empty list of token ids.", "invalid_type")
        for i, token_id in enumerate(ids):
            if type(token_id) is not int:
                raise invalid(f"{where}[{i}]", f"`{where}[{i}]` must be a token id.", "invalid_type")
            if not 0 <= token_id < vocabulary:
                raise invalid(f"{where}[{i}]", f"`{where}[{i}]` is not in the vocabulary of {vocabulary} tokens.")
        skips = body.skip_special_tokens is not False
        hidden = [skips and self._at.tokenizer.is_special(token_id) for token_id in ids]
        text = self._at.tokenizer.decode(ids, skip_special_tokens=skips) if body.echo else ""
        return _Prompt(ids, text, hidden)

    async def _answer(self, job: _Job) -> bytes:
        results = await finish_all(job.choices, self._at.engine, self._at.tokenizer)
        return await asyncio.to_thread(self._body, job, results)

    def _body(self, job: _Job, results: Sequence[Finished]) -> bytes:
        choices: list[dict[str, Any]] = []
        shown: orjson.Fragment | None = None  # a prompt's numbers, written once for all its choices
        for result in results:
            prompt = job.prompt(result.choice)
            scores = results[result.choice.index // job.n * job.n].prompt_scores  # the prompt's first choice has them
            if result.choice.index % job.n == 0:
                shown = orjson.Fragment(dump(self._prompt_logprobs(job, prompt, scores)))
            choices.append(self._choice(job, result, prompt, scores) | {"prompt_logprobs": shown})
        return dump(job.header.fields() | {"choices": choices, "usage": usage_of(results).fields()})

    def _choice(self, job: _Job, result: Finished, prompt: _Prompt, scores: TokenScores | None) -> dict[str, Any]:
        logprobs = None
        if job.body.logprobs is not None:
            columns = self._columns(job)
            parts = [columns.echo(prompt.ids, scores, prompt.text, prompt.hidden)] if job.body.echo and scores else []
            parts.append(columns.output(result.token_ids, result.all_scores()))
            logprobs = joined(parts)
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
        return CompletionLogprobs(
            job.names, job.body.logprobs or 0, skip_special_tokens=job.body.skip_special_tokens is not False
        )

    def _prompt_logprobs(self, job: _Job, prompt: _Prompt, scores: TokenScores | None) -> list[Any] | None:
        if job.prompt_k is None or scores is None:
            return None
        return prompt_logprobs(self._at.tokenizer, prompt.ids, scores, job.prompt_k)

    async def _chunks(self, job: _Job) -> AsyncGenerator[dict[str, Any]]:
        usage = Usage.of_prompts(job.choices)
        final, continuous = wants_usage(job.body)
        columns: dict[int, CompletionLogprobs] = {}
        scores: dict[int, TokenScores | None] = {}  # by prompt; its first choice opens first and brings them
        async for choice, delta in merge(job.choices, self._at.engine, self._at.tokenizer):
            usage.completion_tokens += len(delta.token_ids)
            if choice.index in columns:
                fields = self._delta(job, delta, columns[choice.index])
            else:
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
        echo = None
        if job.body.echo and job.body.logprobs is not None and scores is not None:
            echo = columns.echo(prompt.ids, scores, prompt.text, prompt.hidden)  # before the output: offsets go on
        fields = self._delta(job, delta, columns)
        if echo is not None:
            fields["logprobs"] = joined([echo, fields["logprobs"]])
        if job.body.echo:
            fields["text"] = prompt.text + delta.text
        if scores is not None and job.prompt_k is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs(job, prompt, scores)
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
