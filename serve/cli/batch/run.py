"""Runs a command on the lines of a file, from the checkpoint of an earlier run to the end."""

import asyncio
import hashlib
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, ClassVar, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from model.weights.source import default_model_path, resolve_model
from serve.cli.batch.config import BatchConfig
from serve.cli.batch.journal import (
    Checkpoint,
    Journal,
    LineSums,
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
from serve.cli.batch.source import BatchError, Line, Source, open_source
from serve.engine.request import EngineStoppedError
from serve.llm import LLM
from serve.server.console import Reporter, is_terminal, json_line, start_reporting
from serve.server.model_files import STARTUP_ERRORS, read_template
from serve.server.startup_events import Event, failed

_MODEL_KEYS = ("fingerprint", "context", "context_stride")  # parts of `Checkpoint.made_with` that need a loaded model
_STOPPED = "stopped; run the same command again to resume"
_INTERVAL = 30.0  # seconds between lines of progress


class _StoppedError(Exception):
    """A signal ended the run. Arguments: the exit code and the number of the last line that is written."""


class Batch[C: BatchConfig, S: LineSums](ABC):
    """What a command does with the lines of a file."""

    label: ClassVar[str]  # of progress
    unit: ClassVar[str]  # plural of what `units` counts

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    @abstractmethod
    def sums(self) -> type[S]: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns to read of a Parquet file."""
        return ()

    def model_identity(self, llm: LLM) -> dict[str, Any]:
        """Everything that determines the rows and is known when the model is loaded, except its fingerprint."""
        del llm
        return {}

    @abstractmethod
    async def run(self, llm: LLM, source: Source, output: "Output[S]") -> None:
        """Process the remaining lines, in order. Raise BatchError if it cannot continue."""

    @property
    def converter(self) -> Callable[[Path, Path, Checkpoint[S]], None] | None:
        """Function that writes the output, its second file, from the rows; None if the rows are the output."""
        return None

    @abstractmethod
    def units(self, sums: S) -> int: ...

    @abstractmethod
    def describe(self, sums: S, rate: str) -> str:
        """The sums as a line of progress; `rate` is in units per second."""

    @abstractmethod
    def summary(self, sums: S) -> list[tuple[str, str]]:
        """Names and values to print at the end."""

    def report(self, output: Path) -> str:
        """More to print at the end, from the finished output."""
        del output
        return ""


def run_batch[C: BatchConfig, S: LineSums](batch: Batch[C, S]) -> int:
    """Run a command and return the exit code that its --help lists."""
    config = batch.config
    reporter = start_reporting(config)
    paths = Paths(config.output_path)
    try:
        entries = _run(batch, paths, reporter)
        for name, value in (*entries, ("output", str(paths.output))):
            print(f"{name:<11} {value}")
        if text := batch.report(paths.output):
            print(text)
    except (*STARTUP_ERRORS, BatchError) as error:
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
    return 0


def _run[C: BatchConfig, S: LineSums](batch: Batch[C, S], paths: Paths, reporter: Reporter) -> list[tuple[str, str]]:
    """Process the remaining lines. Returns the lines of the summary: name and value."""
    config = batch.config
    if not paths.output.parent.is_dir():
        raise BatchError(f"--output {paths.output}: there is no folder {paths.output.parent}")
    with open_source(config.file, batch.columns, config.limit) as source, open_rows(paths) as rows:
        checkpoint = _previous(batch, paths, reporter)
        if checkpoint.complete:
            check_unchanged(source, checkpoint)
            last = ("note", "nothing to do: the output was complete")
        else:
            last = ("speed", _resume(batch, paths, source, rows, checkpoint, reporter))
        convert = batch.converter
        finish(paths, rows, checkpoint, convert and (lambda part, output: convert(part, output, checkpoint)))
    return [*batch.summary(checkpoint.sums), *([last] if last[1] else [])]


def _previous[C: BatchConfig, S: LineSums](batch: Batch[C, S], paths: Paths, reporter: Reporter) -> Checkpoint[S]:
    """The checkpoint of an earlier run with the same configuration, or a new one."""
    made_with = _identity(batch.config, lambda line: reporter.report(Event("preparing", line)))
    checkpoint = None if batch.config.overwrite else read_checkpoint(paths, batch.sums)
    if checkpoint is None or not (checkpoint.line or checkpoint.complete):
        return Checkpoint(made_with, batch.sums())
    check_same(paths, checkpoint.made_with, made_with | {name: checkpoint.made_with.get(name) for name in _MODEL_KEYS})
    return checkpoint


def _resume[C: BatchConfig, S: LineSums](
    batch: Batch[C, S], paths: Paths, source: Source, rows: BinaryIO, checkpoint: Checkpoint[S], reporter: Reporter
) -> str:
    """Run from a checkpoint on and return the speed, empty if nothing was done.

    Changes no file until the model is loaded.
    """
    config = batch.config
    with LLM.open(config.engine, reporter) as llm:
        fingerprint = {"fingerprint": llm.loaded.fingerprint}
        made_with = checkpoint.made_with | fingerprint | batch.model_identity(llm)
        if checkpoint.line:
            check_same(paths, checkpoint.made_with, made_with)
        checkpoint.made_with = made_with
        start, units_before = time.monotonic(), batch.units(checkpoint.sums)
        with (
            open_journal(paths, rows, checkpoint) as journal,
            Meter(sys.stderr, config.log_format, batch, units_before) as meter,
        ):
            if checkpoint.line:
                meter.message(f"resuming after line {checkpoint.line:,} of {config.file}")
            output = Output(config, source, journal, meter)
            if (number := asyncio.run(_until_signal(_process(batch, llm, source, output)))) is not None:
                raise _StoppedError(128 + number, checkpoint.line)
            checkpoint.complete = True
    units, seconds = batch.units(checkpoint.sums) - units_before, time.monotonic() - start
    return f"{units / seconds:,.{0 if units >= 10 * seconds else 1}f} {batch.unit}/s" if units else ""


async def _process[C: BatchConfig, S: LineSums](
    batch: Batch[C, S], llm: LLM, source: Source, output: "Output[S]"
) -> None:
    skip_to(source, output.journal.checkpoint)
    try:
        await batch.run(llm, source, output)
    except EngineStoppedError:
        raise BatchError("the engine has stopped") from None


def _identity(config: BatchConfig, on_prepare: Callable[[str], None]) -> dict[str, Any]:
    """Everything that determines the rows and is known before the model is loaded."""
    source = config.model and resolve_model(config.model, config.revision, on_prepare)
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


class Meter[C: BatchConfig, S: LineSums]:
    """Shows progress as --log-format requires: as a bar on a terminal, or else as a line now and then."""

    def __init__(self, stream: TextIO, log_format: str, batch: Batch[C, S], units_before: int) -> None:
        """Create a meter; `units_before`: done by earlier runs, which does not count for the speed."""
        self._stream = stream
        self._as_json = log_format == "json"
        self._batch = batch
        self._units_before = units_before
        self._start = self._last = time.monotonic()
        columns = (TextColumn(batch.label), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[sums]}"))
        console = Console(file=stream, highlight=False)
        self._shows_bar = log_format == "auto" and is_terminal(stream)
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self._shows_bar)
        self._task = self._bar.add_task(batch.label, total=1.0, sums="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, progress: float, sums: S) -> None:
        """Show the share of the work done, 0 to 1, and the sums so far."""
        if self._shows_bar:
            self._bar.update(self._task, completed=progress, sums=self._describe(sums))
        elif time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            self.message(f"{self._batch.label}  {progress:.1%}, {self._describe(sums)}")

    def message(self, text: str, level: int = INFO) -> None:
        """Show a message, such as an error of a line."""
        if self._shows_bar:
            self._bar.console.print(text, style="yellow" if level > INFO else None, markup=False, soft_wrap=True)
        else:
            self._stream.write((json_line(level, text) if self._as_json else text) + "\n")
            self._stream.flush()

    def _describe(self, sums: S) -> str:
        units = self._batch.units(sums) - self._units_before
        rate = units / max(1e-9, time.monotonic() - self._start)
        return self._batch.describe(sums, f"{rate:,.0f} {self._batch.unit}/s")


@dataclass(frozen=True, slots=True)
class Output[S: LineSums]:
    """Takes the results of lines, in order."""

    config: BatchConfig
    source: Source
    journal: Journal[S]
    meter: Meter[Any, S]

    def write(self, line: Line, row: bytes, sums: S) -> None:
        """Write the row of a line; `row` is empty for a line without one."""
        self.journal.add(row, line, sums)
        read, limit = line.position / max(1, self.source.total), self.config.limit
        progress = read if limit is None else max(read, line.number / limit)
        self.meter.update(min(1.0, progress), self.journal.checkpoint.sums)

    def warn(self, message: str) -> None:
        self.meter.message(message, WARNING)
