"""What is written, and how far: a run that ends at any moment can be gone on with, without a gap or a double.

Rows are appended to OUTPUT.partial. Every few seconds they are forced to the disk, and then OUTPUT.meta.json, replaced
as a whole, says how many bytes of them count, up to which line, and their sums. Who goes on cuts off what stands behind
these bytes and scores those lines again. When all is written, the rows become OUTPUT.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from serve.cli.score.errors import ScoreError
from serve.cli.score.totals import Sums

_EVERY = 2.0  # seconds between checkpoints: what a killed run has to do again
_ANEW = "--overwrite begins anew"

_NO_FLAGS = ("weights", "format", "fingerprint", "context", "context_stride")

type Finish = Callable[[Path, Path, "Checkpoint"], None]  # makes the second file of the rows in the first


@dataclass(frozen=True, slots=True)
class Paths:
    """An output and what belongs to it."""

    output: Path

    @property
    def partial(self) -> Path:
        """The rows, until all are there."""
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def meta(self) -> Path:
        """What they were made with, and how far they go."""
        return self.output.with_name(f"{self.output.name}.meta.json")


@dataclass(slots=True)
class Checkpoint:
    """How far the rows go."""

    made_with: dict[str, Any]  # what must be the same for a run that goes on
    complete: bool = False  # no more rows will come
    line: int = 0  # the last that is dealt with
    checksum: int = 0  # of the input up to there
    output_bytes: int = 0  # of rows
    longest_row: int = 0  # bytes
    sums: Sums = field(default_factory=Sums)


def read_checkpoint(paths: Paths) -> Checkpoint | None:
    """What an earlier run has left; None if nothing.

    Raises:
        ScoreError: it cannot be gone on with.
    """
    try:
        said = orjson.loads(paths.meta.read_bytes())
        found = Checkpoint(**said | {"sums": Sums(**said["sums"])})
    except FileNotFoundError:
        for path in (paths.output, paths.partial):
            if path.exists() and path.stat().st_size:
                raise ScoreError(f"{path} is there, and no {paths.meta.name} says of what: {_ANEW}") from None
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ScoreError(f"{paths.meta}: is not what a scoring leaves: {_ANEW}") from error
    if not _has_rows(paths, found) and not (found.complete and paths.output.exists()):
        raise ScoreError(f"{paths.partial} lacks rows that {paths.meta.name} tells of: {_ANEW}")
    return found


def _has_rows(paths: Paths, at: Checkpoint) -> bool:
    return paths.partial.exists() and paths.partial.stat().st_size >= at.output_bytes


def check_same(paths: Paths, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ScoreError, with the differences, where rows were made with something else than is wanted now."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        told = "; ".join(f"{_flag(name)} was {_told(found.get(name))}, is {_told(wanted.get(name))}" for name in names)
        raise ScoreError(f"{paths.output} was begun with something else: {told}: {_ANEW}")


def _flag(name: str) -> str:
    return name.replace("_", " ") if name in _NO_FLAGS else "--" + name.replace("_", "-")


def _told(value: Any) -> str:
    return "not said" if value is None else str(value)


@contextmanager
def open_rows(paths: Paths) -> Iterator[BinaryIO]:
    """The file of rows, which no other process has open so at the same time; what is still empty at the end is removed.

    What the files of an output say holds only in here.

    Raises:
        ScoreError: another process has it.
    """
    while True:
        with paths.partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScoreError(f"another process writes to {paths.partial}") from None
            if not _is(file, paths.partial):  # another has made it the output, between open and flock
                continue
            try:
                yield file
            finally:
                if _is(file, paths.partial) and not paths.partial.stat().st_size:
                    paths.partial.unlink()
            return


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is what a path names."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


class Journal:
    """Appends rows. Not thread-safe."""

    def __init__(self, paths: Paths, file: BinaryIO, at: Checkpoint) -> None:
        """`file` is positioned behind the last row that counts."""
        self._paths = paths
        self._file = file
        self._saved = time.monotonic()
        self.at = at

    def add(self, row: bytes, line: int, checksum: int, sums: Sums) -> None:
        """Says that a line is dealt with; from time to time this is put on the disk.

        Args:
            row: with its line's end; empty for a line that has none.
            checksum: of the input up to this line.
        """
        self._file.write(row)
        at = self.at
        at.line, at.checksum = line, checksum
        at.output_bytes += len(row)
        at.longest_row = max(at.longest_row, len(row))
        at.sums.add(sums)
        if time.monotonic() - self._saved >= _EVERY:
            self.save()

    def save(self) -> None:
        """Puts rows and checkpoint on the disk, in this order."""
        self._file.flush()
        os.fsync(self._file.fileno())
        write_meta(self._paths, self.at)
        self._saved = time.monotonic()


@contextmanager
def open_journal(paths: Paths, rows: BinaryIO, at: Checkpoint) -> Iterator[Journal]:
    """Goes on behind a checkpoint; saves where it ends, however it ends. What has no row yet leaves no checkpoint.

    Args:
        rows: what `open_rows` has opened.
    """
    if not at.output_bytes:
        write_meta(paths, at)  # before any row: it tells whose they are
    rows.truncate(at.output_bytes)  # what stands behind does not count
    journal = Journal(paths, rows, at)
    try:
        yield journal
    finally:
        if at.line or at.complete:
            journal.save()
        else:
            paths.meta.unlink()


def finish(paths: Paths, rows: BinaryIO, at: Checkpoint, convert: Finish | None) -> None:
    """Makes the output of the rows of a complete run, over what was there before; harmless where that is done.

    Args:
        rows: what `open_rows` has opened.
        convert: None: the rows are the output.
    """
    if not _has_rows(paths, at):
        return
    rows.truncate(at.output_bytes)
    if convert is None:
        paths.partial.replace(paths.output)
    else:
        unfinished = paths.output.with_name(f"{paths.output.name}.tmp")
        convert(paths.partial, unfinished, at)
        unfinished.replace(paths.output)
    _sync_folder(paths.output.parent)
    paths.partial.unlink(missing_ok=True)


def write_meta(paths: Paths, at: Checkpoint) -> None:
    """Replaces the meta file as a whole."""
    unfinished = paths.meta.with_name(f"{paths.meta.name}.tmp")
    with unfinished.open("wb") as file:
        file.write(orjson.dumps(asdict(at), option=orjson.OPT_INDENT_2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(paths.meta)
    _sync_folder(paths.meta.parent)


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
