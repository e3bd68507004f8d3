"""The command line."""

import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Self

from serve.cli.score.config import ScoreConfig
from serve.cli.score.errors import ScoreError
from serve.cli.score.identity import files_digest, model_digest
from serve.cli.score.journal import (
    Checkpoint,
    Finish,
    Journal,
    Paths,
    check_same,
    finish,
    open_journal,
    open_rows,
    read_checkpoint,
)
from serve.cli.score.progress import open_meter
from serve.cli.score.rows import RowWriter
from serve.cli.score.run import InFlight, Pipeline
from serve.cli.score.scoring import Scoring, check_no_more, first_lines
from serve.cli.score.source import Source, open_source
from serve.cli.score.texts import TextReader
from serve.cli.score.totals import summary
from serve.cli.score.windows import Context, make_context
from serve.server.console import Reporter, start_reporting
from serve.server.model_files import STARTUP_ERRORS, chosen_template
from serve.server.startup import Loaded, load
from serve.server.startup_events import failed, interrupted
from serve.text.chat import ChatFormat

_ROUNDS = 4  # requests in the engine for each that runs: it shall never wait for one
_MAX_TOKENS = 2**17  # of texts in flight: some tens of MB, with 20 alternatives each

_OF_LOADED = ("fingerprint", "context", "context_stride")  # what rows were made with and only a loaded model tells
_GOES_ON = "stopped; the same command goes on from there"


class _StoppedError(Exception):
    """A signal came."""

    def __init__(self, code: int, line: int) -> None:
        super().__init__()
        self.code = code  # the exit code
        self.line = line  # the last that is written


def main(config: ScoreConfig) -> int:
    """Returns the exit code, as --help says."""
    reporter = start_reporting(config)
    paths = Paths(config.writes_to)
    try:
        at, rate = _score(config, paths, reporter)
    except (*STARTUP_ERRORS, ScoreError) as error:
        reporter.report(failed(str(error)))
        return 1
    except OSError as error:
        reporter.report(failed(f"{error.filename or paths.output}: {error.strerror or error}"))
        return 1
    except KeyboardInterrupt:  # before the first line, or after the last
        reporter.report(failed(_GOES_ON) if paths.meta.exists() else interrupted())
        return 130
    except _StoppedError as stopped:
        reporter.report(failed(f"after line {stopped.line:,}: {_GOES_ON}"))
        return stopped.code
    for name, value in (*summary(at.sums), *rate, ("output", str(paths.output))):
        print(f"{name:<11} {value}")
    return 0


def _score(config: ScoreConfig, paths: Paths, reporter: Reporter) -> tuple[Checkpoint, list[tuple[str, str]]]:
    """Scores what is left; where the rows stand, and how fast it was."""
    if not paths.output.parent.is_dir():
        raise ScoreError(f"--output {paths.output}: there is no folder {paths.output.parent}")
    with open_source(config.file, TextReader.fields(config.text_field)) as source, open_rows(paths) as rows:
        at = _begin(config, paths)
        rate = "nothing to do: it was complete"
        if at.complete:
            check_no_more(config.file, first_lines(source, config.limit), at)
        else:
            rate = _go_on(config, paths, source, rows, at, reporter)
        finish(paths, rows, at, _converter(config))
    return at, [("speed", rate)] if rate else []


def _begin(config: ScoreConfig, paths: Paths) -> Checkpoint:
    """Where to begin: behind what an earlier run has written, if anything."""
    wanted = _identity(config)
    found = None if config.overwrite else read_checkpoint(paths)
    if found is None or not (found.line or found.complete):
        return Checkpoint(wanted)
    check_same(paths, found.made_with, wanted | {name: found.made_with.get(name) for name in _OF_LOADED})
    return found


def _go_on(
    config: ScoreConfig, paths: Paths, source: Source, rows: BinaryIO, at: Checkpoint, reporter: Reporter
) -> str:
    """Scores what is left; how fast it was. Until the model is loaded, nothing of an earlier run is touched."""
    loaded = load(config.engine, reporter)
    limits = loaded.limits
    context = make_context(min(limits.max_model_len, limits.cache_tokens), config.long, config.stride)
    made_with = at.made_with | dict(zip(_OF_LOADED, (loaded.fingerprint, *_told_of(context)), strict=True))
    if at.line:
        check_same(paths, at.made_with, made_with)
    at.made_with = made_with
    with open_journal(paths, rows, at) as journal:
        before, begun = at.sums.scored, time.monotonic()
        _drive(config, _scoring(config, source, loaded, context), loaded, journal)
        at.complete = True
    new, seconds = at.sums.scored - before, time.monotonic() - begun
    return f"{new / seconds:,.0f} tokens/s" if new else ""


def _told_of(context: Context) -> tuple[int | None, int | None]:
    """Size and stride, where numbers depend on them."""
    return (
        None if context.long == "error" else context.size,
        context.stride if context.long == "window" else None,
    )


def _identity(config: ScoreConfig) -> dict[str, Any]:
    said = config.identity() | {"weights": model_digest(config.model, config.revision)}
    if config.tokenizer is not None:
        said["tokenizer"] += f" ({files_digest(config.tokenizer.expanduser())})"
    if (template := chosen_template(config)) is not None:
        said["chat_template"] = f"sha256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"
    return said


def _scoring(config: ScoreConfig, source: Source, loaded: Loaded, context: Context) -> Scoring:
    return Scoring(
        config.file,
        source,
        reader=TextReader(
            ChatFormat(loaded.tokenizer, loaded.chat_template),
            loaded.limits.vocab_size,
            text_field=config.text_field,
            add_special_tokens=config.add_special_tokens,
        ),
        context=context,
        writer=RowWriter(
            loaded.tokenizer,
            alternatives=config.top_logprobs,
            per_token=config.per_token,
            windowed=config.long == "window",
            id_as_text=config.writes_parquet,
        ),
        limit=config.limit,
        skips=config.on_error == "skip",
    )


def _drive(config: ScoreConfig, scoring: Scoring, loaded: Loaded, journal: Journal) -> None:
    """Runs an engine and a scoring on it.

    Raises:
        _StoppedError: a signal came.
    """
    bounds = InFlight(
        requests=min(config.max_num_queued_reqs, _ROUNDS * config.max_num_seqs),
        tokens=_MAX_TOKENS,
    )
    engine = loaded.start_engine()
    pipeline = Pipeline(engine, bounds, config.top_logprobs)
    with _Signals() as signals:
        try:
            with open_meter(sys.stderr, config.log_format, journal.at.sums.scored) as meter:
                if journal.at.line:
                    meter.say(f"goes on after line {journal.at.line:,} of {config.file}")
                asyncio.run(signals.run(scoring.run(pipeline, journal, meter)))
        except asyncio.CancelledError:
            if signals.came is None:
                raise
            raise _StoppedError(128 + signals.came, journal.at.line) from None
        finally:
            engine.stop()


class _Signals:
    """While it is open, SIGINT and SIGTERM cancel what it runs, and do nothing while that ends."""

    def __init__(self) -> None:
        self.came: int | None = None  # the first
        self._cancel: Callable[[], object] = lambda: None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs it to its end, or raises CancelledError."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)  # which also wakes the loop
        if self.came is not None:
            task.cancel()
        await task

    def _end(self, number: int, _: FrameType | None) -> None:
        if self.came is None:
            self.came = number
            self._cancel()


def _converter(config: ScoreConfig) -> Finish | None:
    if not config.writes_parquet:
        return None

    def convert(rows: Path, output: Path, at: Checkpoint) -> None:
        from serve.cli.score.parquet import write_parquet  # pyarrow takes half a second, which JSONL need not wait

        write_parquet(
            rows,
            output,
            longest_row=at.longest_row,
            alternatives=config.top_logprobs,
            per_token=config.per_token,
            about=at.made_with,
        )

    return convert
