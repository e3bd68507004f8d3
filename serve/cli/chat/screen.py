"""What a chat shows: pieces in their colours, the numbers of a reply, tables of tokens."""

import unicodedata
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from serve.cli.chat.pieces import Piece
from serve.cli.chat.reply import Alternative, Reply, Said
from serve.cli.chat.surprise import legend, percent, step_of
from serve.engine.request import FinishReason
from serve.text.tokenizer import Tokenizer

HELP = (
    ("/help", "this"),
    ("/why [N]", "what else token N of the last reply could have been; without N, its most surprising one"),
    ("/tokens", "all tokens of the last reply with their numbers"),
    ("/retry", "sends the last message again, for another reply"),
    ("/system [TEXT]", "sets the message that comes before all others; without TEXT shows it; - removes it"),
    ("/reset", "forgets what was said, but not the system message"),
    ("/save FILE", "writes the chat and every token's numbers as JSON"),
    ("/quit", "ends, as Ctrl-D does; Ctrl-C stops a reply"),
)
_SHOWN = 10  # alternatives of a token
_BEFORE = 8  # tokens that are shown before it
_NAMED = 3  # most surprising tokens
_MARKED = 0.25  # line breaks below this probability are made visible


class ChatScreen:
    """Writes to the console of a chat."""

    def __init__(self, console: Console, tokenizer: Tokenizer, *, plain: bool) -> None:
        """`plain` leaves out all that was not asked for: replies alone are written."""
        self.console = console
        self._tokenizer = tokenizer
        self._plain = plain

    def welcome(self, model: str) -> None:
        """The first lines."""
        if self._plain:
            return
        self.say(
            f'{model}. /help tells the commands, \\ at the end of a line or """ around lines makes a long message.'
        )
        if self.console.color_system and not self.console.no_color:
            self.console.print(legend())

    def piece(self, piece: Piece) -> None:
        """The next piece of a reply."""
        self.console.print(Segments([*self._segments(piece)]), end="", soft_wrap=True)

    def ended(self, reply: Reply) -> None:
        """What follows the last piece: the numbers."""
        self.console.print()
        if self._plain:
            return
        speed = reply.tokens_per_second
        parts = [f"{len(reply.tokens)} tokens", *([] if speed is None else [f"{speed:.1f} tokens/s"])]
        parts.append(f"perplexity {reply.perplexity:.2f}")
        if places := reply.most_surprising(_NAMED):
            told = (f"#{i + 1} {self._named(reply.tokens[i])} {percent(reply.tokens[i].logprob)}" for i in places)
            parts.append("most surprising " + ", ".join(told))
        if reply.finish_reason is None:
            parts.append("stopped")
        elif reply.finish_reason is FinishReason.LENGTH:
            parts.append("cut at the most tokens there may be")
        self.say("; ".join(parts))

    def say(self, text: str) -> None:
        """A line about the chat."""
        self.console.print(Text(text, "dim"), soft_wrap=True)

    def help(self) -> None:
        """The commands."""
        table = Table.grid(padding=(0, 2))
        for command, text in HELP:
            table.add_row(Text(command, "bold"), text)
        self.console.print(table)

    def tokens(self, reply: Reply) -> None:
        """Every token of a reply."""
        table = _table("#", "token", "probability", "log-prob", "rank")
        for i, said in enumerate(reply.tokens, start=1):
            table.add_row(Text(str(i)), *self._cells(said))
        self.console.print(table)

    def why(self, reply: Reply, place: int) -> None:
        """What could have stood at a place instead."""
        said = reply.tokens[place]
        before = b"".join(
            self._tokenizer.token_bytes(each.id) for each in reply.tokens[max(0, place - _BEFORE) : place]
        )
        self.say(f"token {place + 1} of {len(reply.tokens)}, after {before.decode(errors='replace')!r}")
        table = _table("", "token", "probability", "log-prob", "rank")
        best = said.best[:_SHOWN]
        shown: Sequence[Said | Alternative] = best if any(each.id == said.id for each in best) else [*best, said]
        for each in shown:
            table.add_row(Text("→" if each.id == said.id else ""), *self._cells(each))
        self.console.print(table)

    def _cells(self, token: Said | Alternative) -> list[Text]:
        step = step_of(token.logprob)
        numbers = (percent(token.logprob), f"{token.logprob:.4f}", f"{token.rank:,}")
        return [Text(self._named(token), step.style), *map(Text, numbers)]

    def _named(self, token: Said | Alternative) -> str:
        data = self._tokenizer.token_bytes(token.id)
        try:
            return repr(data.decode())
        except UnicodeDecodeError:  # a part of a character
            return repr(data).removeprefix("b")

    def _segments(self, piece: Piece) -> Iterator[Segment]:
        """A background must not reach over the end of a line: some terminals would paint the rest of it, too."""
        if self._plain:
            yield Segment(printable(piece.text) if self.console.is_terminal else piece.text)
            return
        step = step_of(piece.logprob)
        colours = self.console.color_system is not None and not self.console.no_color
        for line in printable(piece.text).splitlines(keepends=True):
            text = line.removesuffix("\n")
            breaks = "↵" if text != line and colours and step.probability < _MARKED else ""
            yield Segment(text + breaks, step.style)
            if text != line:
                yield Segment("\n")


def printable(text: str) -> str:
    """Text that cannot give a terminal orders: control characters are shown as pictures."""
    return "".join(each if each in "\n\t" or unicodedata.category(each) != "Cc" else _picture(each) for each in text)


def _picture(control: str) -> str:
    code = ord(control)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in ("", "token") else "right", no_wrap=name != "token")
    return table
