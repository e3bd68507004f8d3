"""Job: a validated request to chat or completions, ready to run."""

import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson

from serve.api.context import Endpoint, Header
from serve.api.errors import engine_error, invalid
from serve.api.full_vocab_logprobs import whole_rows
from serve.api.generation import Choice, Delta, TimeLimits, engine_errors, merge
from serve.api.json_stream import Hole
from serve.api.logprobs import TokenNames, prompt_columns
from serve.api.middleware import AnswerRecord, Work
from serve.api.requests import GenerationRequest
from serve.api.sampling_params import sampling_params, stop_strings
from serve.api.validation import PromptNumbers, check_start
from serve.engine.request import PromptScoring, Request, SamplingParams, TokenScores
from serve.text.detokenizer import StopStrings


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its ids, and for an echo, how they read."""

    ids: list[int]
    text: str = ""
    hidden: Sequence[bool] = ()  # for each id, whether it is no part of the text
    echo: str = ""  # of a chat, what its answer begins with


@dataclass(frozen=True, slots=True)
class Job[B: GenerationRequest]:
    """A checked request."""

    at: Endpoint
    body: B
    header: Header
    prompts: list[Prompt]
    choices: list[Choice]
    names: TokenNames
    alternatives: int  # shown of each generated token
    numbers: PromptNumbers
    row_requests: list[Request]  # for each prompt, where its rows are whole, the request that they are asked of

    @property
    def request_ids(self) -> list[str]:
        """Of all that the engine may hold for this job."""
        return [choice.request.id for choice in self.choices] + [request.id for request in self.row_requests]

    def prompt(self, choice: Choice) -> Prompt:
        """The prompt that a choice answers."""
        return self.prompts[choice.prompt_index]

    async def deltas(self) -> AsyncGenerator[tuple[Choice, Delta]]:
        """Run the choices and yield what each step adds to them. Metrics are updated when all have finished."""
        max_unread = self.at.config.max_unread_tokens if self.body.stream else None
        with engine_errors(self.at.on_rejected):
            async with aclosing(merge(self.choices, self.at.engine, self.at.tokenizer, max_unread)) as deltas:
                async for choice, delta in deltas:
                    yield choice, delta
        n = self.body.n or 1
        for start in range(0, len(self.choices), n):
            self.at.on_answers([choice.num_tokens for choice in self.choices[start : start + n]])

    def prompt_fields(self, prompt_index: int, scores: TokenScores | None) -> dict[str, Any]:
        """What an answer tells of a prompt's numbers. Slow: not for the event loop.

        Raises:
            APIError: as in `prompt_logprobs`.
        """
        numbers = self.numbers
        if not numbers.columns or numbers.shown is None:
            return {"prompt_logprobs": self.prompt_logprobs(prompt_index, scores)}
        if scores is None:
            raise engine_error("The engine returned no log-probabilities of the prompt.")
        columns = prompt_columns(self.prompts[prompt_index].ids, scores, numbers.shown, numbers.start)
        return {"prompt_logprobs": None, "prompt_logprobs_columns": columns}

    def prompt_logprobs(self, prompt_index: int, scores: TokenScores | None) -> orjson.Fragment | Hole | None:
        """A prompt's `prompt_logprobs`, None where it is not asked for.

        Raises:
            APIError: 500 if there are no scores, or not as many as tokens.
        """
        numbers, at, ids = self.numbers, self.at, self.prompts[prompt_index].ids
        if numbers.shown is None:
            return None
        if scores is None:
            raise engine_error("The engine returned no log-probabilities of the prompt.")
        if numbers.whole:
            assert at.row_writer is not None
            request = self.row_requests[prompt_index]
            return Hole(whole_rows(at.engine, at.row_writer, request, scores, numbers.shown))
        return orjson.Fragment(at.entry_writer.entries(ids, scores, numbers.shown, numbers.start))


def make_job[B: GenerationRequest](
    at: Endpoint,
    body: B,
    record: AnswerRecord,
    header: Header,
    prompts: list[Prompt],
    *,
    max_tokens: Sequence[int],
    top_k: int | None,
    numbers: PromptNumbers,
) -> Job[B]:
    """A job of prompts and what is asked of each.

    Args:
        record: of the HTTP request, which is told how to measure the work.
        max_tokens: of each prompt's answers.
        top_k: alternatives of each generated token, if not named by id; None: no numbers of these are asked for.

    Raises:
        APIError: 400 that names a field.
    """
    ids = [prompt.ids for prompt in prompts]
    check_start(body, ids)
    salt, times = at.cache_salt(body, record), at.time_limits(body, record)
    choices = make_choices(
        body,
        ids,
        max_tokens,
        params=sampling_params(
            body,
            at.tokenizer.eos_token_ids,
            at.engine.limits,
            at.tokenizer,
            processed=at.logprobs_mode(body) == "processed_logprobs",
        ),
        scoring=numbers.scoring,
        shows_logprobs=top_k is not None,
        eos_token_ids=frozenset() if body.ignore_eos else at.tokenizer.eos_token_ids,
        cache_salt=salt,
        times=times,
    )
    record.measure = lambda: work_of(choices)
    if at.config.enable_log_requests:
        at.log_request(header, body, [at.tokenizer.decode(each, skip_special_tokens=False) for each in ids])
    body.forget_texts()
    full_vocab = SamplingParams(0, prompt=PromptScoring(numbers.start, full_vocab=True))
    return Job(
        at=at,
        body=body,
        header=header,
        prompts=prompts,
        choices=choices,
        names=TokenNames(
            at.tokenizer, _or_default(body.return_tokens_as_token_ids, at.config.return_tokens_as_token_ids)
        ),
        alternatives=len(body.logprob_token_ids or ()) or top_k or 0,
        numbers=numbers,
        row_requests=[make_request(body, prompt_ids, full_vocab, salt, times) for prompt_ids in ids]
        if numbers.whole
        else [],
    )


def _or_default(said: bool | None, default: bool) -> bool:
    return default if said is None else said


def make_choices(
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    params: SamplingParams,
    scoring: PromptScoring | None,
    eos_token_ids: frozenset[int],
    shows_logprobs: bool,
    cache_salt: str,
    times: TimeLimits,
) -> list[Choice]:
    """A choice for each of n answers to each prompt, ordered by index.

    Args:
        body: the HTTP request.
        prompts: token ids of each prompt.
        max_tokens: of each prompt's answers.
        params: sampling parameters shared by all answers.
        scoring: prompt scoring of the first answer to each prompt.
        eos_token_ids: see `Choice`.
        shows_logprobs: whether log-probs of generated tokens are shown; otherwise they are not kept.
        cache_salt: see `Request`.
        times: the time limits; the queue timeout is that of the first choice, as the others wait behind it.

    Raises:
        APIError: 400 that names a field.
    """
    n = body.n or 1
    stop = StopStrings(stop_strings(body))
    choices = []
    for index in range(len(prompts) * n):
        prompt_index, number = divmod(index, n)
        limit = max_tokens[prompt_index]
        if params.min_tokens > limit:
            raise invalid("min_tokens", f"`min_tokens` is above the {limit} tokens that may be generated.")
        if index == 1:
            times = replace(times, queue_timeout=math.inf)
        choice_params = replace(
            params,
            max_tokens=limit,
            seed=None if body.seed in (None, -1) else body.seed + number,
            prompt=scoring if number == 0 else None,
        )
        choices.append(
            Choice(
                index=index,
                request=make_request(body, prompts[prompt_index], choice_params, cache_salt, times),
                stop=stop,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                prompt_index=prompt_index,
                eos_token_ids=eos_token_ids,
                first=number == 0,
                shows_logprobs=shows_logprobs,
            )
        )
    return choices


def make_request(
    body: GenerationRequest, prompt: list[int], params: SamplingParams, cache_salt: str, times: TimeLimits
) -> Request:
    """An engine request with a new id."""
    return Request(
        uuid.uuid4().hex, prompt, params, body.priority or 0, cache_salt, times.queue_timeout, times.deadline
    )


def work_of(choices: Sequence[Choice]) -> Work:
    """The engine's work for choices that have finished or were aborted."""
    first = [choice for choice in choices if choice.first]
    handles = [choice.handle for choice in choices if choice.handle is not None]
    started = [handle.times for handle in handles if handle.times.admitted]
    ended = [times for times in started if times.last]
    return Work(
        prompt_tokens=sum(len(choice.request.prompt_token_ids) for choice in first),
        cached_tokens=sum(choice.handle.cached_tokens for choice in first if choice.handle is not None),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        queue=max((times.admitted - times.arrived for times in started), default=None),
        prefill=max(((times.first or times.last) - times.admitted for times in ended), default=None),
        decode=max((times.last - times.first for times in ended if times.first), default=None),
    )
