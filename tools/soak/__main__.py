"""Command line of the soak test."""

import argparse
import asyncio
import contextlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console

from serve.config.options import argument_type
from serve.config.values import Between
from tools.own_server import OwnServer, own_server
from tools.soak.memory import LEAK_MB_PER_HOUR
from tools.soak.report import add_final_checks, markdown, sections, show
from tools.soak.results import PROCESS
from tools.soak.soak import MAX_P99_MS, Settings, Soak, read_facts

# Small, so that requests queue and a burst overflows the queue.
_OWN = ("--max-num-seqs", "8", "--max-model-len", "2048", "--max-num-queued-reqs", "96")
_COMPLAINT = re.compile(r"Traceback|\b(ERROR|CRITICAL)\b")
_MAX_LINES = 5  # lines of the server's log in the report
_WIDTH = 120

_EPILOG = """\
other flags are passed to the server that is started:
  python -m tools.soak --dtype float32 --max-num-seqs 4
  python -m tools.soak --kv-cache-memory 52M    small enough to preempt requests of the default model

exit codes:
  0    all checks passed
  1    a check failed, or the server is unreachable
  2    wrong flags
  130  Ctrl-C, and all checks had passed
"""


def _between(low: float, high: float) -> Callable[[str], Any]:
    return argument_type(Between(low, high))


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak a running server (--url) or one started for it, print the report and return the exit code."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if options.url is not None and (others or options.model is not None):
        parser.error(f"{' '.join(others) or '--model'} cannot be combined with --url: no server is started")
    os.environ.setdefault("NO_COLOR", "1")
    with contextlib.ExitStack() as stack:
        own = None
        if options.url is None:
            model = [options.model] if options.model else []
            own = stack.enter_context(own_server([*model, *_OWN, *others]))
        try:
            soak = _soaked(_settings(options, own.url if own else options.url))
        except httpx2.HTTPError as error:
            print(f"error: {options.url or 'the server'} does not answer: {error}", file=sys.stderr)
            return 1
    if own is not None:
        soak.results.check(PROCESS, "at the end", _log_errors(own))
    add_final_checks(soak)
    tables = list(sections(soak))
    show(tables, Console(width=max(_WIDTH, Console().width)))
    if options.report is not None:
        options.report.write_text(markdown(tables), encoding="utf-8")
    return 1 if soak.results.violations else 130 if soak.interrupted else 0


def _soaked(settings: Settings) -> Soak:
    """Run a soak until its end or Ctrl-C.

    Raises:
        httpx2.HTTPError: the server is unreachable.
    """
    soak = Soak(settings, asyncio.run(read_facts(settings.url)))
    try:
        asyncio.run(soak.run(lambda line: print(line, file=sys.stderr, flush=True)))
    except KeyboardInterrupt:
        soak.interrupted = True
    return soak


def _log_errors(server: OwnServer) -> Iterator[str]:
    """Yield a line for a bad exit code and for each error in the log of a server that has ended."""
    if server.exit_code != 0:
        yield f"the exit code after SIGTERM is {server.exit_code}"
    lines = [line.strip()[:300] for line in server.log if _COMPLAINT.search(line)]
    yield from (f"its log contains: {line}" for line in lines[:_MAX_LINES])


def _settings(options: argparse.Namespace, url: str) -> Settings:
    return Settings(
        url=url,
        seed=options.seed,
        seconds=60 * options.minutes,
        requests=options.requests,
        clients=options.clients,
        burst=options.burst,
        longest=options.longest,
        timeout=options.timeout,
        tolerance=options.tolerance,
        max_growth=options.max_growth,
        max_p99_ms=options.max_p99_ms,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak",
        usage="python -m tools.soak [flags] [flags of the server]",
        description="Send mixed traffic to a server and check every answer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    place = parser.add_argument_group("server")
    place.add_argument("--url", help="a running server, such as http://127.0.0.1:8000; default: start one")
    place.add_argument("--model", help="hub id, local directory or .gguf file for the server that is started")
    load = parser.add_argument_group("traffic")
    load.add_argument("--minutes", type=_between(0.1, 1e5), default=30.0, metavar="X", help="default: 30")
    load.add_argument(
        "--requests", type=_between(1, 1 << 40), metavar="N", help="stop after N requests if that is sooner"
    )
    load.add_argument(
        "--clients", type=_between(1, 1000), default=24, metavar="N", help="concurrent clients; default: 24"
    )
    load.add_argument(
        "--burst", type=_between(1, 10_000), default=128, metavar="N", help="requests per burst; default: 128"
    )
    load.add_argument(
        "--longest", type=_between(64, 1 << 24), metavar="N", help="tokens per long prompt; default: the model's limit"
    )
    load.add_argument(
        "--seed", type=_between(0, 1 << 63), default=secrets.randbits(31), metavar="N", help="default: random"
    )
    rules = parser.add_argument_group("checks")
    rules.add_argument(
        "--timeout",
        type=_between(1.0, 1e5),
        default=300.0,
        metavar="X",
        help="maximum seconds per request; default: 300",
    )
    rules.add_argument(
        "--tolerance",
        type=_between(0.0, 1.0),
        metavar="X",
        help="maximum difference between log-probs of the same token; default: 0 on a CPU, else 0.001",
    )
    rules.add_argument(
        "--max-growth",
        type=_between(0.0, 1e6),
        default=LEAK_MB_PER_HOUR,
        metavar="X",
        help=f"maximum growth of resident memory, MB/h; default: {LEAK_MB_PER_HOUR:g}",
    )
    rules.add_argument(
        "--max-p99-ms",
        type=_between(0.0, 1e9),
        default=MAX_P99_MS,
        metavar="X",
        help=f"maximum p99 between tokens of a stream, ms; default: {MAX_P99_MS:g}",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the report as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
