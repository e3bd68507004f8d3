"""`make bench`: one load for any OpenAI-compatible server, and the share of memory bandwidth that it reaches.

Prompts are random token ids, so that no prefix cache helps and any model can be measured. A decode step reads every
weight once, so weight bytes / read bandwidth is its minimum time; the bandwidth is measured before each round.
"""

import argparse
import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
from rich.console import Console
from rich.table import Table

from compiled.state import MAX_REQUESTED_IDS
from serve.config.engine_config import QUANTIZATIONS, EngineConfig
from tools.bench.bandwidth import bandwidth_probe, decode_bytes, is_here
from tools.bench.host import host_ms_of_decisions, host_ms_per_step
from tools.bench.http_floor import entries_ms, http_share
from tools.bench.load import (
    CACHED_TOKENS,
    LONG,
    SCORED,
    SCORED_AT_ONCE,
    SCORED_TOKENS,
    FailedError,
    Figures,
    Load,
    RefusedError,
)
from tools.bench.packed import packed_scenarios
from tools.bench.products import ROWS, Product, measured_products
from tools.own_server import own_server


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
    score = f"score {SCORED_TOKENS}"
    return {
        "1 stream": lambda: load.decode(1),
        "4 streams": lambda: load.decode(4),
        "16 streams": lambda: load.decode(16),
        "16 streams, logprobs=5": lambda: load.decode(16, logprobs=5),
        "16 streams, temperature=1, top_p=0.9": lambda: load.decode(16, temperature=1, top_p=0.9),
        f"prefill of {LONG}": load.prefill,
        f"prefill of {LONG}, prompt_logprobs=5": lambda: load.prefill(prompt_logprobs=5),
        f"score {SCORED_AT_ONCE} prompts of {SCORED}": load.score_short,
        f"{score}, uncached": load.score,
        f"{score}, {CACHED_TOKENS} cached, not scored": lambda: load.reuse({"max_tokens": 1}),
        f"{score}, {CACHED_TOKENS} scored before": lambda: load.reuse({"max_tokens": 1, "prompt_logprobs": 5}),
        f"1 stream next to a prompt of {load.long_prompt}": load.next_to_prompt,
        "1 stream next to bodies of 1 MB and of 1.5 million keys": load.next_to_large_bodies,
        "15 streams next to an unread one": load.next_to_slow_reader,
        **packed_scenarios(load),
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


def product_line(product: Product) -> str:
    n, k = product.shape
    return (
        f"product of {ROWS} rows with {product.format} [{n} x {k}]: {product.rate / 1e9:,.0f} GFLOP/s, "
        f"{product.rate / product.peak:.0%} of {product.peak / 1e9:,.0f} GFLOP/s of float32 multiply-adds in registers"
    )


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
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="as of the server")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="as of the server")
    parser.add_argument("--vocabulary", type=int, default=30000, help="upper bound of random token ids")
    options = parser.parse_args()
    os.environ.setdefault("NO_COLOR", "1")
    plain, requested = host_ms_per_step(), host_ms_per_step(requested_ids=MAX_REQUESTED_IDS)
    first, further = host_ms_of_decisions()
    share, serialising = http_share(logprobs=5), entries_ms(tokens=LONG, k=5)
    known = options.url is None or (options.model is not None and is_here(options.url))
    config = EngineConfig(model=options.model, dtype=options.dtype, quantization=options.quantization)
    weights = decode_bytes(config) if known else None
    products = measured_products(config) if known else []
    with contextlib.ExitStack() as stack:
        arguments = [*([options.model] if options.model else []), "--dtype", options.dtype]
        arguments += ["--quantization", options.quantization]
        url = options.url or stack.enter_context(own_server(arguments)).url
        try:
            rows = asyncio.run(_collect(url, options.vocabulary))
        except FailedError as error:
            raise SystemExit(f"error: {error}") from None
    show(rows, weights)
    for product in products:
        Console().print(product_line(product), soft_wrap=True)
    Console().print(
        "host time of the engine (schedule, batch, read, events): "
        f"{plain:.2f} ms per step of 16 rows, {requested:.2f} ms with {MAX_REQUESTED_IDS} logprob_token_ids each",
        soft_wrap=True,
    )
    Console().print(
        f"decisions: host time of the first question on one state {first:.2f} ms, of each further one {further:.2f} ms",
        soft_wrap=True,
    )
    Console().print(
        f"server without the device, 16 streams, logprobs=5, 200 tokens/s: {share:.1%} of one core; "
        f"prompt_logprobs=5 of {LONG} tokens as JSON: {serialising:.1f} ms",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
