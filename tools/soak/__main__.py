"""The command line."""

import argparse
import asyncio
import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
from rich.console import Console

from serve.config.options import between
from tools.own_server import OwnServer, own_server
from tools.soak.memory import LEAK_MB_PER_HOUR
from tools.soak.report import judge, markdown, sections, show
from tools.soak.soak import MAX_P99_MS, Settings, Soak, read_facts
from tools.soak.tally import PROCESS

# Small, so that requests wait for each other, and a burst is more than the queue takes.
_OWN = ("--max-num-seqs", "8", "--max-model-len", "2048", "--max-num-queued-reqs", "96")
_COMPLAINT = re.compile(r"Traceback|\b(ERROR|CRITICAL)\b")
_MOST_LINES = 5  # of the server's log that are told
_WIDTH = 120

_EPILOG = """\
other flags are those of the server that is started:
  python -m tools.soak --dtype float32 --max-num-seqs 4
  python -m tools.soak --kv-cache-memory 52M    so little that requests lose their pages (of the default model)

exit codes:
  0    all that was checked held
  1    something did not, or there is no server
  2    a mistake in the flags
  130  Ctrl-C, and until then all held
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Soaks a server that runs (--url) or one started for it, and prints the report; the exit code, as --help says."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if options.url is not None and (others or options.model is not None):
        parser.error(f"with --url no server is started, so {' '.join(others) or '--model'} has no part in it")
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
        soak.tally.check(PROCESS, "at the end", _complaints(own))
    judge(soak)
    tables = list(sections(soak))
    show(tables, Console(width=max(_WIDTH, Console().width)))
    if options.report is not None:
        options.report.write_text(markdown(tables), encoding="utf-8")
    return 1 if soak.tally.violations else 130 if soak.interrupted else 0


def _soaked(settings: Settings) -> Soak:
    """A soak that has come to its end, or to Ctrl-C.

    Raises:
        httpx2.HTTPError: there is no server.
    """
    soak = Soak(settings, asyncio.run(read_facts(settings.url)))
    try:
        asyncio.run(soak.run(lambda line: print(line, file=sys.stderr, flush=True)))
    except KeyboardInterrupt:
        soak.interrupted = True
    return soak


def _complaints(server: OwnServer) -> Iterator[str]:
    """What a server that has ended should not have said or done."""
    if server.exit_code != 0:
        yield f"it ended with {server.exit_code} at SIGTERM"
    lines = [line.strip()[:300] for line in server.log if _COMPLAINT.search(line)]
    yield from (f"its log says: {line}" for line in lines[:_MOST_LINES])


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
        description="Mixed traffic for a time, and whether all that must hold has held.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    place = parser.add_argument_group("server")
    place.add_argument("--url", help="one that runs, such as http://127.0.0.1:8000; else one is started")
    place.add_argument("--model", help="hub id, local directory or .gguf file of the one that is started")
    load = parser.add_argument_group("traffic")
    load.add_argument("--minutes", type=between(0.1, 1e5), default=30.0, metavar="X", help="default: 30")
    load.add_argument("--requests", type=between(1, 1 << 40), metavar="N", help="end after so many, if sooner")
    load.add_argument("--clients", type=between(1, 1000), default=24, metavar="N", help="at once; default: 24")
    load.add_argument(
        "--burst", type=between(1, 10_000), default=128, metavar="N", help="requests of a burst; default: 128"
    )
    load.add_argument(
        "--longest", type=between(64, 1 << 24), metavar="N", help="tokens of a long prompt; default: the model's limit"
    )
    load.add_argument(
        "--seed", type=between(0, 1 << 63), default=secrets.randbits(31), metavar="N", help="default: another each time"
    )
    rules = parser.add_argument_group("what must hold")
    rules.add_argument(
        "--timeout", type=between(1.0, 1e5), default=300.0, metavar="X", help="seconds of a request; default: 300"
    )
    rules.add_argument(
        "--tolerance",
        type=between(0.0, 1.0),
        metavar="X",
        help="between two log-probs of the same token; default: 0 on a CPU, else 0.001",
    )
    rules.add_argument(
        "--max-growth",
        type=between(0.0, 1e6),
        default=LEAK_MB_PER_HOUR,
        metavar="X",
        help=f"of resident memory, MB per hour; default: {LEAK_MB_PER_HOUR:g}",
    )
    rules.add_argument(
        "--max-p99-ms",
        type=between(0.0, 1e9),
        default=MAX_P99_MS,
        metavar="X",
        help=f"between two tokens of a stream; default: {MAX_P99_MS:g}",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="the report as Markdown, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
