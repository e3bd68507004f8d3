"""Scenarios of packed prefill: many short prompts, and many questions on one state, against one long prefill."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import pairwise

from tools.bench.load import LONG, SCORED, Body, Figures, Load

_PROMPTS = 256  # short prompts that are scored together
_STREAMS, _STREAM_PROMPT = 16, 32
_QUESTIONS, _STATE = 100, 600  # of a request for decisions; tokens of its state
_ROUNDS = 3


def packed_scenarios(load: Load) -> dict[str, Callable[[], Awaitable[Figures]]]:
    return {
        f"score {_PROMPTS} prompts of {SCORED} together": lambda: _short_prompts(load),
        f"first tokens of {_STREAMS} prompts of {_STREAM_PROMPT}": lambda: _first_tokens(load),
        f"{_QUESTIONS} decisions on {_STATE} tokens": lambda: _decisions(load),
    }


async def _short_prompts(load: Load) -> Figures:
    """The rate of scored tokens; relative to one long prefill with scores, and to the prompts one after another."""

    async def together() -> float:
        return await load.timed(_scored([load.ids(SCORED) for _ in range(_PROMPTS)]))

    async def alone() -> float:
        return sum([await load.timed(_scored([load.ids(SCORED)])) for _ in range(_PROMPTS // 8)])

    rate = _PROMPTS * SCORED / await _median(together)
    single = _PROMPTS // 8 * SCORED / await _median(alone)
    long = await _long_rate(load)
    return Figures(
        rate, note=f"{rate / long:.2f} x one prefill of {load.long_prompt}, {rate / single:.2f} x one by one"
    )


async def _first_tokens(load: Load) -> Figures:
    """Times of first tokens of streams that start together; the last one relative to a prefill of LONG tokens."""

    async def first(start: float) -> float:
        stream = load.stream({"prompt": load.ids(_STREAM_PROMPT), "max_tokens": 1, "min_tokens": 1})
        async with aclosing(stream) as arrivals:
            return await anext(arrivals) - start

    async def round_of() -> tuple[float, float]:
        start = time.perf_counter()
        times = await asyncio.gather(*[first(start) for _ in range(_STREAMS)])
        return statistics.mean(times), max(times)

    rounds = [await round_of() for _ in range(_ROUNDS)]
    mean, last = (statistics.median(column) for column in zip(*rounds, strict=True))
    long = await _median(lambda: load.timed({"prompt": load.ids(LONG), "max_tokens": 1}))
    note = f"last {1e3 * last:.0f} ms, {last / long:.2f} x one prefill of {LONG}"
    return Figures(_STREAMS * _STREAM_PROMPT / last, ttft_ms=1e3 * mean, note=note)


async def _decisions(load: Load) -> Figures:
    """The rate of tokens that must be computed, even if more are; relative to one long prefill."""

    async def round_of() -> tuple[float, float]:
        questions = [
            {
                "type": "choice",
                "instructions": f"Which of these fits case {load.ids(1)[0]} best?",
                "choices": [{"value": f"{name} {load.ids(1)[0]}"} for name in ("first", "second", "third", "fourth")],
            }
            for _ in range(_QUESTIONS)
        ]
        body: Body = {"model": load.model, "input": await load.text(_STATE), "questions": questions}
        start = time.perf_counter()
        await load.post("/v1/decisions", body)
        seconds = time.perf_counter() - start
        answers = (await load.post("/v1/decisions", body | {"return_token_ids": True}))["answers"]
        prompts = [ids for answer in answers for ids in answer["evidence"]["prompt_token_ids"]]
        return distinct_tokens(prompts) / seconds, seconds

    rounds = [await round_of() for _ in range(_ROUNDS)]
    rate, seconds = (statistics.median(column) for column in zip(*rounds, strict=True))
    note = f"{rate / await _long_rate(load, scored=False):.2f} x one prefill of {load.long_prompt}"
    return Figures(rate, total_ms=1e3 * seconds, note=note)


def distinct_tokens(prompts: list[list[int]]) -> int:
    """Number of tokens that must be computed if prompts share what they have in common."""
    ordered = sorted(prompts)
    shared = (
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        for pair in pairwise(ordered)
    )
    return sum(map(len, ordered)) - sum(shared)


async def _long_rate(load: Load, *, scored: bool = True) -> float:
    """Tokens per second of one long prefill."""

    def body() -> Body:
        return (
            _scored([load.ids(load.long_prompt)]) if scored else {"prompt": load.ids(load.long_prompt), "max_tokens": 1}
        )

    return load.long_prompt / await _median(lambda: load.timed(body()))


def _scored(prompts: list[list[int]]) -> Body:
    return {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1}


async def _median(measure: Callable[[], Awaitable[float]]) -> float:
    return statistics.median([await measure() for _ in range(_ROUNDS)])
