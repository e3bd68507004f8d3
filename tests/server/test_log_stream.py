"""Log output to a pipe without a reader, or with one that does not read."""

import logging
import os
import re
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TextIO

import pytest

from serve.server.console import set_up_logs
from serve.server.log_stream import LogStream, open_log_stream


@pytest.fixture
def pipe() -> Iterator[tuple[FileIO, TextIO]]:
    reader, writer = os.pipe()
    with FileIO(reader) as readable, open(writer, "w", encoding="utf-8") as writable:
        yield readable, writable


def as_text_stream(stream: LogStream) -> TextIO:
    return stream  # type: ignore[return-value]  # it delegates the other methods


@pytest.mark.usefixtures("own_logging")
def test_full_pipe_drops_and_counts_messages(pipe: tuple[FileIO, TextIO]) -> None:
    reader, writer = pipe
    stream = LogStream(writer, max_bytes=100_000)
    set_up_logs("info", stream=as_text_stream(stream))
    logger = logging.getLogger("serve.x")
    for _ in range(5000):
        logger.info("a message of a server whose output is not read: %s", "x" * 100)  # 800 kB in all
    text = ""
    while not (found := re.search(r"WARNING serve\.server\.log_stream: (\d+) log messages were dropped", text)):
        text += reader.read(1 << 16).decode()
    written = text.count("INFO serve.x: a message")
    assert int(found[1]) + written == 5000
    assert 100_000 < len(text) < 300_000  # the buffers of the stream and of the pipe
    logger.info("after")
    stream.close()
    assert reader.read(1 << 16).decode().endswith("serve.x: after\n")


def test_message_above_the_limit_is_written(pipe: tuple[FileIO, TextIO]) -> None:
    reader, writer = pipe
    stream = LogStream(writer, max_bytes=10)
    stream.write("more than ten bytes: é\ud800\n")
    stream.close()
    assert reader.read(100) == "more than ten bytes: é\\ud800\n".encode()


def test_closed_pipe_is_ignored(pipe: tuple[FileIO, TextIO]) -> None:
    reader, writer = pipe
    stream = LogStream(writer)
    reader.close()
    for _ in range(3):
        stream.write("lost\n")
        stream.close()
    assert stream._num_dropped == 3


def test_stream_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as file:
        stream = open_log_stream(file)
        assert (stream.isatty(), stream.encoding) == (file.isatty(), file.encoding)
        stream.write("a line\n")
        stream.close()
        assert path.read_text() == "a line\n"
