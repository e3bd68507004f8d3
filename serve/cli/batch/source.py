"""Input of a batch: the lines of a file, read as a stream."""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import orjson

_MAX_LINE = 64 * 2**20  # bytes; a line must fit in memory
_CHUNK = 2**20  # bytes in which a longer line is skipped
_BATCH = 64  # rows of a Parquet file, read at once
_BOM = b"\xef\xbb\xbf"


class BatchError(Exception):
    """A batch cannot start or continue. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank."""

    number: int  # from 1, blank lines included
    data: bytes  # without line end
    checksum: int  # CRC-32 of all lines up to this one
    position: int  # progress through the file, in units of `Source.total`
    error: str | None = None  # reason for missing data


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    total: int  # bytes, or rows of a Parquet file
    is_text: bool  # lines are plain text, not JSON values
    lines: Iterator[Line]


@contextmanager
def open_source(path: Path, columns: tuple[str, ...], limit: int | None = None) -> Iterator[Source]:
    """Open a file, whose extension determines the format, to read it up to line number `limit`.

    `columns` are those to read of a Parquet file. Raises BatchError, also while the lines are iterated.
    """
    try:
        if not path.is_file() and path.exists():
            raise BatchError(f"{path}: is not a file; resuming needs a file that can be read again")
        raw = path.open("rb")
    except OSError as error:
        raise BatchError(f"{path}: cannot be read: {error.strerror or error}") from error
    with raw, _decompress(raw, path.suffix) as stream:
        plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        if path.suffix == ".parquet":
            total, lines = _parquet(path, raw, columns)
        else:
            total, lines = os.fstat(raw.fileno()).st_size, _lines(path, stream, raw.tell)
        if limit is not None:
            lines = takewhile(lambda line: line.number <= limit, lines)
        yield Source(path, total, plain.suffix == ".txt", lines)


def _decompress(raw: BinaryIO, suffix: str) -> io.BufferedIOBase | BinaryIO:
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
        while head := stream.readline(_MAX_LINE + 1):
            number += 1
            complete = head.endswith(b"\n") or len(head) <= _MAX_LINE
            data = head.rstrip(b"\r\n") if complete else head
            checksum = zlib.crc32(data, checksum)
            if not complete:
                while rest := stream.readline(_CHUNK):
                    checksum = zlib.crc32(rest, checksum)
                    if rest.endswith(b"\n"):
                        break
                yield Line(number, b"", checksum, tell(), f"is longer than {_MAX_LINE:,} bytes")
                continue
            checksum = zlib.crc32(b"\n", checksum)  # also after a last line without line end
            if number == 1:
                data = data.removeprefix(_BOM)
            if data.strip():
                yield Line(number, data, checksum, tell())
    except (OSError, EOFError, zlib.error) as error:
        raise BatchError(f"{path}:{number + 1}: cannot be read: {error}") from error


def _parquet(path: Path, raw: BinaryIO, columns: tuple[str, ...]) -> tuple[int, Iterator[Line]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(raw)
    except pyarrow.ArrowException as error:
        raise BatchError(f"{path}: is not a Parquet file: {error}") from error
    present = [name for name in columns if name in table.schema_arrow.names]
    return table.metadata.num_rows, _rows(path, table, present)


def _rows(path: Path, table: Any, columns: list[str]) -> Iterator[Line]:
    import pyarrow

    number = checksum = 0
    try:
        for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
            for row in batch.to_pylist():
                number += 1
                data, error = b"", None
                try:
                    data = orjson.dumps(row)
                except TypeError as unsupported:
                    error = f"a column is not text: {unsupported}"
                checksum = zlib.crc32(data + b"\n", checksum)
                yield Line(number, data, checksum, number, error)
    except (OSError, pyarrow.ArrowException) as error:
        raise BatchError(f"{path}:{number + 1}: cannot be read: {error}") from error
