"""Cost of serving without the device: a server process whose steps compute nothing, but take their time.

Running this module starts that server.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx2
import numpy as np
import uvicorn

from compiled.state import MAX_REQUESTED_IDS, DecodeInput, SamplingArrays, StepOutput
from model.kv_cache import PAGE_SIZE
from model.token_logprobs import TokenLogprobs
from model.weights.source import default_model_path
from serve.api.app import create_app
from serve.api.context import ServedModel
from serve.api.logprobs import wire_logprobs
from serve.api.metrics import Metrics
from serve.api.prompt_logprobs import EntryWriter
from serve.config.config import ServeConfig
from serve.engine.engine import Engine
from serve.engine.request import (
    EngineLimits,
    EngineOptions,
)
from serve.server.model_files import local_tokenizer
from tools.bench.host import NullRunner

_STREAMS = 16
_TOKENS_PER_SECOND = 200
_TOKENS = 125  # per stream: ten seconds
_CONTEXT = 4096
_CPU_SECONDS = re.compile(r"^process_cpu_seconds_total (\S+)$", re.MULTILINE)


class PacedRunner(NullRunner):
    """A runner with the pace of a device that generates 200 tokens/s in 16 rows."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(rows=_STREAMS, vocab_size=vocab_size, max_logprobs=20)
        self._due: dict[int, float] = {}  # keyed by id() of the output
        self._busy_until = 0.0

    def decode(self, inputs: DecodeInput, sampling: SamplingArrays) -> StepOutput:
        """Return NullRunner's output."""
        output = super().decode(inputs, sampling)
        self._busy_until = max(time.monotonic(), self._busy_until) + _STREAMS / _TOKENS_PER_SECOND
        self._due[id(output)] = self._busy_until
        return output

    def read(self, tree: Any) -> Any:
        """Wait until the device would be done."""
        wait = self._due.pop(id(tree), 0.0) - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        return tree


def http_share(**fields: object) -> float:
    """Return the share of one core that a server process needs for 16 streams with 200 tokens/s in total."""
    command = [sys.executable, "-m", "tools.bench.http_floor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            return asyncio.run(_measure(url, fields))
        finally:
            server.terminate()


def entries_ms(*, tokens: int, k: int) -> float:
    """Return the median milliseconds to serialize `prompt_logprobs` of a prompt of random tokens."""
    tokenizer = local_tokenizer(default_model_path())
    rng, rows, vocabulary = np.random.default_rng(), tokens - 1, tokenizer.vocab_size
    scores = TokenLogprobs(
        logprob=-rng.exponential(size=rows).astype(np.float32),
        rank=rng.integers(1, vocabulary, rows, np.int32),
        top_ids=rng.integers(0, vocabulary, (rows, k), np.int32),
        top_ranks=np.tile(np.arange(1, k + 1, dtype=np.int32), (rows, 1)),
        top_logprobs=-rng.exponential(size=(rows, k)).astype(np.float32),
    )
    prompt, writer, seconds = rng.integers(0, vocabulary, tokens).tolist(), EntryWriter(tokenizer), []
    for _ in range(15):
        start = time.perf_counter()
        b"".join(writer.blocks(prompt, wire_logprobs(scores, rows, k), 1))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


async def _measure(url: str, fields: dict[str, object]) -> float:
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        await _stream(client, 3, fields)  # warm-up
        before, start = await _cpu_seconds(client), time.monotonic()
        await asyncio.gather(*(_stream(client, _TOKENS, fields) for _ in range(_STREAMS)))
        seconds = time.monotonic() - start
        return (await _cpu_seconds(client) - before) / seconds


async def _cpu_seconds(client: httpx2.AsyncClient) -> float:
    found = _CPU_SECONDS.search((await client.get("/metrics")).text)
    assert found is not None
    return float(found[1])


async def _stream(client: httpx2.AsyncClient, tokens: int, fields: dict[str, object]) -> None:
    body = {"prompt": [7] * 8, "max_tokens": tokens, "ignore_eos": True, "stream": True, **fields}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        count = sum([line.startswith("data: {") async for line in response.aiter_lines()])
    assert count == tokens


def _serve() -> None:
    tokenizer = local_tokenizer(default_model_path())
    runner = PacedRunner(tokenizer.vocab_size)
    limits = EngineLimits(
        max_model_len=_CONTEXT,
        max_logprobs=20,
        vocab_size=tokenizer.vocab_size,
        cache_tokens=(runner.pages - 1) * PAGE_SIZE,
        max_requested_ids=MAX_REQUESTED_IDS,
        full_vocab=False,
    )
    metrics = Metrics("null", max_model_len=_CONTEXT, vllm_names=False)
    engine = Engine(runner, limits, EngineOptions(max_num_batched_tokens=272, max_num_queued_reqs=64), metrics)
    metrics.watch(lambda: engine.gauges, {})
    engine.start()
    app = create_app(engine, ServedModel(("null",), tokenizer), ServeConfig(), metrics)
    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    listener = config.bind_socket()
    listener.listen()  # connections before the server runs wait
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    _serve()
