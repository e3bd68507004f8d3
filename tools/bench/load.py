"""Load: a client that measures one server."""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2

from tools.bench.large_bodies import large_bodies
from tools.bench.stalled_reader import rates_next_to_reader

_PROMPT, _OUTPUT = 32, 64  # tokens of a decode stream
LONG = 512  # tokens of a prefill
SCORED_TOKENS, CACHED_TOKENS = 900, 800  # tokens of a prompt, and of its cached prefix
_LONGEST = 2048  # maximum tokens of a prompt during a stream
_CHUNK = 256  # prompt tokens that our server computes between two tokens of a stream
SCORED, SCORED_AT_ONCE = 48, 16  # shape of lm-eval's requests: many short prompts with echo
_REFUSALS = (400, 404, 422, 501)  # statuses of unsupported requests

type Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Figures:
    """A row of the table; None for columns that do not apply."""

    tokens_per_second: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    total_ms: float | None = None
    bandwidth: float | None = None  # bytes/s, measured just before
    note: str = ""

    def share(self, weight_bytes: float) -> float | None:
        """Minimum time of a step divided by the inter-token latency."""
        if self.bandwidth is None or self.itl_ms is None:
            return None
        return 1e3 * weight_bytes / self.bandwidth / self.itl_ms


class RefusedError(Exception):
    """The server does not support a request."""


class FailedError(Exception):
    """The server failed."""


class Load:
    """A client of one server. Public methods measure and raise RefusedError for an unsupported request."""

    def __init__(
        self, client: httpx2.AsyncClient, card: dict[str, Any], vocabulary: int, probe: Callable[[], float]
    ) -> None:
        """`card`: the model's entry in /v1/models; `probe`: measures the read bandwidth."""
        self._client = client
        self._probe = probe
        self.model: str = card["id"]
        self.long_prompt = min(_LONGEST, (card.get("max_model_len") or _LONGEST + 1) - 1)
        self._random = random.Random(time.time_ns())
        self._vocabulary = vocabulary

    async def decode(self, streams: int, **extra: object) -> Figures:
        """Run concurrent streams three times; return the round with the median share of the limit."""
        rounds = [await self._decode_round(streams, extra) for _ in range(3)]
        return sorted(rounds, key=lambda figures: figures.share(1.0) or 0.0)[1]

    async def prefill(self, **extra: object) -> Figures:
        """A long prompt and one token; median of five."""
        seconds = [await self.timed({"prompt": self.ids(LONG), "max_tokens": 1, **extra}) for _ in range(5)]
        median = statistics.median(seconds)
        return Figures(LONG / median, total_ms=median * 1e3)

    async def score_short(self) -> Figures:
        """Many short prompts in one request, like lm-eval's log-likelihood requests."""
        prompts = [self.ids(SCORED) for _ in range(SCORED_AT_ONCE)]
        seconds = await self.timed({"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1})
        return Figures(SCORED * SCORED_AT_ONCE / seconds, total_ms=seconds * 1e3)

    async def reuse(self, before: Body) -> Figures:
        """Score a long prompt whose prefix was sent with the fields `before`, relative to uncached; medians of 3."""
        cold, reused = [], []
        for _ in range(3):
            cold.append(await self.timed(self.scored(self.ids(SCORED_TOKENS))))
            prefix = self.ids(CACHED_TOKENS)
            await self.timed({"prompt": prefix, **before})
            reused.append(await self.timed(self.scored(prefix + self.ids(SCORED_TOKENS - CACHED_TOKENS))))
        median = statistics.median(reused)
        ratio = statistics.median(cold) / median
        return Figures(SCORED_TOKENS / median, total_ms=median * 1e3, note=f"{ratio:.1f} x as fast as uncached")

    async def score(self) -> Figures:
        """Score a long uncached prompt; median of three."""
        seconds = [await self.timed(self.scored(self.ids(SCORED_TOKENS))) for _ in range(3)]
        median = statistics.median(seconds)
        return Figures(SCORED_TOKENS / median, total_ms=median * 1e3)

    async def next_to_prompt(self) -> Figures:
        """The longest gap between two tokens of a stream while a long prompt arrives."""

        def prompt() -> Body:
            return {"prompt": self.ids(self.long_prompt), "max_tokens": 1}

        # Mean over all chunks: later ones take longer because of attention.
        chunk_ms = 1e3 * await self.timed(prompt()) * _CHUNK / self.long_prompt
        arrivals: list[float] = []
        long_request: asyncio.Task[float] | None = None
        async for arrival in self.stream({}):
            arrivals.append(arrival)
            if long_request is None and len(arrivals) == _OUTPUT // 4:
                long_request = asyncio.create_task(self.timed(prompt()))
        assert long_request is not None
        seconds = await long_request
        gaps = [1e3 * (after - before) for before, after in itertools.pairwise(arrivals)]
        usual = statistics.median(gaps[: _OUTPUT // 4 - 1])
        longest = max(gaps)
        note = f"longest gap {longest:.0f} ms, {longest / (usual + chunk_ms):.1f} x (usual + mean chunk)"
        return Figures(self.long_prompt / seconds, itl_ms=usual, note=note)

    async def next_to_large_bodies(self) -> Figures:
        """The longest gap between two tokens of a stream while a long text and many keys arrive."""

        async def send() -> None:
            for body in bodies:
                await self._client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})

        bodies, room = large_bodies(self.model), self.long_prompt - _PROMPT
        arrivals: list[float] = []
        sending: asyncio.Task[None] | None = None
        async with contextlib.aclosing(self.stream({"max_tokens": room, "min_tokens": room})) as stream:
            async for arrival in stream:
                arrivals.append(arrival)
                if sending is None and len(arrivals) == _OUTPUT // 4:
                    sending = asyncio.create_task(send())
                if sending is not None and sending.done():
                    break
        assert sending is not None
        await sending
        gaps = [1e3 * (after - before) for before, after in itertools.pairwise(arrivals)]
        note = f"longest gap {max(gaps):.0f} ms, before the bodies {max(gaps[: _OUTPUT // 4 - 1]):.0f} ms"
        return Figures(itl_ms=statistics.median(gaps), note=note)

    async def next_to_slow_reader(self) -> Figures:
        """The rate of 15 streams next to one whose client does not read."""
        prompt = self.ids(min(1500, self.long_prompt // 2))
        body = self.body(
            {"prompt": prompt, "prompt_logprobs": 20, "logprobs": 20, "max_tokens": 400, "ignore_eos": True}
        )

        async def others() -> float:
            return (await self._decode_round(15, {})).tokens_per_second or 0.0

        try:
            rates = await rates_next_to_reader(self._client, body, others)
        except OSError as error:
            raise RefusedError(str(error)[:80]) from None
        return Figures(rates.unread, note=f"{rates.ratio:.3f} of the rate next to one that reads")

    async def _decode_round(self, streams: int, extra: Body) -> Figures:
        async def one() -> tuple[float, list[float]]:
            return time.perf_counter(), [arrival async for arrival in self.stream(extra)]

        bandwidth = self._probe()
        start = time.perf_counter()
        results = await asyncio.gather(*[one() for _ in range(streams)])
        seconds = time.perf_counter() - start
        return Figures(
            streams * _OUTPUT / seconds,
            ttft_ms=1e3 * statistics.median(arrivals[0] - start for start, arrivals in results),
            itl_ms=1e3 * statistics.median((times[-1] - times[0]) / (_OUTPUT - 1) for _, times in results),
            bandwidth=bandwidth,
        )

    async def stream(self, extra: Body) -> AsyncGenerator[float]:
        """Yield the arrival time of each chunk of a stream."""
        body = self.body(
            {"prompt": self.ids(_PROMPT), "max_tokens": _OUTPUT, "min_tokens": _OUTPUT, "ignore_eos": True, **extra}
        )
        body["stream"] = True
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise _refused(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    yield time.perf_counter()

    async def timed(self, body: Body) -> float:
        start = time.perf_counter()
        await self.post("/v1/completions", self.body(body))
        return time.perf_counter() - start

    async def text(self, tokens: int) -> str:
        """A random text of about that many tokens."""
        words = (await self.post("/detokenize", {"model": self.model, "tokens": self.ids(tokens)}))["prompt"]
        return str(words)

    async def post(self, path: str, body: Body) -> Any:
        response = await self._client.post(path, json=body)
        if response.status_code != 200:
            raise _refused(response.status_code, response.text)
        return response.json()

    @staticmethod
    def scored(prompt: list[int]) -> Body:
        return {"prompt": prompt, "prompt_logprobs": 5, "max_tokens": 1}

    def body(self, body: Body) -> Body:
        return {"model": self.model, "temperature": 0, **body}

    def ids(self, count: int) -> list[int]:
        return [self._random.randrange(100, self._vocabulary) for _ in range(count)]


def _refused(status: int, text: str) -> Exception:
    """Return the exception for a status other than 200: unsupported, or a failure."""
    return RefusedError(text[:80]) if status in _REFUSALS else FailedError(f"{status}: {text[:300]}")
