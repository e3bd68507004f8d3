"""POST /v1/completions: texts or token ids, one or many, with echo."""

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson

from serve.api.choices import ChoicesHandler
from serve.api.errors import invalid
from serve.api.generation import Choice, Prompt, output_logprobs
from serve.api.job import Job, choice_fields, token_details
from serve.api.json_stream import Placeholder, dump
from serve.api.logprobs import CompletionLogprobs, LogprobRow, completion_columns
from serve.api.requests import CompletionRequest
from serve.api.validation import check_answers, check_length, check_number_of_ids, check_top_k, truncate
from serve.jobs.generate import DEFAULT_MAX_TOKENS, generation_room
from serve.jobs.output import Output
from serve.jobs.score import checked_token_ids
from serve.text.chat import prompt_errors
from serve.text.detokenizer import Echo

type _Job = Job[CompletionRequest]

_MAX_PROMPTS = 2048


class Completions(ChoicesHandler[CompletionRequest]):
    model = CompletionRequest
    id_prefix = "cmpl"
    objects = ("text_completion", "text_completion")
    repeats_prompt_logprobs = True

    def _alternatives(self, body: CompletionRequest) -> tuple[int | None, int | None]:
        check_top_k("logprobs", body.logprobs or 0, self._context.engine.limits)
        return body.logprobs, body.logprobs if body.echo else None

    def _prompts(self, body: CompletionRequest) -> list[Prompt]:
        prompts = [self._truncate(body, prompt) for prompt in self._tokenize(body)]
        for prompt in prompts:
            generation_room("prompt", len(prompt.ids), prompt.max_tokens, self._context.engine.limits)
        return prompts

    def _tokenize(self, body: CompletionRequest) -> list[Prompt]:
        prompt = body.prompt
        if prompt is None or prompt == []:
            raise invalid("prompt", "`prompt` must not be empty.", "missing_required_parameter")
        if not isinstance(prompt, str | list):
            raise invalid("prompt", "`prompt` must be a string, token ids, or a list of either.", "invalid_type")
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [self._prompt(body, prompt, "prompt")]
        if len(prompt) > _MAX_PROMPTS:
            raise invalid("prompt", f"`prompt` contains more than {_MAX_PROMPTS} prompts.", "array_above_max_length")
        check_answers(len(prompt), body.n or 1)
        return [self._prompt(body, item, f"prompt[{i}]") for i, item in enumerate(prompt)]

    def _prompt(self, body: CompletionRequest, prompt: Any, param: str) -> Prompt:
        limits = self._context.engine.limits
        if isinstance(prompt, str):
            return self._text_prompt(body, prompt, param)
        if not isinstance(prompt, list) or not prompt:
            raise invalid(param, f"`{param}` must be a string or a non-empty list of token ids.", "invalid_type")
        check_number_of_ids(param, prompt, body, limits)
        return self._from_ids(body, checked_token_ids(prompt, limits.vocab_size, param))

    def _text_prompt(self, body: CompletionRequest, text: str, param: str) -> Prompt:
        tokenizer, adds = self._context.model.tokenizer, body.add_special_tokens is not False
        check_length(param, text, body, tokenizer, self._context.engine.limits)
        with prompt_errors(param):
            if body.echo:
                ids, offsets = tokenizer.tokenize(text, add_special_tokens=adds)
            else:
                ids, offsets = tokenizer.encode(text, add_special_tokens=adds), []
        if not ids:
            code = "missing_required_parameter" if param == "prompt" and not text else "invalid_value"
            raise invalid(param, f"`{param}` gives no tokens, and the tokenizer adds none.", code)
        return Prompt(ids, _max_tokens(body), echo=Echo(text, offsets) if body.echo else Echo())

    def _truncate(self, body: CompletionRequest, prompt: Prompt) -> Prompt:
        ids = truncate(prompt.ids, body, prompt.max_tokens, self._context.engine.limits)
        return prompt if len(ids) == len(prompt.ids) else self._from_ids(body, ids)

    def _from_ids(self, body: CompletionRequest, ids: list[int]) -> Prompt:
        """A prompt of token ids, with their text if it is echoed."""
        echo = Echo.decode(self._context.model.tokenizer, ids) if body.echo else Echo()
        return Prompt(ids, _max_tokens(body), echo=echo)

    def _answer(self, job: _Job, choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        return job.header | {"choices": choices, "usage": usage}

    def _choices_of(self, job: _Job, batch: Sequence[tuple[Choice, Output]]) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        prompt: Prompt | None = None
        prompt_fields: dict[str, orjson.Fragment | Placeholder | None] = {}
        for choice, output in batch:
            if job.prompt_logprobs.full_vocab and not choice.is_first_of_prompt:  # too large to be repeated
                prompt_fields = {"prompt_logprobs": None}
            elif choice.prompt is not prompt or any(isinstance(value, Placeholder) for value in prompt_fields.values()):
                prompt, fields = choice.prompt, self._prompt_fields(job, choice.prompt)
                prompt_fields = {name: _as_json(value) for name, value in fields.items()}
            choices.append(_choice(job, choice, output) | prompt_fields)
        return choices

    async def _chunk_choices(self, job: _Job, choice: Choice, delta: Output) -> list[dict[str, Any]]:
        if choice.columns is not None:
            return [choice_fields(job, choice, delta, {"text": delta.text}, _logprobs(job, choice, delta))]
        return [await asyncio.to_thread(self._first_chunk_choice, job, choice, delta)]

    def _first_chunk_choice(self, job: _Job, choice: Choice, delta: Output) -> dict[str, Any]:
        fields = _choice(job, choice, delta)
        if job.prompt_logprobs.k is not None and (choice.is_first_of_prompt or not job.prompt_logprobs.full_vocab):
            fields |= self._prompt_fields(job, choice.prompt)
        return fields


def _choice(job: _Job, choice: Choice, output: Output) -> dict[str, Any]:
    """A choice from its start, with the text and the ids of the prompt as requested."""
    body, prompt = job.body, choice.prompt
    text = {"text": prompt.echo.text + output.text}
    fields = choice_fields(job, choice, output, text, _logprobs(job, choice, output))
    if body.return_token_ids or not body.stream:
        fields["prompt_token_ids"] = prompt.ids if body.return_token_ids else None
    return fields


def _logprobs(job: _Job, choice: Choice, output: Output) -> dict[str, Any] | None:
    """Columns of the output's tokens; those of the first output start with the echoed prompt, if requested."""
    requested, prompt, rows = job.prompt_logprobs, choice.prompt, list[LogprobRow]()
    if choice.columns is None:
        choice.columns = CompletionLogprobs(job.names, skip_special_tokens=job.body.skip_special_tokens is not False)
        if requested.echo_k is not None:
            logprobs = prompt.logprobs(requested.echo_k, requested.start)
            rows = choice.columns.echo(prompt.ids, logprobs, prompt.echo)
    if choice.alternatives is None:
        return None
    details = token_details(job, choice, output).columns(len(rows))
    rows += choice.columns.output(output.token_ids, output_logprobs(output, choice.alternatives))
    return completion_columns(rows) | details


def _max_tokens(body: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens


def _as_json(value: Any) -> orjson.Fragment | Placeholder | None:
    """A value serialized once for all choices that contain it."""
    return value if value is None or isinstance(value, Placeholder | orjson.Fragment) else orjson.Fragment(dump(value))
