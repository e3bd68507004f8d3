"""Reads messages, which may have several lines, from a terminal or a pipe."""

import contextlib
from collections.abc import Callable
from typing import TextIO

_FENCE = '"""'


def read_message(ask: Callable[[str], str]) -> str:
    r"""Read a message: a line, lines joined by backslashes at their ends, or lines between two \"\"\".

    Args:
        ask: shows a prompt and returns a line without line end.

    Raises:
        EOFError: the input has ended; an unfinished message is returned first.
    """
    line = ask("> ")
    if line.lstrip().startswith(_FENCE):
        return _fenced(line.lstrip().removeprefix(_FENCE), ask)
    lines = [line]
    with contextlib.suppress(EOFError):
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(ask(". "))
    return "\n".join(lines)


def _fenced(line: str, ask: Callable[[str], str]) -> str:
    lines = [line] if line else []
    with contextlib.suppress(EOFError):
        while not line.rstrip().endswith(_FENCE):
            line = ask(". ")
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines).rstrip("\n")


def lines_of(stream: TextIO) -> Callable[[str], str]:
    """An `ask` function without prompts, for a pipe or a file."""

    def ask(prompt: str) -> str:
        del prompt
        line = stream.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    return ask


class Terminal:
    """An `ask` function for a terminal, with readline's editing and history if available. Nothing is saved to disk."""

    def __init__(self) -> None:
        self._draft = ""
        try:
            import readline
        except ImportError:  # not on every system
            return
        readline.set_auto_history(True)
        readline.set_startup_hook(lambda: self._insert(readline.insert_text))

    def __call__(self, prompt: str) -> str:
        """Read a line."""
        return input(prompt)

    def put_back(self, text: str) -> None:
        """Offer a text of one line for editing at the next prompt, if readline is available."""
        self._draft = "" if "\n" in text else text

    def _insert(self, insert: Callable[[str], None]) -> None:
        draft, self._draft = self._draft, ""
        insert(draft)
