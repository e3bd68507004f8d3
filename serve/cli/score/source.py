"""The lines of a file, read as a stream: JSONL, text, gzip, zstd, Parquet."""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from serve.cli.score.errors import ScoreError

_LONGEST = 64 * 2**20  # bytes of a line: what is longer is no text, and would have to be held in memory
_PIECE = 2**20  # bytes in which such a line is skipped
_ROWS = 64  # of a Parquet file, read at once
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank."""

    number: int  # from 1, blank ones counted
    data: bytes  # without its end
    checksum: int  # CRC-32 of all lines up to this one
    position: int  # how much of the file has been read, of `Source.total`
    error: str | None = None  # why there is no data


@dataclass(frozen=True, slots=True)
class Source:
    """A file that is being read."""

    total: int  # bytes, or rows of a Parquet file
    is_text: bool  # else each line is a JSON value
    lines: Iterator[Line]


@contextmanager
def open_source(path: Path, columns: tuple[str, ...]) -> Iterator[Source]:
    """The lines of a file; its extension says how they are read.

    Args:
        columns: of a Parquet file, where they are there; others are not read.

    Raises:
        ScoreError: the file cannot be read; also while lines are read.
    """
    with _opened(path) as raw:
        if path.suffix == ".parquet":
            yield _parquet(path, raw, columns)
            return
        with _unpacked(raw, path.suffix) as stream:
            plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
            size = os.fstat(raw.fileno()).st_size
            yield Source(size, plain.suffix == ".txt", _lines(path, stream, raw.tell))


def _opened(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ScoreError(f"{path}: is not a file; what cannot be read again could not be gone on with")
        return path.open("rb")
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read: {error.strerror or error}") from error


def _unpacked(raw: BinaryIO, suffix: str) -> io.BufferedIOBase | BinaryIO:
    if suffix == ".gz":
        return gzip.open(raw, "rb")
    if suffix == ".zst":
        import pyarrow  # takes half a second, which most runs need not wait

        unpacked: Any = pyarrow.CompressedInputStream(raw, "zstd")
        return io.BufferedReader(unpacked)
    return raw


def _lines(path: Path, stream: io.BufferedIOBase | BinaryIO, tell: Callable[[], int]) -> Iterator[Line]:
    number = checksum = 0
    try:
        while head := stream.readline(_LONGEST + 1):
            number += 1
            whole = head.endswith(b"\n") or len(head) <= _LONGEST
            data = head.rstrip(b"\r\n") if whole else head
            checksum = zlib.crc32(data, checksum)
            if not whole:
                checksum = _skip(stream, checksum)
                yield Line(number, b"", checksum, tell(), f"is longer than {_LONGEST:,} bytes")
                continue
            checksum = zlib.crc32(b"\n", checksum)  # whether or not the last line has an end
            if number == 1:
                data = data.removeprefix(_BOM)
            if data.strip():
                yield Line(number, data, checksum, tell())
    except (OSError, EOFError, zlib.error) as error:
        raise ScoreError(f"{path}:{number + 1}: cannot be read on: {error}") from error


def _skip(stream: io.BufferedIOBase | BinaryIO, checksum: int) -> int:
    """Reads to the end of a line."""
    while rest := stream.readline(_PIECE):
        checksum = zlib.crc32(rest, checksum)
        if rest.endswith(b"\n"):
            break
    return checksum


def _parquet(path: Path, raw: BinaryIO, columns: tuple[str, ...]) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(raw)
    except pyarrow.ArrowException as error:
        raise ScoreError(f"{path}: is not a Parquet file: {error}") from error
    there = [name for name in columns if name in table.schema_arrow.names]
    return Source(table.metadata.num_rows, False, _rows(path, table, there))


def _rows(path: Path, table: Any, columns: list[str]) -> Iterator[Line]:
    import pyarrow

    number = checksum = 0
    try:
        for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                data, error = _as_json(row)
                checksum = zlib.crc32(data + b"\n", checksum)
                yield Line(number, data, checksum, number, error)
    except (OSError, pyarrow.ArrowException) as error:
        raise ScoreError(f"{path}:{number + 1}: cannot be read on: {error}") from error


def _as_json(row: dict[str, Any]) -> tuple[bytes, str | None]:
    try:
        return orjson.dumps(row), None
    except TypeError as error:
        return b"", f"a column is no text: {error}"
