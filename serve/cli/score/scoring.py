"""Scoring of a file, from the checkpoint of an earlier run to the end of the file, with its progress on stderr."""

import time
from contextlib import aclosing
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from model.token_logprobs import TokenLogprobs
from serve.cli.score.config import ScoreConfig
from serve.cli.score.journal import Checkpoint, Journal
from serve.cli.score.rows import RowWriter, Sums
from serve.cli.score.texts import Context, Line, LineError, ScoreError, Source, Text, TextReader
from serve.engine.request import EngineStoppedError
from serve.jobs.request_queue import RequestError
from serve.jobs.results import perplexity
from serve.jobs.score import ScoreRequest, TextEncoder
from serve.llm import LLM
from serve.server.console import is_terminal, json_line

_INTERVAL = 30.0  # seconds between lines of progress


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

    def update(self, done: float, sums: Sums) -> None:
        """Show the share of the work done, 0 to 1, and the sums so far."""
        if self._shows_bar:
            self._bar.update(self._task, completed=done, sums=self._describe(sums))
        elif time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            self.message(f"scoring  {done:.1%}, {self._describe(sums)}")

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


class Scoring:
    """Reads, scores and writes the lines of a file."""

    def __init__(self, config: ScoreConfig, source: Source, llm: LLM, context: Context) -> None:
        self._config = config
        self._source = source
        self._llm = llm
        self._context = context
        encoder = TextEncoder(llm.chats, llm.loaded.limits.vocab_size, config.add_special_tokens)
        self._reader = TextReader(encoder, config.text_field)
        self._writer = RowWriter(llm.loaded.tokenizer, config)

    async def run(self, journal: Journal, meter: Meter) -> None:
        """Score the remaining lines.

        Raises:
            ScoreError: a line is broken and broken lines are not skipped; the file has changed since the checkpoint;
                the engine has stopped.
        """
        skip_to(self._source, journal.checkpoint)
        items = self._llm.stream_scores(map(self._item, self._source.lines), self._config.top_logprobs)
        try:
            async with aclosing(items):
                async for item, result in items:
                    self._write(item, result, journal, meter)
        except EngineStoppedError:
            raise ScoreError("the engine has stopped") from None

    def _item(self, line: Line) -> ScoreItem:
        try:
            text = self._reader.read(line, is_text=self._source.is_text)
            token_ids = text.encoded.token_ids
            return ScoreItem(token_ids, self._context.windows(len(token_ids)), line, text)
        except LineError as error:
            return ScoreItem([], (), line, error=str(error))

    def _write(self, item: ScoreItem, result: TokenLogprobs | RequestError, journal: Journal, meter: Meter) -> None:
        line = item.line
        if item.text is not None and isinstance(result, TokenLogprobs):
            row, sums = self._writer.row(line.number, item.text, len(item.windows), result)
        else:
            message = f"{self._config.file}:{line.number}: {item.error or result}"
            if self._config.on_error != "skip":
                raise ScoreError(f"{message} (--on-error skip leaves such lines out; the rows so far are kept)")
            meter.message(message, WARNING)
            row, sums = b"", Sums(skipped=1)
        journal.add(row, line, sums)
        meter.update(self._progress(line), journal.checkpoint.sums)

    def _progress(self, line: Line) -> float:
        """Share of the work done after a line."""
        read, limit = line.position / max(1, self._source.total), self._config.limit
        return min(1.0, read if limit is None else max(read, line.number / limit))


def skip_to(source: Source, checkpoint: Checkpoint) -> None:
    """Skip the lines before a checkpoint; raise ScoreError if they have changed."""
    if not checkpoint.line:
        return
    for line in source.lines:
        if line.number == checkpoint.line and line.checksum == checkpoint.checksum:
            return
        if line.number >= checkpoint.line:
            break
    raise ScoreError(f"{source.path} has changed up to line {checkpoint.line:,}; use --overwrite to start again")


def check_unchanged(source: Source, checkpoint: Checkpoint) -> None:
    """Raise ScoreError if the file has changed or grown since a complete run."""
    skip_to(source, checkpoint)
    if (line := next(source.lines, None)) is not None:
        raise ScoreError(f"{source.path} has a new line {line.number:,}; use --overwrite to start again")


def summary(sums: Sums) -> list[tuple[str, str]]:
    """Names and values to print at the end."""
    skipped = f", {sums.skipped:,} skipped" if sums.skipped else ""
    entries = [("lines", f"{sums.lines:,} scored{skipped}"), ("tokens", f"{sums.scored:,} scored of {sums.tokens:,}")]
    if sums.scored:
        entries += [
            ("log-prob", f"{sums.logprob / sums.scored:.6f} per token"),
            ("perplexity", _number(perplexity(sums.logprob, sums.scored))),
            ("bits/byte", _number(sums.bits_per_byte)),
            ("rank 1", f"{sums.rank_1 / sums.scored:.2%} of the tokens"),
        ]
    if sums.completions:
        number = _number(perplexity(sums.completion_logprob, sums.completion_tokens))
        entries += [
            ("completions", f"{sums.completions:,}, perplexity {number}"),
            ("greedy", f"{sums.greedy / sums.completions:.2%} of them"),
        ]
    return entries


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
