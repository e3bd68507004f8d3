"""`python -m serve chat` in a process with a pseudo-terminal."""

import fcntl
import importlib.util
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.test_bad_models import templated
from tests.support.server_process import ROOT

pytestmark = pytest.mark.slow

_TIMEOUT = 120  # seconds; only reached if something hangs
# The terminal becomes the process's own, so that Ctrl-C reaches it; a shell may have SIGINT ignored in the background.
RUN = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from serve.cli.main import main
sys.exit(main(["chat", *sys.argv[1:]]))
"""
SMALL = ("--max-num-batched-tokens", "17", "--max-model-len", "64", "--max-tokens", "8", "--temperature", "0")


class Screen:
    """A chat on a pseudo-terminal of 100 columns."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )
        os.close(theirs)
        self.seen = ""  # all output, without escape sequences
        self._raw = b""
        self._taken = 0  # characters of `seen` returned so far

    def until(self, text: str, retyped: str = "") -> str:
        """Read until a text appears and return everything up to its end.

        Args:
            retyped: typed again for each second without output. Python's readline misses a Ctrl-C that arrives between
                the prompt and its wait for input.
        """
        deadline = time.monotonic() + _TIMEOUT
        while (at := self.seen.find(text, self._taken)) < 0:
            assert time.monotonic() < deadline, self.seen
            if not select.select([self._ours], [], [], 1)[0]:
                self.type(retyped)
                continue
            self._raw += self._read()
            self.seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._raw.decode(errors="replace")).replace("\r\n", "\n")
        begin, self._taken = self._taken, at + len(text)
        return self.seen[begin : self._taken]

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        """Wait for the exit code."""
        return self.process.wait(_TIMEOUT)

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def _read(self) -> bytes:
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # Linux: the other end is closed
            data = b""
        assert data, f"it ended with {self.process.wait()}:\n{self.seen}"
        return data


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    model = templated("{% for m in messages %}{{ m.content }}{% endfor %}")(tmp_path / "model")
    screen = Screen("--model", str(model), *SMALL, "--compilation-cache-dir", str(tmp_path / "xla"))
    yield screen
    screen.close()


def test_chat_on_a_terminal(screen: Screen) -> None:
    start = screen.until("> ")
    for part in ("╭─ logprobd", "memory    █", "loading", "compiling", "compiled 6 programs in", " 0.1 % "):
        assert part in start, part
    screen.type("\x03")  # Ctrl-C
    screen.until("press Ctrl-D or type /quit to end", retyped="\x03")
    screen.until("> ")
    screen.type("abc\n")
    reply = screen.until("> ")
    assert re.search(r"\n8 tokens; [\d.]+ tokens/s; perplexity [\d.]+", reply), reply
    assert "truncated at the maximum length" in reply
    screen.type("/why 1\n")
    assert "token 1 of 8" in screen.until("> ")
    screen.type("a" * 70 + "\n")
    assert "81 prompt tokens" in screen.until("then /retry.")
    if importlib.util.find_spec("readline"):
        screen.until("> " + "a" * 70)  # offered for editing
        screen.type("\x15")  # Ctrl-U
    screen.type("\x04")  # Ctrl-D
    assert screen.ended() == 0
    assert "Traceback" not in screen.seen
