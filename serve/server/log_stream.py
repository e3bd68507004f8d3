"""Output that never blocks its writers: a reader of stderr that has stopped must not stop the server."""

import logging
import os
import threading
from collections import deque
from typing import Any, TextIO, cast

logger = logging.getLogger(__name__)

_MAX_BYTES = 16 << 20  # waiting to be written
_CLOSE_SECONDS = 2  # for the last lines


class LogStream:
    """Writes to the file descriptor of a stream, on a thread of its own. What does not fit is dropped and counted."""

    def __init__(self, stream: TextIO, max_bytes: int = _MAX_BYTES) -> None:
        self._stream = stream
        self._descriptor = stream.fileno()
        self._max_bytes = max_bytes
        self._waiting: deque[bytes] = deque()  # the first is being written
        self._num_bytes = self._num_dropped = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._waiting and self._num_bytes + len(data) > self._max_bytes:
                self._num_dropped += 1
            else:
                self._waiting.append(data)
                self._num_bytes += len(data)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Do nothing: it would wait for the reader."""

    def close(self) -> None:
        """Wait until everything is written, with a time limit. The stream stays open."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, _CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting[0]
            is_written = self._write(data)
            with self._changed:
                self._num_bytes -= len(self._waiting.popleft())
                self._num_dropped += not is_written
                num_dropped = self._num_dropped if is_written and not self._waiting else 0
                self._num_dropped -= num_dropped
                self._changed.notify_all()
            if num_dropped:
                logger.warning("%d log messages were dropped: the output did not accept them in time", num_dropped)

    def _write(self, data: bytes) -> bool:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:  # the reader has closed the pipe, or the disk is full
            return False
        return True


def open_log_stream(stream: TextIO) -> TextIO:
    """A LogStream for `stream`, or `stream` itself if it has no file descriptor."""
    try:
        return cast("TextIO", LogStream(stream))
    except OSError:
        return stream
