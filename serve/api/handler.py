"""Handler: the steps that chat and completions share, from the bytes of a request to its response."""

import asyncio
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from serve.api.context import Context
from serve.api.errors import invalid
from serve.api.generation import Choice, Prompt, Unread, engine_errors, merge, span_attributes, work_of
from serve.api.job import Job, log_request
from serve.api.json_stream import Body
from serve.api.logprobs import TokenNames
from serve.api.middleware import AnswerRecord, record_of
from serve.api.parsing import release_texts, validate
from serve.api.request_body import Holding, json_object
from serve.api.requests import GenerationRequest
from serve.api.sampling_params import sampling_params, stop_strings
from serve.api.sse import json_or_disconnect, stream_or_disconnect
from serve.api.unsent import Unsent
from serve.api.validation import (
    PromptLogprobs,
    check_common,
    check_grammar_start,
    check_prompt_logprobs,
    check_requested_ids,
    check_start,
    read_experts_start,
    read_prompt_logprobs,
    served_name,
)
from serve.engine.grammar import Grammar
from serve.engine.request import PromptScoring, Request, SamplingParams
from serve.grammar.fields import GrammarRequest, compile_grammar, grammar_request, resume_grammar
from serve.jobs.generate import choice_params
from serve.jobs.output import Output, OutputDecoder
from serve.text.detokenizer import Detokenizer, StopStrings
from serve.tools.reply import compile_output


class Handler[B: GenerationRequest](ABC):
    """A generating endpoint: read, validate, tokenize, submit."""

    model: type[B]  # of the request body
    id_prefix: str
    objects: tuple[str, str]  # `object` of a response and of a chunk
    repeats_prompt_logprobs = False  # whether every choice of a response contains those of its prompt
    collects_streams = False  # whether the end of a stream repeats what was sent

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, request: HTTPRequest) -> Response:
        """Answer with JSON, or with server-sent events if `stream` is true."""
        async with self._context.bodies.read(request) as data:
            respond = await self.prepare(request, data)
        del data  # not needed while the answer is generated
        return await respond()

    async def prepare(self, request: HTTPRequest, data: bytes) -> Callable[[], Awaitable[Response]]:
        """Validate a body and return a function that answers it. Raise APIError or PromptError if it is invalid."""
        record = record_of(request)
        job = await asyncio.to_thread(self._job, data, record)
        if (grammar := await self._compile(job)) is not None:
            for choice in job.choices:
                choice.request = replace(choice.request, params=replace(choice.request.params, grammar=grammar))
        record.charge(job.prompt_tokens + sum(choice.request.params.max_tokens for choice in job.choices))
        return lambda: self._respond(request, job)

    async def _respond(self, request: HTTPRequest, job: Job[B]) -> Response:
        engine = self._context.engine
        requests = [*(choice.request for choice in job.choices), *(prompt.full_vocab_request for prompt in job.prompts)]
        request_ids = [request.id for request in requests if request is not None]

        def end() -> None:
            for request_id in request_ids:
                engine.abort(request_id)
            job.unsent.holding.close()

        try:
            with engine_errors(self._context.metrics.on_rejected):
                job.choices[0].admit(engine, bypass_limits=False)
            job.unsent.reserve()
            if job.body.stream:
                return await stream_or_disconnect(request, self._chunks(job), end)
            return await json_or_disconnect(request, self._body(job), end)
        except BaseException:
            end()
            raise

    async def _compile(self, job: Job[B]) -> Grammar | None:
        """The grammar of the outputs. Raise PromptError if it cannot be used, GrammarBusyError for a full queue."""
        start, prompt, grammars = job.body.grammar_start, job.prompts[0], self._context.grammars
        key = job.choices[0].request.owner
        if start is None or job.grammar is None:
            return await compile_output(job.grammar, prompt.reply, grammars, key)
        return await resume_grammar(await compile_grammar(job.grammar, grammars, key), prompt.ids[start:])

    def _job(self, data: bytes, record: AnswerRecord) -> Job[B]:
        """Validate and tokenize a request. Slow: run it in a thread."""
        context, config, limits = self._context, self._context.config, self._context.engine.limits
        body = context.model.defaults.fill(self._read(json_object(data), record))
        check_common(body)
        alternatives, echo_k = self._alternatives(body)
        if body.logprob_token_ids is not None:
            if alternatives is None:
                raise invalid("logprob_token_ids", "`logprob_token_ids` needs `logprobs`.")
            check_requested_ids("logprob_token_ids", body.logprob_token_ids, limits)
            alternatives = len(body.logprob_token_ids)
        if body.return_processed_logprobs and alternatives is None:
            raise invalid("return_processed_logprobs", "`return_processed_logprobs` needs `logprobs`.")
        prompt_logprobs = read_prompt_logprobs(body, echo_k, limits)
        header = self._header(body, record)
        prompts = self._prompts(body)
        grammar = self._grammar(body, prompts)
        ids = [prompt.ids for prompt in prompts]
        # A choice of a stream is sent before the next one is rendered.
        copies = (body.n or 1) if self.repeats_prompt_logprobs and not body.stream else 1
        check_prompt_logprobs(prompt_logprobs, ids, copies, limits)
        check_start(body, ids)
        experts_start = read_experts_start(body, ids, limits)
        choices = self._choices(body, record, prompts, prompt_logprobs, alternatives, experts_start)
        record.measure = lambda: work_of(choices)
        unsent = Unsent(
            Holding(context.unsent, record.key),
            choices,
            prompt_logprobs,
            limits,
            repeats=self.repeats_prompt_logprobs,
            token_ids=bool(body.return_token_ids),
            stream=bool(body.stream) and not self.collects_streams,
            fixed_length=not stop_strings(body),
        )
        if config.enable_log_requests:
            log_request(context, header, body, ids)
        release_texts(body)
        as_ids = body.return_tokens_as_token_ids
        return Job(
            body=body,
            header=header,
            prompts=prompts,
            choices=choices,
            prompt_tokens=sum(map(len, ids)),
            prompt_logprobs=prompt_logprobs,
            names=TokenNames(context.model.tokenizer, config.return_tokens_as_token_ids if as_ids is None else as_ids),
            unsent=unsent,
            grammar=grammar,
        )

    def _grammar(self, body: B, prompts: Sequence[Prompt]) -> GrammarRequest | None:
        """The grammar of the outputs. Raise PromptError for an invalid field."""
        grammar = grammar_request(body, ignore_eos=bool(body.ignore_eos))
        check_grammar_start(body, grammar, [prompt.ids for prompt in prompts])
        return grammar

    def _read(self, data: dict[str, Any], record: AnswerRecord) -> B:
        """Validate the fields of a body. Raise APIError or PromptError if one is invalid."""
        del record
        return validate(self.model, data, self._context.unknown_fields)

    def _header(self, body: B, record: AnswerRecord) -> dict[str, Any]:
        model = self._context.model
        header = {
            "id": f"{self.id_prefix}-{body.request_id or record.request_id}",
            "object": self.objects[bool(body.stream)],
            "created": int(time.time()),
            "model": served_name(body.model, model.names),
            "system_fingerprint": model.system_fingerprint,
        }
        record.generation = span_attributes(body, header, operation=self.objects[0].partition(".")[0])
        mode = body.logprobs_mode or self._context.config.logprobs_mode
        if body.logprobs_mode is not None or mode != "raw_logprobs":
            header["logprobs_mode"] = mode
        return header

    def _choices(
        self,
        body: B,
        record: AnswerRecord,
        prompts: Sequence[Prompt],
        requested: PromptLogprobs,
        alternatives: int | None,
        experts_start: int | None,
    ) -> list[Choice]:
        """n choices per prompt, in the order of their indices."""
        config, tokenizer = self._context.config, self._context.model.tokenizer
        mode = body.logprobs_mode or config.logprobs_mode
        shared = sampling_params(body, tokenizer, self._context.engine.limits, processed=mode == "processed_logprobs")
        shared = replace(shared, experts_start=experts_start)
        salt = record.cache_salt(body.cache_salt, per_key=config.prefix_cache_per_key)
        priority = record.priority(body.priority or 0)
        deadline = record.deadline(body.timeout, config.request_timeout)
        stop = StopStrings(stop_strings(body))
        eos_token_ids = frozenset() if body.ignore_eos else tokenizer.eos_token_ids
        skip, include = body.skip_special_tokens is not False, bool(body.include_stop_str_in_output)

        def make_decoder(prompt: Prompt) -> OutputDecoder:
            reply = prompt.reply
            splitter = None if reply is None else reply.splitter(tokenizer, skip_special_tokens=skip)
            detokenizer = Detokenizer(
                tokenizer,
                stop,
                skip_special_tokens=skip,
                include_stop=include,
                min_tokens=shared.min_tokens,
                prefix=prompt.echo.tail,
                kept_ids=() if splitter is None else splitter.kept_ids,
            )
            return OutputDecoder(detokenizer, eos_token_ids, splitter)

        def new_request(prompt: Prompt, params: SamplingParams, queue_timeout: float = config.queue_timeout) -> Request:
            return Request(uuid.uuid4().hex, prompt.ids, params, priority, salt, queue_timeout, deadline, record.key)

        choices: list[Choice] = []
        for prompt in prompts:
            if shared.min_tokens > prompt.max_tokens:
                message = f"`min_tokens` exceeds the {prompt.max_tokens} tokens that may be generated."
                raise invalid("min_tokens", message)
            if requested.full_vocab:
                rows = PromptScoring(requested.start, full_vocab=True)
                prompt.full_vocab_request = new_request(prompt, SamplingParams(0, prompt=rows))
            for i in range(body.n or 1):
                scoring = requested.scoring
                params = choice_params(shared, i, max_tokens=prompt.max_tokens, seed=body.seed, prompt=scoring)
                # The others wait for the first choice, which alone can time out in the queue.
                request = new_request(prompt, params, math.inf) if choices else new_request(prompt, params)
                choices.append(Choice(len(choices), prompt, request, make_decoder, i == 0, alternatives))
        return choices

    async def _deltas(self, job: Job[B]) -> AsyncGenerator[tuple[Choice, Output]]:
        """Run the choices and yield what each step adds to them. Metrics are updated when all have finished."""
        context, choices = self._context, job.choices
        holding = job.unsent.holding.another()
        unread = Unread(context.config.max_unread_tokens, holding) if job.body.stream else None
        with engine_errors(context.metrics.on_rejected):
            async with aclosing(merge(choices, context.engine, unread)) as deltas:
                async for choice, delta in deltas:
                    yield choice, delta
        n = job.body.n or 1
        for start in range(0, len(choices), n):
            context.metrics.on_answers([choice.num_tokens for choice in choices[start : start + n]])

    @abstractmethod
    def _alternatives(self, body: B) -> tuple[int | None, int | None]:
        """Alternatives per generated token and per token of an echoed prompt; None without log-probs."""

    @abstractmethod
    def _prompts(self, body: B) -> list[Prompt]:
        """Tokenize the prompts."""

    @abstractmethod
    def _chunks(self, job: Job[B]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream."""

    @abstractmethod
    def _checked_body(self, job: Job[B], outputs: Sequence[Output]) -> Body:
        """The complete response. Slow: run it in a thread."""

    async def _body(self, job: Job[B]) -> Body:
        outputs = [Output() for _ in job.choices]
        async with aclosing(self._deltas(job)) as deltas:
            async for choice, delta in deltas:
                outputs[choice.index].add(delta)
                job.unsent.add(choice, outputs[choice.index], delta)
        return await asyncio.to_thread(self._checked_body, job, outputs)
