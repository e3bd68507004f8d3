"""`make bench`: the same load on any OpenAI-compatible server, and what share of the memory's bandwidth it reaches.

Prompts are random token ids, so that no prefix cache helps and any model will do. A decode step must read every
weight once, so weight bytes / read bandwidth is the least time of a step; the bandwidth is measured in the same run.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx2
from rich.console import Console
from rich.table import Table

from serve.bench_host import host_ms_per_step
from serve.bench_limit import decode_bytes, read_bandwidth

_PROMPT, _OUTPUT = 32, 64  # tokens of a decode stream
_LONG = 512  # tokens of a prefill
_REUSED, _CACHED = 900, 800  # tokens of a prompt, and of those the ones that an earlier one began with
_BESIDE = 1500  # tokens of a prompt that comes while a stream runs
_SCORED, _SCORED_AT_ONCE = 48, 16  # lm-eval's shape: short prompts with echo, many in a request


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; what does not apply is None."""

    scenario: str
    tokens_per_second: float
    ttft_ms: float | None = None
    itl_ms: float | None = None
    total_ms: float | None = None
    note: str = ""


class RefusedError(Exception):
    """The server does not do this."""


class Load:
    """A client of one server."""

    def __init__(self, client: httpx2.AsyncClient, model: str, vocabulary: int) -> None:
        self._client = client
        self._model = model
        self._random = random.Random(time.time_ns())
        self._vocabulary = vocabulary

    async def decode(self, streams: int, **extra: object) -> Row:
        """`streams` streams at once, the better of two rounds."""
        name = f"{streams} stream{'s'[: streams > 1]}" + "".join(f", {key}={value}" for key, value in extra.items())
        rounds = [await self._decode_round(name, streams, extra) for _ in range(2)]
        return max(rounds, key=lambda row: row.tokens_per_second)

    async def prefill(self, **extra: object) -> Row:
        """A long prompt and one token: the median of five."""
        seconds = [await self._timed({"prompt": self._ids(_LONG), "max_tokens": 1, **extra}) for _ in range(5)]
        median = statistics.median(seconds)
        name = f"prefill of {_LONG}" + "".join(f", {key}={value}" for key, value in extra.items())
        return Row(name, _LONG / median, total_ms=median * 1e3)

    async def score_short(self) -> Row:
        """Many short prompts in one request, as lm-eval asks for log-likelihoods."""
        prompts = [self._ids(_SCORED) for _ in range(_SCORED_AT_ONCE)]
        seconds = await self._timed({"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1})
        tokens = _SCORED * _SCORED_AT_ONCE
        return Row(f"score {_SCORED_AT_ONCE} prompts of {_SCORED}", tokens / seconds, total_ms=seconds * 1e3)

    async def reuse(self) -> list[Row]:
        """A long prompt scored cold, and with its beginning in the cache: only computed before, or scored as well."""
        rows: list[Row] = []
        scored: dict[str, object] = {"prompt_logprobs": 5, "max_tokens": 1}
        name = f"score {_REUSED}"
        for case, first in (("cold", None), (f"{_CACHED} cached", {"max_tokens": 1}), (f"{_CACHED} scored", scored)):
            seconds = []
            for _ in range(3):
                beginning = self._ids(_CACHED)
                if first is not None:
                    await self._post({"prompt": beginning, **first})
                seconds.append(await self._timed({"prompt": beginning + self._ids(_REUSED - _CACHED), **scored}))
            median = statistics.median(seconds)
            ratio = 1e3 * median / (rows[0].total_ms or 1.0) if rows else 1.0
            note = f"{1 / ratio:.1f} x" if rows else ""
            rows.append(Row(f"{name}, {case}", _REUSED / median, total_ms=median * 1e3, note=note))
        return rows

    async def beside(self) -> Row:
        """The longest wait between two tokens of a stream while a long prompt comes in."""
        stream = asyncio.create_task(self._stream({}))
        seconds = await self._timed({"prompt": self._ids(_BESIDE), "max_tokens": 1})
        _, arrivals = await stream
        gaps = [1e3 * (after - before) for before, after in itertools.pairwise(arrivals)]
        name = f"1 stream beside a prompt of {_BESIDE}"
        return Row(name, _BESIDE / seconds, itl_ms=statistics.median(gaps), note=f"longest {max(gaps):.0f} ms")

    async def _decode_round(self, name: str, streams: int, extra: dict[str, object]) -> Row:
        start = time.perf_counter()
        results = await asyncio.gather(*[self._stream(extra) for _ in range(streams)])
        seconds = time.perf_counter() - start
        return Row(
            name,
            streams * _OUTPUT / seconds,
            ttft_ms=1e3 * statistics.median(arrivals[0] - begun for begun, arrivals in results),
            itl_ms=1e3 * statistics.median((at[-1] - at[0]) / (_OUTPUT - 1) for _, at in results),
        )

    async def _stream(self, extra: dict[str, object]) -> tuple[float, list[float]]:
        body = self._body(
            {"prompt": self._ids(_PROMPT), "max_tokens": _OUTPUT, "min_tokens": _OUTPUT, "ignore_eos": True, **extra}
        )
        body["stream"] = True
        begun = time.perf_counter()
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise _refused(response.status_code, (await response.aread()).decode())
            arrivals = [
                time.perf_counter()
                async for line in response.aiter_lines()
                if line.startswith("data: {") and json.loads(line[6:]).get("choices")
            ]
        return begun, arrivals

    async def _timed(self, body: dict[str, object]) -> float:
        start = time.perf_counter()
        await self._post(body)
        return time.perf_counter() - start

    async def _post(self, body: dict[str, object]) -> None:
        response = await self._client.post("/v1/completions", json=self._body(body))
        if response.status_code != 200:
            raise _refused(response.status_code, response.text)

    def _body(self, body: dict[str, object]) -> dict[str, object]:
        return {"model": self._model, "temperature": 0, **body}

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(100, self._vocabulary) for _ in range(count)]


def _refused(status: int, text: str) -> BaseException:
    """What a status that is not 200 means: other servers refuse some of what is asked here."""
    return RefusedError(text[:200]) if status == 400 else SystemExit(f"{status}: {text[:300]}")


async def measure(url: str, vocabulary: int) -> AsyncIterator[Row]:
    """All scenarios, one after another."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        card = (await client.get("/v1/models")).json()["data"][0]
        load = Load(client, card["id"], vocabulary)
        await load.decode(1)  # not counted: connections, first touches of memory
        for streams in (1, 4, 16):
            yield await load.decode(streams)
        yield await load.decode(16, logprobs=5)
        yield await load.decode(16, temperature=1, top_p=0.9)
        yield await load.prefill()
        for scenario in (load.prefill(prompt_logprobs=5), load.score_short(), load.beside()):
            try:
                yield await scenario
            except RefusedError as error:
                yield Row(f"refused: {error}", 0.0)
        try:
            for row in await load.reuse():
                yield row
        except RefusedError as error:
            yield Row(f"refused: {error}", 0.0)


@contextlib.contextmanager
def own_server(arguments: list[str]) -> Iterator[str]:
    """A server of ours on a free port, for the time of the measurement: its address."""
    command = [sys.executable, "-m", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                # Somebody must read on, or a full pipe would stop the server.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[0]
                break
        else:
            raise SystemExit(process.wait())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def show(rows: list[Row], floor_ms: float | None, gigabytes: float) -> None:
    """The table. Share: the least time of a step over the time between two tokens of one stream."""
    table = Table(
        title=f"read bandwidth {gigabytes:.1f} GB/s" + (f", floor {floor_ms:.1f} ms a step" if floor_ms else "")
    )
    for column in ("scenario", "tokens/s", "TTFT ms", "ITL ms", "total ms", "share of limit", "note"):
        table.add_column(column, justify="left" if column in ("scenario", "note") else "right")
    for row in rows:
        share = f"{floor_ms / row.itl_ms:.0%}" if floor_ms and row.itl_ms else ""
        numbers = [f"{value:.1f}" if value is not None else "" for value in (row.ttft_ms, row.itl_ms, row.total_ms)]
        table.add_row(row.scenario, f"{row.tokens_per_second:.1f}", *numbers, share, row.note)
    Console(width=max(110, Console().width)).print(table)


async def _collect(url: str, vocabulary: int) -> list[Row]:
    return [row async for row in measure(url, vocabulary)]


def main() -> None:
    """Measures a server that runs (--url) or one started for it, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m serve.bench", description="Load client and table.")
    parser.add_argument("--url", help="a server that runs, such as http://127.0.0.1:8000; else one is started")
    parser.add_argument("--model", help="the model's files: served if no --url is given, and the source of the floor")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--vocabulary", type=int, default=30000, help="ids of the random prompts are below it")
    options = parser.parse_args()
    os.environ.setdefault("NO_COLOR", "1")
    gigabytes = read_bandwidth() / 1e9
    host = host_ms_per_step()
    weights = None if options.url and not options.model else decode_bytes(options.model, options.dtype)
    with contextlib.ExitStack() as stack:
        arguments = [*([options.model] if options.model else []), "--dtype", options.dtype]
        url = options.url or stack.enter_context(own_server(arguments))
        rows = asyncio.run(_collect(url, options.vocabulary))
    show(rows, weights / gigabytes / 1e6 if weights else None, gigabytes)
    Console().print(f"host time of our engine: {host:.2f} ms a step of 16 rows (schedule, batch, read-out, events)")


if __name__ == "__main__":
    main()
