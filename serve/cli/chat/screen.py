"""Output of a chat: colored text, statistics of replies, tables of tokens."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from serve.cli.chat.conversation import Alternative, Piece, Reply
from serve.engine.request import FinishReason
from serve.text.tokenizer import Tokenizer

HELP = (
    ("/help", "show this list"),
    ("/why [N]", "show the alternatives of token N of the last reply; without N, of the most surprising one"),
    ("/tokens", "show all tokens of the last reply with their log-probs"),
    ("/retry", "send the last message again for another reply"),
    ("/system [TEXT]", "set the system message; without TEXT show it; - removes it"),
    ("/reset", "start a new chat with the same system message"),
    ("/save FILE", "write the chat and every token's log-probs as JSON"),
    ("/quit", "end, like Ctrl-D; Ctrl-C stops a reply"),
)
_ALTERNATIVES = 10  # shown of a token
_CONTEXT = 8  # tokens shown before it
_SURPRISES = 3  # tokens in the summary
_VISIBLE_BREAK = 0.25  # line breaks with a lower probability are made visible


@dataclass(frozen=True, slots=True)
class Step:
    probability: float  # lower bound
    style: Style
    label: str


def _step(probability: float, label: str, background: str = "", text: str = "black") -> Step:
    return Step(probability, Style.parse(f"{text} on {background}") if background else Style.null(), label)


# Colors of the background, because spaces and line breaks can be surprising, too. Each has a text color that is
# readable on it, whatever the terminal's own colors are.
SCALE = (
    _step(0.9, "90 %"),
    _step(0.5, "50 %", "#d9f0a3"),
    _step(0.25, "25 %", "#f7f48b"),
    _step(0.1, "10 %", "#fed976"),
    _step(0.03, "3 %", "#fdae61"),
    _step(0.01, "1 %", "#f46d43"),
    _step(0.001, "0.1 %", "#d7301f", "white"),
    _step(0.0, "less", "#88125a", "white"),
)


def step_of(logprob: float) -> Step:
    """The step of a log-prob; NaN is in the last step."""
    probability = 0.0 if math.isnan(logprob) else math.exp(min(0.0, logprob))
    return next((step for step in SCALE if probability >= step.probability), SCALE[-1])


def percent(logprob: float) -> str:
    """A log-prob as a probability, such as "3.2 %"."""
    value = 100 * math.exp(min(0.0, logprob))
    if value < 0.01:
        return "below 0.01 %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def legend() -> Text:
    labels = [part for step in SCALE for part in ((f" {step.label} ", step.style), " ")]
    return Text.assemble(("a token's probability was at least  ", "dim"), *labels)


class ChatScreen:
    def __init__(self, console: Console, tokenizer: Tokenizer, *, plain: bool) -> None:
        """Create a screen; `plain` writes only replies and the output of commands, without colors."""
        self.console = console
        self._tokenizer = tokenizer
        self._plain = plain

    def welcome(self, model: str) -> None:
        if self._plain:
            return
        self.note(f'{model}. /help lists the commands. End a line with \\ or enclose lines in """ for a long message.')
        if self.console.color_system and not self.console.no_color:
            self.console.print(legend())

    def piece(self, piece: Piece) -> None:
        self.console.print(Segments([*self._segments(piece)]), end="", soft_wrap=True)

    def summary(self, reply: Reply) -> None:
        self.console.print()
        if self._plain:
            return
        speed = reply.tokens_per_second
        parts = [f"{len(reply.tokens)} tokens", *([] if speed is None else [f"{speed:.1f} tokens/s"])]
        parts.append(f"perplexity {reply.perplexity:.2f}")
        if indices := reply.most_surprising(_SURPRISES):
            labels = (f"#{i + 1} {self._text(reply.tokens[i])} {percent(reply.tokens[i].logprob)}" for i in indices)
            parts.append("most surprising " + ", ".join(labels))
        if reply.finish_reason is None:
            parts.append("stopped")
        elif reply.finish_reason == FinishReason.LENGTH:
            parts.append("truncated at the maximum length")
        self.note("; ".join(parts))

    def note(self, text: str) -> None:
        self.console.print(Text(text, "dim"), soft_wrap=True)

    def help(self) -> None:
        table = Table.grid(padding=(0, 2))
        for command, text in HELP:
            table.add_row(Text(command, "bold"), text)
        self.console.print(table)

    def tokens(self, reply: Reply) -> None:
        table = _table("#", "token", "probability", "log-prob", "rank")
        for i, token in enumerate(reply.tokens, start=1):
            table.add_row(Text(str(i)), *self._cells(token))
        self.console.print(table)

    def why(self, reply: Reply, index: int) -> None:
        token = reply.tokens[index]
        context = reply.tokens[max(0, index - _CONTEXT) : index]
        text = b"".join(self._tokenizer.token_bytes(other.id) for other in context)
        self.note(f"token {index + 1} of {len(reply.tokens)}, after {text.decode(errors='replace')!r}")
        table = _table("", "token", "probability", "log-prob", "rank")
        rows: Sequence[Alternative] = token.alternatives[:_ALTERNATIVES]
        if token.id not in {row.id for row in rows}:
            rows = [*rows, token]
        for row in rows:
            table.add_row(Text("→" if row.id == token.id else ""), *self._cells(row))
        self.console.print(table)

    def _cells(self, token: Alternative) -> list[Text]:
        values = (percent(token.logprob), f"{token.logprob:.4f}", f"{token.rank:,}")
        return [Text(self._text(token), step_of(token.logprob).style), *map(Text, values)]

    def _text(self, token: Alternative) -> str:
        data = self._tokenizer.token_bytes(token.id)
        try:
            return repr(data.decode())
        except UnicodeDecodeError:  # part of a character
            return repr(data).removeprefix("b")

    def _segments(self, piece: Piece) -> Iterator[Segment]:
        """Segments of a piece. No background spans a line break: some terminals would fill the rest of the line."""
        if self._plain:
            yield Segment(printable(piece.text) if self.console.is_terminal else piece.text)
            return
        step = step_of(piece.logprob)
        colors = self.console.color_system is not None and not self.console.no_color
        for line in printable(piece.text).splitlines(keepends=True):
            text = line.removesuffix("\n")
            breaks = "↵" if text != line and colors and step.probability < _VISIBLE_BREAK else ""
            yield Segment(text + breaks, step.style)
            if text != line:
                yield Segment("\n")


def printable(text: str) -> str:
    """Replace control characters, which could control the terminal, by symbols."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) != "Cc" else _symbol(char) for char in text)


def _symbol(control: str) -> str:
    code = ord(control)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in ("", "token") else "right", no_wrap=name != "token")
    return table
