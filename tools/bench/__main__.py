"""`make bench`: one load for any OpenAI-compatible server, and the share of memory bandwidth that it reaches.

Prompts are random token ids, so that no prefix cache helps and any model can be measured. A decode step reads every
weight once, so weight bytes / read bandwidth is its minimum time; the bandwidth is measured before each round.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from compiled.state import MAX_REQUESTED_IDS
from tools.bench.bandwidth import bandwidth_probe, decode_bytes, is_here
from tools.bench.host import host_ms_per_step
from tools.bench.http_floor import entries_ms, http_share
from tools.bench.large_bodies import large_bodies
from tools.bench.stalled_reader import rates_next_to_reader
from tools.own_server import own_server

_PROMPT, _OUTPUT = 32, 64  # tokens of a decode stream
_LONG = 512  # tokens of a prefill
_SCORED_TOKENS, _CACHED_TOKENS = 900, 800  # tokens of a prompt, and of its cached prefix
_LONGEST = 2048  # maximum tokens of a prompt during a stream
_CHUNK = 256  # prompt tokens that our server computes between two tokens of a stream
_SCORED, _SCORED_AT_ONCE = 48, 16  # shape of lm-eval's requests: many short prompts with echo
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
        self._model: str = card["id"]
        self.long_prompt = min(_LONGEST, (card.get("max_model_len") or _LONGEST + 1) - 1)
        self._random = random.Random(time.time_ns())
        self._vocabulary = vocabulary

    async def decode(self, streams: int, **extra: object) -> Figures:
        """Run concurrent streams three times; return the round with the median share of the limit."""
        rounds = [await self._decode_round(streams, extra) for _ in range(3)]
        return sorted(rounds, key=lambda figures: figures.share(1.0) or 0.0)[1]

    async def prefill(self, **extra: object) -> Figures:
        """A long prompt and one token; median of five."""
        seconds = [await self._timed({"prompt": self._ids(_LONG), "max_tokens": 1, **extra}) for _ in range(5)]
        median = statistics.median(seconds)
        return Figures(_LONG / median, total_ms=median * 1e3)

    async def score_short(self) -> Figures:
        """Many short prompts in one request, like lm-eval's log-likelihood requests."""
        prompts = [self._ids(_SCORED) for _ in range(_SCORED_AT_ONCE)]
        seconds = await self._timed({"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1})
        return Figures(_SCORED * _SCORED_AT_ONCE / seconds, total_ms=seconds * 1e3)

    async def reuse(self, before: Body) -> Figures:
        """Score a long prompt whose prefix was sent with the fields `before`, relative to uncached; medians of 3."""
        cold, reused = [], []
        for _ in range(3):
            cold.append(await self._timed(self._scored(self._ids(_SCORED_TOKENS))))
            prefix = self._ids(_CACHED_TOKENS)
            await self._timed({"prompt": prefix, **before})
            reused.append(await self._timed(self._scored(prefix + self._ids(_SCORED_TOKENS - _CACHED_TOKENS))))
        median = statistics.median(reused)
        ratio = statistics.median(cold) / median
        return Figures(_SCORED_TOKENS / median, total_ms=median * 1e3, note=f"{ratio:.1f} x as fast as uncached")

    async def score(self) -> Figures:
        """Score a long uncached prompt; median of three."""
        seconds = [await self._timed(self._scored(self._ids(_SCORED_TOKENS))) for _ in range(3)]
        median = statistics.median(seconds)
        return Figures(_SCORED_TOKENS / median, total_ms=median * 1e3)

    async def next_to_prompt(self) -> Figures:
        """The longest gap between two tokens of a stream while a long prompt arrives."""

        def prompt() -> Body:
            return {"prompt": self._ids(self.long_prompt), "max_tokens": 1}

        # Mean over all chunks: later ones take longer because of attention.
        chunk_ms = 1e3 * await self._timed(prompt()) * _CHUNK / self.long_prompt
        arrivals: list[float] = []
        long_request: asyncio.Task[float] | None = None
        async for arrival in self._stream({}):
            arrivals.append(arrival)
            if long_request is None and len(arrivals) == _OUTPUT // 4:
                long_request = asyncio.create_task(self._timed(prompt()))
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

        bodies, room = large_bodies(self._model), self.long_prompt - _PROMPT
        arrivals: list[float] = []
        sending: asyncio.Task[None] | None = None
        async with contextlib.aclosing(self._stream({"max_tokens": room, "min_tokens": room})) as stream:
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
        prompt = self._ids(min(1500, self.long_prompt // 2))
        body = self._body(
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
            return time.perf_counter(), [arrival async for arrival in self._stream(extra)]

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

    async def _stream(self, extra: Body) -> AsyncGenerator[float]:
        """Yield the arrival time of each chunk of a stream."""
        body = self._body(
            {"prompt": self._ids(_PROMPT), "max_tokens": _OUTPUT, "min_tokens": _OUTPUT, "ignore_eos": True, **extra}
        )
        body["stream"] = True
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise _refused(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    yield time.perf_counter()

    async def _timed(self, body: Body) -> float:
        start = time.perf_counter()
        response = await self._client.post("/v1/completions", json=self._body(body))
        if response.status_code != 200:
            raise _refused(response.status_code, response.text)
        return time.perf_counter() - start

    @staticmethod
    def _scored(prompt: list[int]) -> Body:
        return {"prompt": prompt, "prompt_logprobs": 5, "max_tokens": 1}

    def _body(self, body: Body) -> Body:
        return {"model": self._model, "temperature": 0, **body}

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(100, self._vocabulary) for _ in range(count)]


def _refused(status: int, text: str) -> Exception:
    """Return the exception for a status other than 200: unsupported, or a failure."""
    return RefusedError(text[:80]) if status in _REFUSALS else FailedError(f"{status}: {text[:300]}")


async def measure(
    client: httpx2.AsyncClient, vocabulary: int, probe: Callable[[], float]
) -> AsyncIterator[tuple[str, Figures]]:
    """Run all scenarios one after another; `client` has the server's address as its base URL."""
    load = Load(client, (await client.get("/v1/models")).json()["data"][0], vocabulary, probe)
    await load.decode(1)  # warm-up
    for name, scenario in _scenarios(load).items():
        try:
            yield name, await scenario()
        except RefusedError as error:
            yield name, Figures(note=f"refused: {error}")


def _scenarios(load: Load) -> dict[str, Callable[[], Awaitable[Figures]]]:
    score = f"score {_SCORED_TOKENS}"
    return {
        "1 stream": lambda: load.decode(1),
        "4 streams": lambda: load.decode(4),
        "16 streams": lambda: load.decode(16),
        "16 streams, logprobs=5": lambda: load.decode(16, logprobs=5),
        "16 streams, temperature=1, top_p=0.9": lambda: load.decode(16, temperature=1, top_p=0.9),
        f"prefill of {_LONG}": load.prefill,
        f"prefill of {_LONG}, prompt_logprobs=5": lambda: load.prefill(prompt_logprobs=5),
        f"score {_SCORED_AT_ONCE} prompts of {_SCORED}": load.score_short,
        f"{score}, uncached": load.score,
        f"{score}, {_CACHED_TOKENS} cached, not scored": lambda: load.reuse({"max_tokens": 1}),
        f"{score}, {_CACHED_TOKENS} scored before": lambda: load.reuse({"max_tokens": 1, "prompt_logprobs": 5}),
        f"1 stream next to a prompt of {load.long_prompt}": load.next_to_prompt,
        "1 stream next to bodies of 1 MB and of 1.5 million keys": load.next_to_large_bodies,
        "15 streams next to an unread one": load.next_to_slow_reader,
    }


def show(rows: dict[str, Figures], weight_bytes: float | None) -> None:
    """Print the table; `weight_bytes` None leaves out the share of the limit."""
    table = Table(title=f"{weight_bytes / 1e6:,.0f} MB of weights per step" if weight_bytes else None)
    for column in ("scenario", "tokens/s", "TTFT ms", "ITL ms", "total ms", "GB/s", "share of limit", "note"):
        table.add_column(column, justify="left" if column in ("scenario", "note") else "right")
    for name, row in rows.items():
        gigabytes = None if row.bandwidth is None or weight_bytes is None else row.bandwidth / 1e9
        numbers = (row.tokens_per_second, row.ttft_ms, row.itl_ms, row.total_ms, gigabytes)
        share = row.share(weight_bytes) if weight_bytes else None
        texts = [f"{value:.1f}" if value is not None else "" for value in numbers]
        table.add_row(name, *texts, f"{share:.0%}" if share else "", row.note)
    Console(width=max(150, Console().width)).print(table)


async def _collect(url: str, vocabulary: int) -> dict[str, Figures]:
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        return {name: figures async for name, figures in measure(client, vocabulary, bandwidth_probe())}


def main() -> None:
    """Measure a running server (--url) or one started for it, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description="Measure throughput and latency of a server."
    )
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:8000; default: start one")
    parser.add_argument("--model", help="the model to serve; with --url, its files, to compute the bandwidth limit")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights")
    parser.add_argument("--quantization", choices=("int8",), help="quantization of the weights")
    parser.add_argument("--vocabulary", type=int, default=30000, help="upper bound of random token ids")
    options = parser.parse_args()
    os.environ.setdefault("NO_COLOR", "1")
    plain, requested = host_ms_per_step(), host_ms_per_step(requested_ids=MAX_REQUESTED_IDS)
    share, serialising = http_share(logprobs=5), entries_ms(tokens=_LONG, k=5)
    known = options.url is None or (options.model is not None and is_here(options.url))
    weights = decode_bytes(options.model, options.quantization or options.dtype) if known else None
    with contextlib.ExitStack() as stack:
        arguments = [*([options.model] if options.model else []), "--dtype", options.dtype]
        arguments += ["--quantization", options.quantization] if options.quantization else []
        url = options.url or stack.enter_context(own_server(arguments)).url
        try:
            rows = asyncio.run(_collect(url, options.vocabulary))
        except FailedError as error:
            raise SystemExit(f"error: {error}") from None
    show(rows, weights)
    Console().print(
        "host time of the engine (schedule, batch, read, events): "
        f"{plain:.2f} ms per step of 16 rows, {requested:.2f} ms with {MAX_REQUESTED_IDS} logprob_token_ids each",
        soft_wrap=True,
    )
    Console().print(
        f"server without the device, 16 streams, logprobs=5, 200 tokens/s: {share:.1%} of one core; "
        f"prompt_logprobs=5 of {_LONG} tokens as JSON: {serialising:.1f} ms",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
