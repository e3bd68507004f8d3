"""Input of a scoring: the lines of a file, read as a stream, their token ids, and the windows of long texts."""

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

from serve.jobs.score import EncodedText, TextEncoder, Window, first_window
from serve.text.chat import PromptError

_MAX_LINE = 64 * 2**20  # bytes; a line must fit in memory
_CHUNK = 2**20  # bytes in which a longer line is skipped
_BATCH = 64  # rows of a Parquet file, read at once
_BOM = b"\xef\xbb\xbf"
_PAIR = ("prompt", "completion")
_ID, _TOOLS = "id", "tools"


class ScoreError(Exception):
    """Scoring cannot start or continue. The message is for the user."""


class LineError(Exception):
    """One line cannot be scored. The message says why, without the line's number."""


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

    `columns` are those to read of a Parquet file. Raises ScoreError, also while the lines are iterated.
    """
    try:
        if not path.is_file() and path.exists():
            raise ScoreError(f"{path}: is not a file; resuming needs a file that can be read again")
        raw = path.open("rb")
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read: {error.strerror or error}") from error
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
        raise ScoreError(f"{path}:{number + 1}: cannot be read: {error}") from error


def _parquet(path: Path, raw: BinaryIO, columns: tuple[str, ...]) -> tuple[int, Iterator[Line]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(raw)
    except pyarrow.ArrowException as error:
        raise ScoreError(f"{path}: is not a Parquet file: {error}") from error
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
        raise ScoreError(f"{path}:{number + 1}: cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Context:
    """Context of the model and treatment of longer texts."""

    size: int  # tokens
    long: str  # error, truncate or window
    stride: int  # tokens that each window but the first scores

    def windows(self, tokens: int) -> tuple[Window, ...]:
        """Windows that score each token of a text but the first exactly once; with "truncate", only those that fit.

        Raise LineError if the text is too long and `long` is "error".
        """
        if tokens > self.size and self.long == "error":
            raise LineError(
                f"has {tokens:,} tokens, above the context of {self.size:,}: use --long window to score all of them, "
                "or --long truncate to score the first"
            )
        end = min(tokens, self.size)
        windows = first_window(end)
        while self.long == "window" and end < tokens:
            first, end = end, min(end + self.stride, tokens)
            windows.append(Window(end - self.size, end, first))
        return tuple(windows)

    def identity(self) -> dict[str, int | None]:
        """The values on which the scores depend."""
        return {
            "context": None if self.long == "error" else self.size,
            "context_stride": self.stride if self.long == "window" else None,
        }


def make_context(size: int, long: str, stride: int | None) -> Context:
    """The context of a model; the stride defaults to half of it. Raise ScoreError if it leaves no context."""
    if stride is not None and stride >= size:
        raise ScoreError(f"--stride {stride}: must be below the context of {size:,} tokens")
    return Context(size, long, stride or max(1, size // 2))


@dataclass(frozen=True, slots=True)
class Text:
    encoded: EncodedText
    id: Any = None  # JSON value


@dataclass(frozen=True, slots=True)
class TextReader:
    encoder: TextEncoder
    text_field: str | None = None

    @staticmethod
    def fields(text_field: str | None) -> tuple[str, ...]:
        return (*_text_fields(text_field), *_PAIR, _ID, _TOOLS)

    def read(self, line: Line, *, is_text: bool) -> Text:
        """Encode a line, which is the text itself or a JSON value. Raise LineError if it cannot be scored."""
        if line.error is not None:
            raise LineError(line.error)
        try:
            value = line.data.decode() if is_text else orjson.loads(line.data)
            if isinstance(value, str):
                return Text(self.encoder.text(value, "text"))
            if not isinstance(value, dict):
                raise LineError("is neither a JSON object nor a string")
            return Text(self._encode(value), value.get(_ID))
        except UnicodeDecodeError as error:
            raise LineError(f"is not UTF-8: byte {error.start + 1} of the line") from error
        except orjson.JSONDecodeError as error:
            raise LineError(f"is not JSON: {error}") from error
        except PromptError as error:
            raise LineError(str(error)) from None

    def _encode(self, row: dict[str, Any]) -> EncodedText:
        tools = row.get(_TOOLS)
        for name in _text_fields(self.text_field):
            if row.get(name) is not None:
                return self.encoder.text(row[name], name, tools)
            if self.text_field is None and name == "text" and all(row.get(field) is not None for field in _PAIR):
                return self.encoder.pair(row["prompt"], row["completion"], _PAIR, tools)
        raise LineError(f"has no {self.text_field or 'text, prompt and completion, messages or token_ids'}")


def _text_fields(text_field: str | None) -> tuple[str, ...]:
    """Fields that may hold the text, in order of precedence."""
    return ("text", "messages", "token_ids") if text_field is None else (text_field,)
