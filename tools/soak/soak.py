"""Soak: clients that ask for a time, and pauses in which the server is looked at."""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2

from tools.soak.again import (
    Comparison,
    Pool,
    ask_to_repeat,
    ask_to_score,
    compare_replies,
    compare_scores,
    told,
)
from tools.soak.answers import Reply
from tools.soak.ask import COMPLETIONS, Ask, ServerFacts
from tools.soak.checks import check_other, check_status, checked_reply
from tools.soak.client import connect, send
from tools.soak.idle import Idle
from tools.soak.memory import LEAK_MB_PER_HOUR
from tools.soak.tally import AGAIN, ANSWER, FAILURES, IDLE, STATUS, Tally
from tools.soak.traffic import Traffic

# Between two looks at the server. A short soak has shorter ones, to have enough looks for a line through its memory;
# in too short ones, most of the time would be waiting for the last answers.
_PHASE_SECONDS, _SHORTEST_PHASE, _PHASES = 90.0, 25.0, 12
_PHASES_OF_REQUESTS = 3  # where it ends after so many
_LONGEST_WAIT = 10.0  # seconds after a 429
_FACTS_SECONDS = 120.0  # that a server may take to tell what it is
MAX_P99_MS = 5000.0  # beside chunks of long prompts, on two cores that clients share
_AGAIN = 0.15  # share of requests that ask again what was answered
_ALONE = 2  # answers that are scored again in each pause, with nobody beside them

type _Again = tuple[int, Ask, Callable[[Reply], Comparison]]  # of which request, how, and what is then compared


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how much, how hard."""

    url: str
    seed: int
    seconds: float
    requests: int | None  # ends earlier, after so many
    clients: int
    burst: int  # requests that come at once, now and then
    longest: int | None  # tokens of a long prompt with its answer; None: what the model takes
    timeout: float  # seconds after which a request hangs
    tolerance: float | None  # between log-probs of the same token; None: 0 on a CPU, else 1e-3
    max_growth: float = LEAK_MB_PER_HOUR  # of resident memory, MB per hour
    max_p99_ms: float = MAX_P99_MS  # between two tokens of a stream


async def read_facts(url: str) -> ServerFacts:
    """Asks a server what it is.

    Raises:
        httpx2.HTTPError: it does not answer, or refuses.
    """
    async with connect(url) as http:

        async def get(path: str) -> Any:
            return (await http.get(path, timeout=_FACTS_SECONDS)).raise_for_status().json()

        card = (await get("/v1/models"))["data"][0]
        body = {"model": card["id"], "prompt": [1], "max_tokens": 1}
        first = (await http.post(COMPLETIONS, json=body, timeout=_FACTS_SECONDS)).raise_for_status().json()
        return ServerFacts(
            model=card["id"],
            max_model_len=card["max_model_len"],
            max_logprobs=card["max_logprobs"],
            vocab_size=(await get("/tokenizer_info"))["vocab_size"],
            fingerprint=str(first["system_fingerprint"]),
            version=(await get("/version"))["version"],
        )


class Soak:
    """One run against one server."""

    def __init__(self, settings: Settings, facts: ServerFacts) -> None:
        self.settings, self.facts = settings, facts
        self.tally, self.idle = Tally(), Idle()
        self.interrupted = False
        self.tolerance = (0.0 if facts.is_exact else 1e-3) if settings.tolerance is None else settings.tolerance
        longest = min(settings.longest or facts.max_model_len, facts.max_model_len)
        self._traffic = Traffic(settings.seed, facts, longest=longest, burst=settings.burst)
        self._pool = Pool(tolerance=self.tolerance)
        self._numbers, self._asked = itertools.count(), 0
        self._begun, self._ended = time.monotonic(), math.inf

    @property
    def seconds(self) -> float:
        """Since it began, until now or its end."""
        return min(time.monotonic(), self._ended) - self._begun

    async def run(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Runs to the end, or until nothing more can be learnt; `say` is told now and then how it goes."""
        self._begun = time.monotonic()
        try:
            await self._run(say)
        finally:
            self._ended = time.monotonic()

    async def _run(self, say: Callable[[str], None]) -> None:
        chosen = self.settings
        phases = _PHASES_OF_REQUESTS if chosen.requests else _phases(chosen.seconds)
        await self._look()
        for phase in range(1, phases + 1):
            async with connect(chosen.url) as http:
                await asyncio.gather(*(self._client(http, phase / phases) for _ in range(chosen.clients)))
                for _ in range(_ALONE):
                    await self._score_alone(http)
            await self._look()
            say(self._line())
            if self.tally.is_hopeless:
                break

    async def _client(self, http: httpx2.AsyncClient, share: float) -> None:
        """Asks one thing after another, until so much of the soak is done."""
        while self._done() < share and not self.tally.is_hopeless:
            self._asked += 1
            number = next(self._numbers)
            rng = random.Random(f"{self.settings.seed}/{number}/again")
            again = self._draw_again(rng) if rng.random() < _AGAIN else None
            if again is not None:
                await self._ask_again(http, number, again)
            else:
                await self._ask_new(http, number, rng)

    def _done(self) -> float:
        """Share of the soak."""
        asked = self._asked / self.settings.requests if self.settings.requests else 0.0
        return max(asked, self.seconds / self.settings.seconds)

    async def _ask_new(self, http: httpx2.AsyncClient, number: int, rng: random.Random) -> None:
        ask = self._traffic.draw(number)
        names = [f"{number}"] if ask.times == 1 else [f"{number}-{copy}" for copy in range(ask.times)]
        replies = await asyncio.gather(*(self._ask(http, ask, name) for name in names))
        if len(replies) == 1 and replies[0] is not None:
            self._pool.keep(rng, number, ask, replies[0])

    async def _ask_again(self, http: httpx2.AsyncClient, number: int, again: _Again) -> None:
        original, ask, compare = again
        reply = await self._ask(http, ask, f"{number}")
        if reply is not None:
            found = compare(reply)
            self.tally.compared(ask.kind, found)
            self.tally.check(AGAIN, f"{ask.kind}, request {number}", told(found, original), found.tokens)

    async def _score_alone(self, http: httpx2.AsyncClient) -> None:
        number = next(self._numbers)
        if again := self._draw_sample(random.Random(f"{self.settings.seed}/{number}/alone")):
            await self._ask_again(http, number, again)

    def _draw_again(self, rng: random.Random) -> _Again | None:
        draws = [self._draw_sample, self._draw_original]
        rng.shuffle(draws)
        return draws[0](rng) or draws[1](rng)

    def _draw_sample(self, rng: random.Random) -> _Again | None:
        sample = self._pool.draw_sample(rng)
        if sample is None:
            return None
        ask = ask_to_score(rng, sample, self.facts.model)
        return sample.number, ask, lambda reply: compare_scores(sample, reply, self.tolerance)

    def _draw_original(self, rng: random.Random) -> _Again | None:
        original = self._pool.draw_original(rng)
        if original is None:
            return None
        return original.number, ask_to_repeat(original), lambda reply: compare_replies(original, reply)

    async def _ask(self, http: httpx2.AsyncClient, ask: Ask, name: str) -> Reply | None:
        """Sends a request and checks what comes; a model's answer, if it is one and nothing is wrong with it."""
        answer = await send(http, ask, f"soak-{self.settings.seed}-{name}", self.settings.timeout)
        where, tally = f"{ask.kind}, request {name}", self.tally
        tally.count(ask, answer)
        wrong = list(check_status(ask, answer))
        tally.check(STATUS, where, wrong)
        if answer.status == 429 and not wrong:  # this client comes again with something else, and when it is told to
            await asyncio.sleep(min(float(answer.headers.get("retry-after", 1)), _LONGEST_WAIT))
        if wrong or answer.left or answer.status != 200:
            return None
        if ask.generates:
            # In a thread: what comes meanwhile must get its time.
            reply, wrong = await asyncio.to_thread(checked_reply, ask, answer)
            tally.check(ANSWER, where, wrong)
            if reply is not None:
                tally.tokens(ask, answer, reply)
            return None if wrong else reply
        tally.check(ANSWER, where, check_other(ask, answer))
        if ask.then is not None:
            await self._ask(http, ask.then(answer.body), name)
        return None

    async def _look(self) -> None:
        """In a pause; over a connection of its own, so that no other is open."""
        where = f"after {self.seconds / 60:.1f} minutes"
        try:
            async with connect(self.settings.url) as http:
                wrong, failures = await self.idle.look(http, self.seconds)
        except httpx2.HTTPError as error:
            wrong, failures = [f"{type(error).__name__} instead of /metrics and /load"], []
        self.tally.check(IDLE, where, wrong)
        self.tally.check(FAILURES, where, failures)

    def _line(self) -> str:
        resident = self.idle.samples[-1].bytes / 1e6 if self.idle.samples else 0.0
        return (
            f"{self._done():4.0%}  {self._asked:,} requests, {self.tally.output_tokens:,} tokens, "
            f"{len(self.tally.violations)} violations, {resident:,.0f} MB"
        )


def _phases(seconds: float) -> int:
    return max(1, min(_PHASES, int(seconds / _SHORTEST_PHASE)), math.ceil(seconds / _PHASE_SECONDS))
