"""Start-up told line by line: in words, or as JSON objects."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from logging import DEBUG
from typing import TextIO

from serve.server.logs import json_line
from serve.server.startup_events import CompileBegun, Event, ProgramCompiled


class LineReporter:
    """One line an event; of programs only with `verbose`."""

    def __init__(self, stream: TextIO, *, as_json: bool = False, verbose: bool = False) -> None:
        self._stream = stream
        self._as_json = as_json
        self._verbose = verbose

    def tell(self, event: Event) -> None:
        """See Reporter."""
        if event.level <= DEBUG and not self._verbose:
            return
        # One write: other threads may write, too.
        self._stream.write((_json(event) if self._as_json else event.line) + "\n")
        self._stream.flush()

    @contextmanager
    def loading(self) -> Iterator[Callable[[int, int], None]]:
        """See Reporter."""
        yield lambda *_: None

    @contextmanager
    def compiling(self, names: Sequence[str]) -> Iterator[Callable[[ProgramCompiled], None]]:
        """See Reporter."""
        self.tell(CompileBegun(len(names)))
        yield self.tell


def _json(event: Event) -> str:
    fields = asdict(event)
    fields.pop("message", None)  # Failed's own, without "error: "
    message = getattr(event, "message", event.line)
    return json_line(event.level, message, event=event.name, **fields)
