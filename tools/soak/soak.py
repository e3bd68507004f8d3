"""Soak: phases of concurrent clients, with checks of the idle server in between."""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2

from tools.soak.checks import check_page, check_status, checked_reply
from tools.soak.client import connect, send
from tools.soak.idle import IdleChecks
from tools.soak.memory import LEAK_MB_PER_HOUR
from tools.soak.replay import (
    Comparison,
    Pool,
    compare_replies,
    compare_scores,
    repeated_request,
    scoring_request,
    summary,
)
from tools.soak.replies import Reply
from tools.soak.request import COMPLETIONS, Request, ServerFacts
from tools.soak.results import ANSWER, FAILURES, IDLE, REPLAY, STATUS, Results
from tools.soak.traffic import Traffic

# Length of a phase. A short soak has shorter phases, so that memory has enough samples; in too short ones most of the
# time would be spent waiting for the last answers.
_PHASE_SECONDS, _SHORTEST_PHASE, _PHASES = 90.0, 25.0, 12
_PHASES_OF_REQUESTS = 3  # with --requests
_LONGEST_WAIT = 10.0  # seconds after a 429
_FACTS_SECONDS = 120.0  # to answer the first requests
MAX_P99_MS = 5000.0  # with chunks of long prompts on two cores shared with the clients
_REPLAY_SHARE = 0.15  # of requests
_REPLAYS_PER_PAUSE = 2  # answers scored again without concurrent requests

type _Replay = tuple[int, Request, Callable[[Reply], Comparison]]  # number of the original, request, comparison


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one run."""

    url: str
    seed: int
    seconds: float
    requests: int | None  # stop after this many
    clients: int
    burst: int  # requests of a burst
    longest: int | None  # tokens of a long prompt and its answer; None: the model's limit
    timeout: float  # seconds per request
    tolerance: float | None  # maximum difference of log-probs; None: 0 on a CPU, else 1e-3
    max_growth: float = LEAK_MB_PER_HOUR  # of resident memory, MB/h
    max_p99_ms: float = MAX_P99_MS  # between two tokens of a stream


async def read_facts(url: str) -> ServerFacts:
    """Read the properties of a server.

    Raises:
        httpx2.HTTPError: it is unreachable or returns an error.
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
        self.results, self.idle = Results(), IdleChecks()
        self.interrupted = False
        self.tolerance = (0.0 if facts.is_exact else 1e-3) if settings.tolerance is None else settings.tolerance
        longest = min(settings.longest or facts.max_model_len, facts.max_model_len)
        self._traffic = Traffic(settings.seed, facts, longest=longest, burst=settings.burst)
        self._pool = Pool(tolerance=self.tolerance)
        self._numbers, self._sent = itertools.count(), 0
        self._started, self._end = time.monotonic(), math.inf

    @property
    def seconds(self) -> float:
        """Duration so far, or in total when it has ended."""
        return min(time.monotonic(), self._end) - self._started

    async def run(self, log: Callable[[str], None] = lambda _: None) -> None:
        """Run to the end, or until there are too many violations; `log` receives a progress line per phase."""
        self._started = time.monotonic()
        try:
            await self._run(log)
        finally:
            self._end = time.monotonic()

    async def _run(self, log: Callable[[str], None]) -> None:
        chosen = self.settings
        phases = _PHASES_OF_REQUESTS if chosen.requests else _phases(chosen.seconds)
        await self._check_idle()
        for phase in range(1, phases + 1):
            async with connect(chosen.url) as http:
                await asyncio.gather(*(self._client(http, phase / phases) for _ in range(chosen.clients)))
                for _ in range(_REPLAYS_PER_PAUSE):
                    await self._score_alone(http)
            await self._check_idle()
            log(self._line())
            if self.results.should_stop:
                break

    async def _client(self, http: httpx2.AsyncClient, share: float) -> None:
        """Send one request after another until `share` of the soak is done."""
        while self._done() < share and not self.results.should_stop:
            self._sent += 1
            number = next(self._numbers)
            rng = random.Random(f"{self.settings.seed}/{number}/again")
            replay = self._draw_replay(rng) if rng.random() < _REPLAY_SHARE else None
            if replay is not None:
                await self._send_replay(http, number, replay)
            else:
                await self._send_new(http, number, rng)

    def _done(self) -> float:
        """Completed share of the soak, 0 to 1."""
        sent = self._sent / self.settings.requests if self.settings.requests else 0.0
        return max(sent, self.seconds / self.settings.seconds)

    async def _send_new(self, http: httpx2.AsyncClient, number: int, rng: random.Random) -> None:
        request = self._traffic.draw(number)
        names = [f"{number}"] if request.times == 1 else [f"{number}-{copy}" for copy in range(request.times)]
        replies = await asyncio.gather(*(self._send(http, request, name) for name in names))
        if len(replies) == 1 and replies[0] is not None:
            self._pool.add(rng, number, request, replies[0])

    async def _send_replay(self, http: httpx2.AsyncClient, number: int, replay: _Replay) -> None:
        original, request, compare = replay
        reply = await self._send(http, request, f"{number}")
        if reply is not None:
            found = compare(reply)
            self.results.compared(request.kind, found)
            self.results.check(REPLAY, f"{request.kind}, request {number}", summary(found, original), found.tokens)

    async def _score_alone(self, http: httpx2.AsyncClient) -> None:
        number = next(self._numbers)
        if replay := self._draw_sample(random.Random(f"{self.settings.seed}/{number}/alone")):
            await self._send_replay(http, number, replay)

    def _draw_replay(self, rng: random.Random) -> _Replay | None:
        draws = [self._draw_sample, self._draw_original]
        rng.shuffle(draws)
        return draws[0](rng) or draws[1](rng)

    def _draw_sample(self, rng: random.Random) -> _Replay | None:
        sample = self._pool.draw_sample(rng)
        if sample is None:
            return None
        request = scoring_request(rng, sample, self.facts.model)
        return sample.number, request, lambda reply: compare_scores(sample, reply, self.tolerance)

    def _draw_original(self, rng: random.Random) -> _Replay | None:
        original = self._pool.draw_original(rng)
        if original is None:
            return None
        return original.number, repeated_request(original), lambda reply: compare_replies(original, reply)

    async def _send(self, http: httpx2.AsyncClient, request: Request, name: str) -> Reply | None:
        """Send a request and check its answer; return the reply if it is a valid generated answer."""
        answer = await send(http, request, f"soak-{self.settings.seed}-{name}", self.settings.timeout)
        where, results = f"{request.kind}, request {name}", self.results
        results.count(request, answer)
        wrong = list(check_status(request, answer))
        results.check(STATUS, where, wrong)
        if answer.status == 429 and not wrong:  # the client continues with another request after Retry-After
            await asyncio.sleep(min(float(answer.headers.get("retry-after", 1)), _LONGEST_WAIT))
        if wrong or answer.left or answer.status != 200:
            return None
        if request.generates:
            # In a thread, so that arrival times of other answers stay exact.
            reply, wrong = await asyncio.to_thread(checked_reply, request, answer)
            results.check(ANSWER, where, wrong)
            if reply is not None:
                results.tokens(request, answer, reply)
            return None if wrong else reply
        results.check(ANSWER, where, check_page(request, answer))
        if request.follow_up is not None:
            await self._send(http, request.follow_up(answer.body), name)
        return None

    async def _check_idle(self) -> None:
        """Check the idle server over a new connection, with no other open."""
        where = f"after {self.seconds / 60:.1f} minutes"
        try:
            async with connect(self.settings.url) as http:
                wrong, failures = await self.idle.check(http, self.seconds)
        except httpx2.HTTPError as error:
            wrong, failures = [f"{type(error).__name__} instead of /metrics and /load"], []
        self.results.check(IDLE, where, wrong)
        self.results.check(FAILURES, where, failures)

    def _line(self) -> str:
        resident = self.idle.samples[-1].bytes / 1e6 if self.idle.samples else 0.0
        return (
            f"{self._done():4.0%}  {self._sent:,} requests, {self.results.output_tokens:,} tokens, "
            f"{len(self.results.violations)} violations, {resident:,.0f} MB"
        )


def _phases(seconds: float) -> int:
    return max(1, min(_PHASES, int(seconds / _SHORTEST_PHASE)), math.ceil(seconds / _PHASE_SECONDS))
