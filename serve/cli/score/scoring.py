"""One scoring: from where an earlier run has stopped to the end of the file."""

from collections.abc import Iterator
from contextlib import aclosing
from itertools import takewhile
from logging import WARNING
from pathlib import Path

from serve.cli.score.errors import LineError, ScoreError
from serve.cli.score.journal import Checkpoint, Journal
from serve.cli.score.progress import Meter
from serve.cli.score.rows import RowWriter
from serve.cli.score.run import Outcome, Pipeline, Work
from serve.cli.score.source import Line, Source
from serve.cli.score.texts import TextReader
from serve.cli.score.totals import Sums
from serve.cli.score.windows import Context


class Scoring:
    """Joins what reads, scores and writes."""

    def __init__(
        self,
        path: Path,
        source: Source,
        *,
        reader: TextReader,
        context: Context,
        writer: RowWriter,
        limit: int | None,
        skips: bool,
    ) -> None:
        """Prepares a run.

        Args:
            path: of the source, for messages.
            limit: the last line that is read.
            skips: a broken line is told and left out; else it ends the run.
        """
        self._path = path
        self._source = source
        self._reader = reader
        self._context = context
        self._writer = writer
        self._limit = limit
        self._skips = skips

    async def run(self, pipeline: Pipeline, journal: Journal, meter: Meter) -> None:
        """Scores what is left.

        Raises:
            ScoreError: a line is broken, and broken lines are not skipped; or the file is not what it was.
        """
        lines = first_lines(self._source, self._limit)
        skip_to(self._path, lines, journal.at)
        async with aclosing(pipeline.outcomes(map(self._work, lines))) as outcomes:
            async for outcome in outcomes:
                self._write(outcome, journal, meter)

    def _work(self, line: Line) -> Work:
        try:
            text = self._reader.read(line, is_text=self._source.is_text)
            return Work(line, text, tuple(self._context.windows(len(text.token_ids))))
        except LineError as error:
            return Work(line, error=str(error))

    def _write(self, outcome: Outcome, journal: Journal, meter: Meter) -> None:
        line = outcome.work.line
        if outcome.error is None:
            row, sums = self._writer.row(outcome)
        else:
            message = f"{self._path}:{line.number}: {outcome.error}"
            if not self._skips:
                raise ScoreError(f"{message} (--on-error skip leaves such lines out; what is scored is kept)")
            meter.say(message, WARNING)
            row, sums = b"", Sums(skipped=1)
        journal.add(row, line.number, line.checksum, sums)
        meter.at(self._share(line), journal.at.sums)

    def _share(self, line: Line) -> float:
        """Of the work that is done with a line."""
        read = line.position / max(1, self._source.total)
        return min(1.0, read if self._limit is None else max(read, line.number / self._limit))


def first_lines(source: Source, limit: int | None) -> Iterator[Line]:
    """The lines up to the number `limit`, or all."""
    return source.lines if limit is None else takewhile(lambda line: line.number <= limit, source.lines)


def skip_to(path: Path, lines: Iterator[Line], at: Checkpoint) -> None:
    """Reads the lines that are dealt with.

    Raises:
        ScoreError: they are no longer the same.
    """
    if not at.line:
        return
    for line in lines:
        if line.number == at.line and line.checksum == at.checksum:
            return
        if line.number >= at.line:
            break
    raise ScoreError(f"{path} is no longer what it was up to line {at.line:,}: --overwrite begins anew")


def check_no_more(path: Path, lines: Iterator[Line], at: Checkpoint) -> None:
    """Raises ScoreError where the lines are not those, and only those, that are dealt with."""
    skip_to(path, lines, at)
    if (more := next(lines, None)) is not None:
        raise ScoreError(f"{path} has got line {more.number:,} since it was scored: --overwrite begins anew")
