"""Scoring of a file, from the checkpoint of an earlier run to the end of the file."""

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import takewhile
from logging import WARNING
from pathlib import Path

from model.token_logprobs import TokenLogprobs
from serve.cli.score.journal import Checkpoint, Journal
from serve.cli.score.progress import Meter, Sums
from serve.cli.score.rows import RowWriter
from serve.cli.score.source import Line, LineError, ScoreError, Source
from serve.cli.score.texts import Context, Text, TextReader
from serve.engine.request import EngineStoppedError
from serve.jobs.request_queue import RequestError, RequestQueue
from serve.jobs.score import Scorer, Window


@dataclass(frozen=True, slots=True)
class Work:
    """A line to score."""

    line: Line
    text: Text | None = None
    windows: tuple[Window, ...] = ()
    error: str | None = None  # reason for a missing text

    @property
    def num_tokens(self) -> int:
        """Tokens kept in memory until the line is written."""
        return len(self.text.encoded.token_ids) if self.text else 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Scores of a line, or its error."""

    work: Work
    scores: TokenLogprobs | None = None  # row i: token i + 1, up to the end of the last window
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Reads, scores and writes the lines of a file."""

    path: Path  # of the source, for messages
    source: Source
    reader: TextReader
    context: Context
    writer: RowWriter
    alternatives: int  # of each token
    limit: int | None  # number of the last line to read
    skips: bool  # report broken lines and leave them out; else they end the run

    async def run(self, queue: RequestQueue, journal: Journal, meter: Meter) -> None:
        """Score the remaining lines.

        Raises:
            ScoreError: a line is broken and broken lines are not skipped; the file has changed since the checkpoint;
                the engine has stopped.
        """
        lines = first_lines(self.source, self.limit)
        skip_to(self.path, lines, journal.checkpoint)
        scorer = Scorer(queue, self.alternatives)

        async def score(work: Work) -> Outcome:
            return await score_line(work, scorer)

        try:
            async with aclosing(
                queue.run_in_order(map(self._work, lines), score, lambda work: work.num_tokens)
            ) as outcomes:
                async for outcome in outcomes:
                    self._write(outcome, journal, meter)
        except EngineStoppedError:
            raise ScoreError("the engine has stopped") from None

    def _work(self, line: Line) -> Work:
        try:
            text = self.reader.read(line, is_text=self.source.is_text)
            return Work(line, text, self.context.windows(len(text.encoded.token_ids)))
        except LineError as error:
            return Work(line, error=str(error))

    def _write(self, outcome: Outcome, journal: Journal, meter: Meter) -> None:
        line = outcome.work.line
        text, scores = outcome.work.text, outcome.scores
        if text is not None and scores is not None:
            row, sums = self.writer.row(line.number, text, outcome.work.windows, scores)
        else:
            message = f"{self.path}:{line.number}: {outcome.error}"
            if not self.skips:
                raise ScoreError(f"{message} (--on-error skip leaves such lines out; the rows so far are kept)")
            meter.message(message, WARNING)
            row, sums = b"", Sums(skipped=1)
        journal.add(row, line, sums)
        meter.update(self._progress(line), journal.checkpoint.sums)

    def _progress(self, line: Line) -> float:
        """Share of the work done after a line."""
        read = line.position / max(1, self.source.total)
        return min(1.0, read if self.limit is None else max(read, line.number / self.limit))


async def score_line(work: Work, scorer: Scorer) -> Outcome:
    """The outcome of a line."""
    if work.text is None:
        return Outcome(work, error=work.error)
    try:
        return Outcome(work, await scorer.score(work.text.encoded.token_ids, work.windows))
    except RequestError as error:
        return Outcome(work, error=str(error))


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
