"""Parts of the terminal chat: replies, color scale, input, screen."""

import io
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from rich.console import Console

from model.token_logprobs import empty_logprobs
from serve.cli.chat.command import lines_of, read_message
from serve.cli.chat.config import parse_args
from serve.cli.chat.conversation import Piece, Reply
from serve.cli.chat.screen import SCALE, ChatScreen, legend, percent, printable, step_of
from serve.jobs.output import Output
from serve.text.tokenizer import Tokenizer
from tests.support.http_client import byte_tokenizer


def pieces_of(*tokens: tuple[bytes, float]) -> list[Piece]:
    """The pieces of a reply whose tokens have these bytes and log-probs."""
    table = [data for data, _ in tokens]
    tokenizer = SimpleNamespace(token_bytes=table.__getitem__, is_special=lambda _: False, eos_token_ids=frozenset())
    reply = Reply(cast("Tokenizer", tokenizer), lambda: 0.0)
    logprobs = empty_logprobs(len(tokens), 0)
    logprobs.logprob[:] = [logprob for _, logprob in tokens]
    return [*reply.add(Output(token_ids=[*range(len(tokens))], logprobs=[logprobs])), *reply.end()]


def piece(text: str, logprob: float) -> Piece:
    return Piece(text, float(np.float32(logprob)))


def test_reply_joins_the_tokens_of_a_character() -> None:
    cat = "🐈".encode()
    tokens = [(b"a", -0.1), (cat[:1], -0.2), (cat[1:3], -3.0), (cat[3:], -0.3), (b" b", -0.4)]
    assert pieces_of(*tokens) == [piece("a", -0.1), piece("🐈", -3.0), piece(" b", -0.4)]


def test_reply_joins_a_token_that_spans_characters() -> None:
    first, second = "é".encode(), "ü".encode()
    tokens = [(b"x" + first[:1], -1.0), (first[1:] + second[:1], -2.0), (second[1:], -0.5), (b"z", -0.25)]
    assert pieces_of(*tokens) == [piece("xéü", -2.0), piece("z", -0.25)]


def test_reply_replaces_invalid_bytes() -> None:
    assert pieces_of((b"\xff", -1.0), (b"a", -2.0)) == [piece("\ufffd", -1.0), piece("a", -2.0)]
    assert pieces_of((b"a", -2.0), (b"\xf0\x9f", -1.0)) == [piece("a", -2.0), piece("\ufffd", -1.0)]
    assert pieces_of((b"", -1.0)) == []


def test_scale_descends_to_zero() -> None:
    limits = [step.probability for step in SCALE]
    assert limits == sorted(limits, reverse=True)
    assert (len(SCALE), limits[-1]) == (8, 0)
    assert len({str(step.style) for step in SCALE}) == len(SCALE)
    assert [step_of(math.log(p)).label for p in (0.95, 0.6, 0.02, 0.0005)] == ["90 %", "50 %", "1 %", "less"]
    assert step_of(0.0) is SCALE[0]
    assert step_of(-math.inf) is step_of(math.nan) is SCALE[-1]


@pytest.mark.parametrize(
    ("probability", "text"), [(1.0, "100.0 %"), (0.5, "50.0 %"), (0.00123, "0.12 %"), (0.00001, "below 0.01 %")]
)
def test_percent_is_short(probability: float, text: str) -> None:
    assert percent(math.log(probability)) == text


def asker(*lines: str) -> Callable[[str], str]:
    left: Iterator[str] = iter(lines)

    def ask(_: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("one", "two"), "one"),
        (("one\\", "two\\", "three", "four"), "one\ntwo\nthree"),
        (("one\\",), "one"),  # an unfinished message is returned at the end
        (('"""one', "", "  two\\", '"""', "three"), "one\n\n  two\\"),
        (('"""one line"""', "two"), "one line"),
        (('"""', "one", 'two"""'), "one\ntwo"),
        (('"""one', "two"), "one\ntwo"),
        (("",), ""),
    ],
)
def test_read_message_joins_lines(lines: tuple[str, ...], message: str) -> None:
    assert read_message(asker(*lines)) == message


def test_lines_of_reads_to_the_end() -> None:
    ask = lines_of(io.StringIO("one\n\nlast"))
    assert [ask("> ") for _ in range(3)] == ["one", "", "last"]
    with pytest.raises(EOFError):
        ask("> ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "3"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-tokens", "x"], "--max-tokens"),
        (["--port", "1"], "--port"),
        (["--max-num-queued-reqs", "2"], "--max-num-queued-reqs"),
        (["--quantization", "int4"], "--quantization"),
    ],
)
def test_parse_args_names_the_wrong_flag(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(arguments)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def painted(piece: Piece, *, plain: bool = False, terminal: bool = True, colors: bool = True) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, color_system="truecolor" if terminal else None, no_color=not colors
    )
    ChatScreen(console, byte_tokenizer(), plain=plain).piece(piece)
    return stream.getvalue()


def test_piece_is_colored_by_surprise() -> None:
    assert painted(Piece(" a", math.log(0.95))) == " a"
    assert painted(Piece(" a", math.log(0.04))) == "\x1b[30;48;2;253;174;97m a\x1b[0m"
    assert painted(Piece(" a", math.log(0.04)), colors=False) == " a"
    assert painted(Piece(" a", math.log(0.04)), terminal=False) == " a"
    assert painted(Piece("[red]a\tb", math.log(0.95))) == "[red]a\tb"


def test_piece_has_no_background_across_line_breaks() -> None:
    output = painted(Piece("a\n\nb", math.log(0.04)))
    for line in output.split("\n"):
        assert line.count("\x1b[") in (0, 2), line
    assert output.count("↵") == 2
    assert "↵" not in painted(Piece("a\n", math.log(0.95)))
    assert "↵" not in painted(Piece("a\n", math.log(0.04)), colors=False)


def test_printable_replaces_control_characters() -> None:
    assert printable("a\x1b[2J\x07\x7f\x9b\n\té") == "a␛[2J␇␡\ufffd\n\té"
    assert painted(Piece("\x1b[2J", math.log(0.95))) == "␛[2J"
    assert painted(Piece("\x1b[2J", math.log(0.95)), plain=True) == "␛[2J"
    assert painted(Piece("\x1b[2J", math.log(0.95)), plain=True, terminal=False) == "\x1b[2J"  # a file gets all bytes


def test_legend_has_every_step() -> None:
    assert all(f" {step.label} " in legend().plain for step in SCALE)
