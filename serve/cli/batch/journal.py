"""Journal: the output and its checkpoints. A run that ends at any moment can be resumed without gaps or duplicates.

Rows are appended to OUTPUT.partial. Every few seconds they are synced to disk; then OUTPUT.meta.json is replaced
atomically. It holds the number of valid bytes, the last line and the sums. Resuming truncates the rows to the valid
bytes and continues with the remaining lines. When all rows are written, they become OUTPUT.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

import orjson

from serve.cli.batch.source import BatchError, Line, Source

_INTERVAL = 2.0  # seconds between checkpoints: the work that a killed run has to repeat
_OVERWRITE = "use --overwrite to start again"
_NOT_FLAGS = ("weights", "format", "fingerprint", "context", "context_stride")  # of `Checkpoint.made_with`
_SAMPLE = 2**16  # bytes at each end of a file: names and shapes, and some of the values
_MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class Paths:
    """An output and its accompanying files."""

    output: Path

    @property
    def partial(self) -> Path:  # the rows until the run is complete
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def meta(self) -> Path:  # the checkpoint
        return self.output.with_name(f"{self.output.name}.meta.json")


@dataclass(slots=True)
class LineSums:
    """Sums over the lines that are done; commands add fields."""

    lines: int = 0
    skipped: int = 0  # broken lines

    def add(self, other: Self) -> None:
        for name in (item.name for item in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Checkpoint[S: LineSums]:
    made_with: dict[str, Any]  # must be equal in a run that resumes
    sums: S
    complete: bool = False  # all lines are done
    line: int = 0  # last line that is done
    checksum: int = 0  # of the input up to this line
    output_bytes: int = 0  # of rows
    longest_row: int = 0  # bytes


def skip_to(source: Source, checkpoint: Checkpoint[Any]) -> None:
    """Skip the lines before a checkpoint; raise BatchError if they have changed."""
    if not checkpoint.line:
        return
    for line in source.lines:
        if line.number == checkpoint.line and line.checksum == checkpoint.checksum:
            return
        if line.number >= checkpoint.line:
            break
    raise BatchError(f"{source.path} has changed up to line {checkpoint.line:,}; use --overwrite to start again")


def check_unchanged(source: Source, checkpoint: Checkpoint[Any]) -> None:
    """Raise BatchError if the file has changed or grown since a complete run."""
    skip_to(source, checkpoint)
    if (line := next(source.lines, None)) is not None:
        raise BatchError(f"{source.path} has a new line {line.number:,}; use --overwrite to start again")


def read_checkpoint[S: LineSums](paths: Paths, kind: type[S]) -> Checkpoint[S] | None:
    """The checkpoint of an earlier run, with sums of `kind`, if there is one.

    Raise BatchError if the run cannot be resumed.
    """
    try:
        values = orjson.loads(paths.meta.read_bytes())
        checkpoint = Checkpoint(**values | {"sums": kind(**values["sums"])})
    except FileNotFoundError:
        for path in (paths.output, paths.partial):
            if path.exists() and path.stat().st_size:
                raise BatchError(f"{path} exists without {paths.meta.name}; {_OVERWRITE}") from None
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BatchError(f"{paths.meta} is not a checkpoint of this command; {_OVERWRITE}") from error
    if not _has_rows(paths, checkpoint) and not (checkpoint.complete and paths.output.exists()):
        raise BatchError(f"{paths.partial} lacks rows that {paths.meta.name} lists; {_OVERWRITE}")
    return checkpoint


def _has_rows(paths: Paths, checkpoint: Checkpoint[Any]) -> bool:
    return paths.partial.exists() and paths.partial.stat().st_size >= checkpoint.output_bytes


def check_same(paths: Paths, previous: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise BatchError with the differences between what the rows were made with and what this run would use."""
    differences = []
    for name in {**previous, **current}:
        if previous.get(name) != current.get(name):
            label = name.replace("_", " ") if name in _NOT_FLAGS else "--" + name.replace("_", "-")
            old, new = ("unset" if (value := values.get(name)) is None else value for values in (previous, current))
            differences.append(f"{label} {old}, not {new}")
    if differences:
        raise BatchError(f"{paths.output} was started with {', '.join(differences)}; {_OVERWRITE}")


@contextmanager
def open_rows(paths: Paths) -> Iterator[BinaryIO]:
    """Open and lock the file of rows; remove it at the end if it is empty. Raise BatchError if it is locked.

    The files of an output may only be read and changed in this context.
    """
    while True:
        with paths.partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchError(f"another process writes to {paths.partial}") from None
            if not _is_at(file, paths.partial):  # another process renamed it between open and flock
                continue
            try:
                yield file
            finally:
                if _is_at(file, paths.partial) and not paths.partial.stat().st_size:
                    paths.partial.unlink()
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


@dataclass(slots=True)
class Journal[S: LineSums]:
    """Appends rows. Not thread-safe."""

    paths: Paths
    rows: BinaryIO
    checkpoint: Checkpoint[S]
    saved: float = field(default_factory=time.monotonic)

    def add(self, row: bytes, line: Line, sums: S) -> None:
        """Append the row of a line, empty if the line was skipped, and save from time to time."""
        self.rows.write(row)
        checkpoint = self.checkpoint
        checkpoint.line, checkpoint.checksum = line.number, line.checksum
        checkpoint.output_bytes += len(row)
        checkpoint.longest_row = max(checkpoint.longest_row, len(row))
        checkpoint.sums.add(sums)
        if time.monotonic() - self.saved >= _INTERVAL:
            self.save()

    def save(self) -> None:
        """Sync the rows, then the checkpoint, to disk."""
        self.rows.flush()
        os.fsync(self.rows.fileno())
        write_meta(self.paths, self.checkpoint)
        self.saved = time.monotonic()


@contextmanager
def open_journal[S: LineSums](paths: Paths, rows: BinaryIO, checkpoint: Checkpoint[S]) -> Iterator[Journal[S]]:
    """Continue from a checkpoint, which is updated in place; save it at the end, also after an exception.

    Without a row, no checkpoint is left.
    """
    if not checkpoint.output_bytes:
        write_meta(paths, checkpoint)  # before any row, so that rows never exist without it
    rows.truncate(checkpoint.output_bytes)  # later bytes are not valid
    journal = Journal(paths, rows, checkpoint)
    try:
        yield journal
    finally:
        if checkpoint.line or checkpoint.complete:
            journal.save()
        else:
            paths.meta.unlink()


def finish(
    paths: Paths, rows: BinaryIO, checkpoint: Checkpoint[Any], convert: Callable[[Path, Path], None] | None
) -> None:
    """Replace the output by the rows of a complete run, if that is not done yet.

    `convert` writes its second file from the rows in its first; None makes the rows the output.
    """
    if not _has_rows(paths, checkpoint):
        return
    rows.truncate(checkpoint.output_bytes)
    if convert is None:
        paths.partial.replace(paths.output)
    else:
        unfinished = paths.output.with_name(f"{paths.output.name}.tmp")
        convert(paths.partial, unfinished)
        unfinished.replace(paths.output)
    _sync_folder(paths.output.parent)
    paths.partial.unlink(missing_ok=True)


def write_meta(paths: Paths, checkpoint: Checkpoint[Any]) -> None:
    unfinished = paths.meta.with_name(f"{paths.meta.name}.tmp")
    with unfinished.open("wb") as file:
        file.write(orjson.dumps(asdict(checkpoint), option=orjson.OPT_INDENT_2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(paths.meta)
    _sync_folder(paths.meta.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_digest(path: Path) -> str:
    """Digest of the names, the sizes and both ends of a file, or of a folder's model files; equal for a copy."""
    files = sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            head = opened.read(_SAMPLE)
            opened.seek(max(len(head), size - _SAMPLE))
            digest.update(head + opened.read(_SAMPLE))
    return digest.hexdigest()[:16]
