"""Scoring of a file, from the checkpoint of an earlier run to the end of the file."""

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from logging import WARNING
from pathlib import Path

from model.token_logprobs import TokenLogprobs
from serve.cli.score.config import ScoreConfig
from serve.cli.score.journal import Checkpoint, Journal
from serve.cli.score.progress import Meter, Sums
from serve.cli.score.rows import RowWriter
from serve.cli.score.texts import Context, Line, LineError, ScoreError, Source, Text, TextReader
from serve.engine.request import EngineStoppedError
from serve.jobs.request_queue import RequestError, RequestQueue
from serve.jobs.score import Scorer, Window


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """A line to score; with its scores or its error once it is done."""

    line: Line
    text: Text | None = None
    windows: tuple[Window, ...] = ()
    scores: TokenLogprobs | None = None  # row i: token i + 1, up to the end of the last window
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens kept in memory until the line is written."""
        return len(self.text.encoded.token_ids) if self.text else 0


@dataclass(frozen=True, slots=True)
class Scoring:
    """Reads, scores and writes the lines of a file."""

    config: ScoreConfig
    source: Source
    reader: TextReader
    context: Context
    writer: RowWriter

    async def run(self, queue: RequestQueue, journal: Journal, meter: Meter) -> None:
        """Score the remaining lines.

        Raises:
            ScoreError: a line is broken and broken lines are not skipped; the file has changed since the checkpoint;
                the engine has stopped.
        """
        lines = first_lines(self.source, self.config.limit)
        skip_to(self.config.file, lines, journal.checkpoint)
        score = partial(score_line, scorer=Scorer(queue, self.config.top_logprobs))
        items = map(self._item, lines)
        try:
            async with aclosing(queue.run_in_order(items, score, lambda item: item.num_tokens)) as results:
                async for item in results:
                    self._write(item, journal, meter)
        except EngineStoppedError:
            raise ScoreError("the engine has stopped") from None

    def _item(self, line: Line) -> ScoreItem:
        try:
            text = self.reader.read(line, is_text=self.source.is_text)
            return ScoreItem(line, text, self.context.windows(len(text.encoded.token_ids)))
        except LineError as error:
            return ScoreItem(line, error=str(error))

    def _write(self, item: ScoreItem, journal: Journal, meter: Meter) -> None:
        line = item.line
        if item.text is not None and item.scores is not None:
            row, sums = self.writer.row(line.number, item.text, item.windows, item.scores)
        else:
            message = f"{self.config.file}:{line.number}: {item.error}"
            if self.config.on_error != "skip":
                raise ScoreError(f"{message} (--on-error skip leaves such lines out; the rows so far are kept)")
            meter.message(message, WARNING)
            row, sums = b"", Sums(skipped=1)
        journal.add(row, line, sums)
        meter.update(self._progress(line), journal.checkpoint.sums)

    def _progress(self, line: Line) -> float:
        """Share of the work done after a line."""
        read, limit = line.position / max(1, self.source.total), self.config.limit
        return min(1.0, read if limit is None else max(read, line.number / limit))


async def score_line(item: ScoreItem, scorer: Scorer) -> ScoreItem:
    """The item with its scores, or the error of its request."""
    if item.text is None:
        return item
    try:
        return replace(item, scores=await scorer.score(item.text.encoded.token_ids, item.windows))
    except RequestError as error:
        return replace(item, error=str(error))


def first_lines(source: Source, limit: int | None) -> Iterator[Line]:
    """The lines up to number `limit`, or all."""
    return source.lines if limit is None else takewhile(lambda line: line.number <= limit, source.lines)


def skip_to(path: Path, lines: Iterator[Line], checkpoint: Checkpoint) -> None:
    """Skip the lines before a checkpoint.

    Raises:
        ScoreError: they have changed.
    """
    if not checkpoint.line:
        return
    for line in lines:
        if line.number == checkpoint.line and line.checksum == checkpoint.checksum:
            return
        if line.number >= checkpoint.line:
            break
    raise ScoreError(f"{path} has changed up to line {checkpoint.line:,}; use --overwrite to start again")


def check_no_more(path: Path, lines: Iterator[Line], checkpoint: Checkpoint) -> None:
    """Raise ScoreError if the file has changed or grown since a complete run."""
    skip_to(path, lines, checkpoint)
    if (line := next(lines, None)) is not None:
        raise ScoreError(f"{path} has got line {line.number:,} since it was scored; use --overwrite to start again")
