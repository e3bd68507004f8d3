"""`logprobd score`: joins files, model and engine."""

import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from model.weights.source import default_model_path, resolve_model
from serve.cli.score.config import ScoreConfig
from serve.cli.score.journal import (
    Checkpoint,
    Journal,
    Paths,
    check_same,
    files_digest,
    finish,
    open_journal,
    open_rows,
    read_checkpoint,
)
from serve.cli.score.rows import write_csv, write_parquet
from serve.cli.score.scoring import Meter, Scoring, check_unchanged, summary
from serve.cli.score.texts import ScoreError, Source, TextReader, make_context, open_source
from serve.llm import LLM
from serve.server.console import Reporter, start_reporting
from serve.server.model_files import STARTUP_ERRORS, chosen_template
from serve.server.startup_events import Event, failed

_MODEL_KEYS = ("fingerprint", "context", "context_stride")  # parts of `Checkpoint.made_with` that need a loaded model
_STOPPED = "stopped; run the same command again to resume"


class _StoppedError(Exception):
    """A signal ended the run. Arguments: the exit code and the number of the last line that is written."""


def main(config: ScoreConfig) -> int:
    """Score a file and return the exit code that --help lists."""
    reporter = start_reporting(config)
    paths = Paths(config.output_path)
    try:
        entries, speed = _score(config, paths, reporter)
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
    if speed:
        entries.append(("speed", speed))
    for name, value in (*entries, ("output", str(paths.output))):
        print(f"{name:<11} {value}")
    return 0


def _score(config: ScoreConfig, paths: Paths, reporter: Reporter) -> tuple[list[tuple[str, str]], str]:
    """Score the remaining lines. Returns the totals and the speed as text, empty if nothing was scored."""
    if not paths.output.parent.is_dir():
        raise ScoreError(f"--output {paths.output}: there is no folder {paths.output.parent}")
    columns = TextReader.fields(config.text_field)
    with open_source(config.file, columns, config.limit) as source, open_rows(paths) as rows:
        checkpoint = _previous(config, paths, reporter)
        speed = "nothing to do: the output was complete"
        if checkpoint.complete:
            check_unchanged(source, checkpoint)
        else:
            speed = _resume(config, paths, source, rows, checkpoint, reporter)
        finish(paths, rows, checkpoint, _converter(config, checkpoint))
    return summary(checkpoint.sums), speed


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
    """Score from a checkpoint on and return the speed. Changes no file until the model is loaded."""
    with LLM.open(config.engine, reporter) as llm:
        limits = llm.loaded.limits
        context = make_context(min(limits.max_model_len, limits.cache_tokens), config.long, config.stride)
        made_with = checkpoint.made_with | {"fingerprint": llm.loaded.fingerprint} | context.identity()
        if checkpoint.line:
            check_same(paths, checkpoint.made_with, made_with)
        checkpoint.made_with = made_with
        with open_journal(paths, rows, checkpoint) as journal:
            before, start = checkpoint.sums.scored, time.monotonic()
            _run(config, Scoring(config, source, llm, context), journal)
            checkpoint.complete = True
    scored, seconds = checkpoint.sums.scored - before, time.monotonic() - start
    return f"{scored / seconds:,.0f} tokens/s" if scored else ""


def _identity(config: ScoreConfig, on_prepare: Callable[[str], None]) -> dict[str, Any]:
    """Everything that determines the rows and is known before the model is loaded."""
    source = config.model and resolve_model(config.model, config.revision)
    values = config.identity() | {"weights": files_digest(source.path if source else default_model_path(on_prepare))}
    if config.tokenizer is not None:
        values["tokenizer"] += f" ({files_digest(config.tokenizer.expanduser())})"
    if (template := chosen_template(config)) is not None:
        values["chat_template"] = f"sha256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"
    return values


def _run(config: ScoreConfig, scoring: Scoring, journal: Journal) -> None:
    """Run a scoring on an engine; raise _StoppedError if a signal arrives."""
    with Meter(sys.stderr, config.log_format, journal.checkpoint.sums.scored) as meter:
        if journal.checkpoint.line:
            meter.message(f"resuming after line {journal.checkpoint.line:,} of {config.file}")
        number = asyncio.run(_until_signal(scoring.run(journal, meter)))
    if number is not None:
        raise _StoppedError(128 + number, journal.checkpoint.line)


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
