"""`logprobd score`: scores a file, from the checkpoint of an earlier run to its end."""

import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from model.token_logprobs import TokenLogprobs
from model.weights.source import default_model_path, resolve_model
from serve.cli.score.config import ScoreConfig
from serve.cli.score.journal import (
    Checkpoint,
    Journal,
    Paths,
    check_same,
    check_unchanged,
    files_digest,
    finish,
    open_journal,
    open_rows,
    read_checkpoint,
    skip_to,
)
from serve.cli.score.rows import RowWriter, Sums, write_csv, write_parquet
from serve.cli.score.texts import (
    Context,
    Line,
    LineError,
    ScoreError,
    Source,
    Text,
    TextReader,
    make_context,
    open_source,
)
from serve.engine.request import EngineStoppedError
from serve.jobs.request_queue import RequestError
from serve.jobs.results import perplexity
from serve.jobs.score import ScoreRequest, TextEncoder
from serve.llm import LLM
from serve.server.console import Reporter, is_terminal, json_line, start_reporting
from serve.server.model_files import STARTUP_ERRORS, read_template
from serve.server.startup_events import Event, failed

_MODEL_KEYS = ("fingerprint", "context", "context_stride")  # parts of `Checkpoint.made_with` that need a loaded model
_STOPPED = "stopped; run the same command again to resume"
_INTERVAL = 30.0  # seconds between lines of progress


class _StoppedError(Exception):
    """A signal ended the run. Arguments: the exit code and the number of the last line that is written."""


def main(config: ScoreConfig) -> int:
    """Score a file and return the exit code that --help lists."""
    reporter = start_reporting(config)
    paths = Paths(config.output_path)
    try:
        entries = _score(config, paths, reporter)
    except (*STARTUP_ERRORS, ScoreError) as error:
        return reporter.fail(error)
    except OSError as error:
        reporter.report(failed(f"{error.filename or paths.output}: {error.strerror or error}"))
        return 1
    except KeyboardInterrupt as error:  # before the first line or after the last
        if not paths.meta.exists():
            return reporter.fail(error)
        reporter.report(failed(_STOPPED))
        return 130
    except _StoppedError as stopped:
        code, line = stopped.args
        reporter.report(failed(f"after line {line:,}: {_STOPPED}"))
        return int(code)
    for name, value in (*entries, ("output", str(paths.output))):
        print(f"{name:<11} {value}")
    return 0


def _score(config: ScoreConfig, paths: Paths, reporter: Reporter) -> list[tuple[str, str]]:
    """Score the remaining lines. Returns the lines of the summary: name and value."""
    if not paths.output.parent.is_dir():
        raise ScoreError(f"--output {paths.output}: there is no folder {paths.output.parent}")
    columns = TextReader.fields(config.text_field)
    with open_source(config.file, columns, config.limit) as source, open_rows(paths) as rows:
        checkpoint = _previous(config, paths, reporter)
        if checkpoint.complete:
            check_unchanged(source, checkpoint)
            last = ("note", "nothing to do: the output was complete")
        else:
            last = ("speed", _resume(config, paths, source, rows, checkpoint, reporter))
        finish(paths, rows, checkpoint, _converter(config, checkpoint))
    return [*checkpoint.sums.summary(), *([last] if last[1] else [])]


def _previous(config: ScoreConfig, paths: Paths, reporter: Reporter) -> Checkpoint:
    """The checkpoint of an earlier run with the same configuration, or a new one."""
    made_with = _identity(config, lambda line: reporter.report(Event("preparing", line)))
    checkpoint = None if config.overwrite else read_checkpoint(paths)
    if checkpoint is None or not (checkpoint.line or checkpoint.complete):
        return Checkpoint(made_with)
    check_same(paths, checkpoint.made_with, made_with | {name: checkpoint.made_with.get(name) for name in _MODEL_KEYS})
    return checkpoint


def _resume(
    config: ScoreConfig, paths: Paths, source: Source, rows: BinaryIO, checkpoint: Checkpoint, reporter: Reporter
) -> str:
    """Score from a checkpoint on and return the speed, empty if nothing was scored.

    Changes no file until the model is loaded.
    """
    with LLM.open(config.engine, reporter) as llm:
        limits = llm.loaded.limits
        context = make_context(min(limits.max_model_len, limits.cache_tokens), config.long, config.stride)
        made_with = checkpoint.made_with | {"fingerprint": llm.loaded.fingerprint} | context.identity()
        if checkpoint.line:
            check_same(paths, checkpoint.made_with, made_with)
        checkpoint.made_with = made_with
        start, scored_before = time.monotonic(), checkpoint.sums.scored
        with (
            open_journal(paths, rows, checkpoint) as journal,
            Meter(sys.stderr, config.log_format, scored_before) as meter,
        ):
            if checkpoint.line:
                meter.message(f"resuming after line {checkpoint.line:,} of {config.file}")
            scoring = _Scoring(config, source, llm, context, journal, meter)
            if (number := asyncio.run(_until_signal(scoring.run()))) is not None:
                raise _StoppedError(128 + number, checkpoint.line)
            checkpoint.complete = True
    scored, seconds = checkpoint.sums.scored - scored_before, time.monotonic() - start
    return f"{scored / seconds:,.0f} tokens/s" if scored else ""


def _identity(config: ScoreConfig, on_prepare: Callable[[str], None]) -> dict[str, Any]:
    """Everything that determines the rows and is known before the model is loaded."""
    source = config.model and resolve_model(config.model, config.revision)
    values = config.identity() | {"weights": files_digest(source.path if source else default_model_path(on_prepare))}
    if config.tokenizer is not None:
        values["tokenizer"] += f" ({files_digest(config.tokenizer.expanduser())})"
    if (template := read_template(config)) is not None:
        values["chat_template"] = f"sha256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"
    return values


async def _until_signal(work: Coroutine[Any, Any, None]) -> int | None:
    """Run the work to its end. The first SIGINT or SIGTERM cancels it and is returned; later ones are ignored."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if not received:
            loop.call_soon_threadsafe(task.cancel)  # which also wakes the loop
        received.append(number)

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
        return received[0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def _converter(config: ScoreConfig, checkpoint: Checkpoint) -> Callable[[Path, Path], None] | None:
    """Function that writes the output from the rows; None if the rows are the output."""
    if config.output_format == "parquet":
        about = checkpoint.made_with
        return partial(write_parquet, config=config, longest_row=checkpoint.longest_row, about=about)
    return write_csv if config.output_format == "csv" else None


class Meter:
    """Shows progress as --log-format requires: as a bar on a terminal, or else as a line now and then."""

    def __init__(self, stream: TextIO, log_format: str, scored_before: int) -> None:
        """Create a meter; `scored_before`: tokens scored by earlier runs, which do not count for the speed."""
        self._stream = stream
        self._as_json = log_format == "json"
        self._scored_before = scored_before
        self._start = self._last = time.monotonic()
        columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[sums]}"))
        console = Console(file=stream, highlight=False)
        self._shows_bar = log_format == "auto" and is_terminal(stream)
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self._shows_bar)
        self._task = self._bar.add_task("scoring", total=1.0, sums="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, progress: float, sums: Sums) -> None:
        """Show the share of the work done, 0 to 1, and the sums so far."""
        if self._shows_bar:
            self._bar.update(self._task, completed=progress, sums=self._describe(sums))
        elif time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            self.message(f"scoring  {progress:.1%}, {self._describe(sums)}")

    def message(self, text: str, level: int = INFO) -> None:
        """Show a message, such as an error of a line."""
        if self._shows_bar:
            self._bar.console.print(text, style="yellow" if level > INFO else None, markup=False, soft_wrap=True)
        else:
            self._stream.write((json_line(level, text) if self._as_json else text) + "\n")
            self._stream.flush()

    def _describe(self, sums: Sums) -> str:
        rate = (sums.scored - self._scored_before) / max(1e-9, time.monotonic() - self._start)
        value = perplexity(sums.logprob, sums.scored)
        end = "" if value is None else f", perplexity {value:.4g}"
        return f"{sums.lines + sums.skipped:,} lines, {sums.scored:,} tokens, {rate:,.0f} tokens/s{end}"


@dataclass(frozen=True, slots=True)
class ScoreItem(ScoreRequest):
    """A line to score, or the error that prevents it; then it has no tokens."""

    line: Line
    text: Text | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Scoring:
    """Reads, scores and writes the remaining lines of a file."""

    config: ScoreConfig
    source: Source
    llm: LLM
    context: Context
    journal: Journal
    meter: Meter

    async def run(self) -> None:
        """Score until the end or a broken line that is not skipped; raise ScoreError if it cannot continue."""
        skip_to(self.source, self.journal.checkpoint)
        encoder = TextEncoder(self.llm.chats, self.llm.loaded.limits.vocab_size, self.config.add_special_tokens)
        read = partial(self._item, TextReader(encoder, self.config.text_field))
        writer = RowWriter(self.llm.loaded.tokenizer, self.config)
        items = self.llm.stream_scores(map(read, self.source.lines), self.config.top_logprobs)
        try:
            async with aclosing(items):
                async for item, result in items:
                    self._write(writer, item, result)
        except EngineStoppedError:
            raise ScoreError("the engine has stopped") from None

    def _item(self, reader: TextReader, line: Line) -> ScoreItem:
        try:
            text = reader.read(line, is_text=self.source.is_text)
            token_ids = text.encoded.token_ids
            return ScoreItem(token_ids, self.context.windows(len(token_ids)), line, text)
        except LineError as error:
            return ScoreItem([], (), line, error=str(error))

    def _write(self, writer: RowWriter, item: ScoreItem, result: TokenLogprobs | RequestError) -> None:
        line = item.line
        if item.text is not None and isinstance(result, TokenLogprobs):
            row, sums = writer.row(line.number, item.text, len(item.windows), result)
        else:
            message = f"{self.config.file}:{line.number}: {item.error or result}"
            if self.config.on_error != "skip":
                raise ScoreError(f"{message} (--on-error skip leaves such lines out; the rows so far are kept)")
            self.meter.message(message, WARNING)
            row, sums = b"", Sums(skipped=1)
        self.journal.add(row, line, sums)
        read, limit = line.position / max(1, self.source.total), self.config.limit
        progress = read if limit is None else max(read, line.number / limit)
        self.meter.update(min(1.0, progress), self.journal.checkpoint.sums)
