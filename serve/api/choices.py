"""ChoicesHandler: the responses of chat and completions, which have a list of choices."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from serve.api.generation import Choice, Prompt
from serve.api.handler import Handler
from serve.api.job import Job, check_logprobs, usage
from serve.api.json_stream import Body, Placeholder, make_body
from serve.api.requests import GenerationRequest, StreamOptions
from serve.jobs.output import Output


class ChoicesHandler[B: GenerationRequest](Handler[B]):
    """An endpoint whose response has a list of choices."""

    def _checked_body(self, job: Job[B], outputs: Sequence[Output]) -> Body:
        """Many choices are rendered and sent in batches."""
        batches = list(job.unsent.batches(outputs))
        choices: list[dict[str, Any] | Placeholder]
        if len(batches) == 1:
            choices = [*self._choices_of(job, batches[0])]
        else:
            check_logprobs(job, outputs)  # while an error can still be a status
            choices = [Placeholder(self._pieces(job, batch)) for batch in batches]
        return make_body(self._answer(job, choices, self._total_usage(job, outputs)))

    async def _pieces(self, job: Job[B], batch: list[tuple[Choice, Output]]) -> AsyncGenerator[bytes]:
        """The JSON of a batch of choices, separated by commas. Clears the batch."""

        def render() -> Body:
            body = make_body(self._choices_of(job, batch))
            body.parts[0] = body.parts[0][1:]
            body.parts[-1] = body.parts[-1][:-1]
            return body

        size = job.unsent.size_of(batch)
        body = await asyncio.to_thread(render)
        batch.clear()
        async with aclosing(body.pieces()) as pieces:
            async for piece in pieces:
                yield piece
        job.unsent.holding.resize(job.unsent.holding.size - size)

    async def _chunks(self, job: Job[B]) -> AsyncGenerator[dict[str, Any]]:
        options = job.body.stream_options or StreamOptions()
        forced = self._context.config.enable_force_include_usage
        ends_with_usage = forced or bool(options.include_usage)
        generated = cached = 0  # tokens
        opened: set[int] = set()
        reasoning: dict[int, int] = {}  # tokens by choice

        def chunk(fields: dict[str, Any], *, with_usage: bool) -> dict[str, Any]:
            if not with_usage:
                return job.header | fields
            spent = sum(reasoning.values()) if job.has_reasoning else None
            return job.header | fields | {"usage": usage(job.prompt_tokens, generated, cached, spent)}

        continuous = forced or (ends_with_usage and bool(options.continuous_usage_stats))
        async with aclosing(self._deltas(job)) as deltas:
            async for choice, delta in deltas:
                if choice.index not in opened:
                    opened.add(choice.index)
                    cached += delta.cached_tokens if choice.is_first_of_prompt else 0
                    if (opening := await self._opening(job, choice)) is not None:
                        yield chunk(opening, with_usage=continuous)
                generated += len(delta.token_ids)
                reasoning[choice.index] = delta.reasoning_tokens
                for fields in await self._chunk_choices(job, choice, delta):
                    yield chunk({"choices": [fields]}, with_usage=continuous)
        if ends_with_usage:
            yield chunk({"choices": []}, with_usage=True)

    def _prompt_fields(self, job: Job[B], prompt: Prompt) -> dict[str, Any]:
        return self._context.prompt_logprobs.fields(job.prompt_logprobs, prompt)

    def _total_usage(self, job: Job[B], outputs: Sequence[Output]) -> dict[str, Any]:
        pairs = zip(job.choices, outputs, strict=True)
        cached = sum(output.cached_tokens for choice, output in pairs if choice.is_first_of_prompt)
        reasoning = sum(output.reasoning_tokens for output in outputs) if job.has_reasoning else None
        return usage(job.prompt_tokens, sum(len(output.token_ids) for output in outputs), cached, reasoning)

    @abstractmethod
    def _answer(self, job: Job[B], choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        """The complete response. Slow: run it in a thread."""

    @abstractmethod
    def _choices_of(self, job: Job[B], batch: Sequence[tuple[Choice, Output]]) -> list[dict[str, Any]]:
        """Some choices of a response, in their order. Slow: run it in a thread."""

    async def _opening(self, job: Job[B], choice: Choice) -> dict[str, Any] | None:
        """Fields of a chunk that precedes the first delta of a choice; None if there is no such chunk."""
        del job, choice
        return None

    @abstractmethod
    async def _chunk_choices(self, job: Job[B], choice: Choice, delta: Output) -> list[dict[str, Any]]:
        """What a delta adds to a choice, for a chunk each."""
