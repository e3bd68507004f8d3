"""Chat sessions from input to output, on a real engine with a scripted runner."""

import asyncio
import io
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from model.kv_cache import PAGE_SIZE
from serve.cli.chat.command import Session
from serve.cli.chat.conversation import Conversation, Piece
from serve.cli.chat.screen import ChatScreen
from serve.config.engine_config import EngineConfig
from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import FinishReason, Request
from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import ScriptedRunner, byte_tokenizer
from tests.support.scoring import open_llm

PAGES = 64
CAT = "🐈"


@dataclass(slots=True)
class Chat:
    """A session and a record of its effects."""

    session: Session
    engine: Engine
    runner: ScriptedRunner
    stream: io.StringIO
    complaints: list[str]
    put_back: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def prompts(self) -> list[str]:
        """Texts of the prompts."""
        return [bytes(request.prompt_token_ids).decode() for request in self.requests]


@contextmanager
def chatting(
    *lines: str | BaseException,
    script: Sequence[int] = b"Hello",
    plain: bool = False,
    max_tokens: int = 400,
    system: str | None = None,
) -> Iterator[Chat]:
    """A chat whose input is the lines, then Ctrl-D."""
    runner = ScriptedRunner(script, pages=PAGES, pages_per_row=MAX_MODEL_LEN // PAGE_SIZE)
    llm = open_llm(
        runner, EngineConfig(max_num_batched_tokens=68, max_num_queued_reqs=2, max_num_seqs=4), MAX_MODEL_LEN
    )
    engine = llm.engine
    stream, complaints, ticks = io.StringIO(), list[str](), itertools.count()
    console = Console(file=stream, width=100)
    tokenizer = byte_tokenizer()
    session = Session(
        llm=llm,
        screen=ChatScreen(console, tokenizer, plain=plain),
        options={"temperature": 0, "logprobs": K},
        max_tokens=max_tokens,
        ask=typing(lines),
        show_error=complaints.append,
        now=lambda: next(ticks) / 10,  # ten tokens a second
        chat=Conversation(system),
    )
    chat = Chat(session, engine, runner, stream, complaints)
    session.put_back = chat.put_back.append
    admit = engine.admit

    def record(request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        chat.requests.append(request)
        return admit(request, bypass_limits=bypass_limits)

    engine.admit = record  # type: ignore[method-assign]
    try:
        yield chat
    finally:
        runner.before_call = lambda _: None
        llm.close()


def typing(lines: Sequence[str | BaseException]) -> Callable[[str], str]:
    left = iter(lines)

    def ask(_: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def test_reply_is_followed_by_its_statistics() -> None:
    with chatting("Hi", script=f"Hi {CAT}!".encode()) as chat:
        chat.session.run()
    output = chat.stream.getvalue().splitlines()
    assert output[0] == f"Hi {CAT}!"
    # Token s has log-prob -(s + 1) / 10, and END comes last: 9 tokens with a mean of -0.5.
    assert output[1].startswith(
        "9 tokens; 10.0 tokens/s; perplexity 1.65; most surprising #9 '<end>' 40.7 %, #8 '!' 44.9 %, "
    )
    assert output[1].endswith("#7 '\\x88' 49.7 %")  # the last quarter of the cat
    assert chat.prompts() == ["user:Hi;>"]
    assert chat.session.failures == 0


def test_next_prompt_contains_earlier_turns_until_reset() -> None:
    with chatting("one", " /two", "/reset", "three", system="S") as chat:
        chat.session.run()
    assert chat.prompts() == [
        "system:S;user:one;>",
        "system:S;user:one;assistant:Hello;user: /two;>",
        "system:S;user:three;>",
    ]


def test_retry_uses_the_current_system_message() -> None:
    with chatting("/system Be brief.", "one", "/system -", "/retry", "/system") as chat:
        chat.session.run()
    assert chat.prompts() == ["system:Be brief.;user:one;>", "user:one;>"]
    assert len(chat.session.chat.turns) == 1
    assert chat.stream.getvalue().splitlines()[-1] == "no system message"


def test_reply_is_truncated_at_max_tokens_or_the_context() -> None:
    with chatting("a", "b", script=b"x" * 1000, max_tokens=3) as chat:
        chat.session.run()
    assert [turn.reply.text for turn in chat.session.chat.turns] == ["xxx", "xxx"]
    assert chat.stream.getvalue().count("truncated at the maximum length") == 2
    with chatting("a" * 500, script=b"x" * 1000) as chat:  # and the model's length is kept
        chat.session.run()
    assert len(chat.session.chat.turns[0].reply.tokens) == MAX_MODEL_LEN - len("user:;>") - 500


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a" * 477, "512 prompt tokens and at least 1 to generate"),
        ("a" * 100_000, "a text of 100035 characters cannot fit"),
        ("refuse", "It is refused."),
        ("\ud800", "surrogate"),
    ],
    ids=["long", "far too long", "refused", "no text"],
)
def test_message_that_cannot_be_sent_is_offered_for_editing(text: str, reason: str) -> None:
    with chatting("before", text, "after") as chat:
        chat.session.run()
    (complaint,) = chat.complaints
    assert reason in complaint
    assert chat.put_back == [text]
    assert chat.prompts() == ["user:before;>", "user:before;assistant:Hello;user:after;>"]
    assert chat.session.failures == 1


def test_message_that_did_not_fit_is_sent_after_reset() -> None:
    with chatting("a" * 480, "b" * 40, "/reset", "/retry") as chat:
        chat.session.run()
    assert len(chat.complaints) == 1
    assert chat.prompts()[1:] == ["user:" + "b" * 40 + ";>"]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's default SIGINT handler: a shell may make background processes ignore the signal."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt_at(chat: Chat, call: int, *, after_output: bool) -> None:
    """Send SIGINT before a call of decode, which continues when the request is aborted.

    Args:
        chat: to interrupt.
        call: number of the call.
        after_output: wait until a part of the reply is shown.
    """
    aborted, seen, calls = threading.Event(), threading.Event(), itertools.count(1)
    abort, admit, show = chat.engine.abort, chat.engine.admit, chat.session.screen.piece
    loops: list[asyncio.AbstractEventLoop] = []

    def record_loop(request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        loops.append(asyncio.get_running_loop())
        return admit(request, bypass_limits=bypass_limits)

    def record_piece(piece: Piece) -> None:
        show(piece)
        seen.set()

    def record_abort(request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        abort(request_id, reason)
        aborted.set()

    def before_call(name: str) -> None:
        if name == "decode" and next(calls) == call:
            assert not after_output or seen.wait(20)
            os.kill(os.getpid(), signal.SIGINT)
            loops[-1].call_soon_threadsafe(lambda: None)  # a signal just before the loop waits does not wake it
            assert aborted.wait(20)

    chat.session.screen.piece = record_piece  # type: ignore[method-assign]
    chat.engine.abort = record_abort  # type: ignore[method-assign]
    chat.engine.admit = record_loop  # type: ignore[method-assign]
    chat.runner.before_call = before_call


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_reply_keeps_its_tokens() -> None:
    with chatting("Hi", "and?", script=b"x" * 300, max_tokens=20) as chat:
        interrupt_at(chat, 6, after_output=True)
        chat.session.run()
    first, second = (turn.reply for turn in chat.session.chat.turns)
    assert first.finish_reason is None
    assert 1 <= len(first.tokens) <= 6
    assert first.text == "x" * len(first.tokens)
    assert "; stopped" in chat.stream.getvalue().splitlines()[1]
    assert chat.prompts()[1] == f"user:Hi;assistant:{first.text};user:and?;>"
    assert second.finish_reason is FinishReason.LENGTH


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_before_the_first_token_leaves_the_message_unsent() -> None:
    with chatting("Hi", "/retry") as chat:
        interrupt_at(chat, 1, after_output=False)
        chat.session.run()
    assert "stopped before the first token" in chat.stream.getvalue()
    assert chat.prompts() == ["user:Hi;>", "user:Hi;>"]
    assert len(chat.session.chat.turns) == 1


def test_ctrl_c_at_the_prompt_does_not_end_the_chat() -> None:
    with chatting(KeyboardInterrupt(), "Hi") as chat:
        chat.session.run()
    assert "press Ctrl-D or type /quit to end" in chat.stream.getvalue()
    assert len(chat.session.chat.turns) == 1


def test_engine_failure_is_shown_and_retry_sends_again() -> None:
    with chatting("Hi", "/retry") as chat:
        chat.runner.fail_once("decode", after=2)
        chat.session.run()
    (complaint,) = chat.complaints
    assert "/retry sends the message again" in complaint
    assert [turn.reply.text for turn in chat.session.chat.turns] == ["Hello"]


def test_why_and_tokens_show_alternatives_and_ranks() -> None:
    with chatting("Hi", "/why 2", "/why", "/tokens", script=b"Hello") as chat:
        chat.session.run()
    output = chat.stream.getvalue()
    second, most = output.split("token 2 of 6, after 'H'")[1], output.split("token 6 of 6")[1]
    rows = [line.split() for line in second.splitlines() if line.strip().startswith(("'f'", "→", "'g'"))]
    assert rows[:3] == [
        ["'f'", "90.5", "%", "-0.1000", "1"],
        ["→", "'e'", "81.9", "%", "-0.2000", "2"],
        ["'g'", "below", "0.01", "%", "-inf", "3"],
    ]
    assert "→" in most
    assert [line.split()[1] for line in output.splitlines() if line.strip()[:1].isdigit() and "'" in line][-6:] == [
        *("'H'", "'e'", "'l'", "'l'", "'o'", "'<end>'")
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/why 0", "a number from 1 to 6"),
        ("/why 7", "a number from 1 to 6"),
        ("/why x", "a number from 1 to 6"),
        ("/save", "name of a file"),
        ("/save /nowhere/x", "/nowhere/x: No such file"),
        ("/nothing at all", "unknown command /nothing"),
    ],
)
def test_command_with_a_wrong_argument_shows_an_error(line: str, complaint: str) -> None:
    with chatting("Hi", line) as chat:
        chat.session.run()
    assert [complaint in text for text in chat.complaints] == [True]
    assert len(chat.requests) == 1


@pytest.mark.parametrize("command", ["/why", "/tokens", "/retry"])
def test_command_without_a_reply_shows_an_error(command: str) -> None:
    with chatting(command) as chat:
        chat.session.run()
    assert len(chat.complaints) == 1


def test_quit_ends_the_chat() -> None:
    with chatting("/help", "/quit", "Hi") as chat:
        chat.session.run()
    assert chat.requests == []
    assert all(name in chat.stream.getvalue() for name in ("/why", "/save FILE", "/retry", "/quit"))


def test_save_writes_messages_and_tokens(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    with chatting("Hi", f"/save {file}", script=f"{CAT}\x07".encode(), system="S") as chat:  # token 7 has probability 0
        chat.session.run()
    saved = json.loads(file.read_text("utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert (saved["model"], saved["system_fingerprint"]) == ("fake", "fp")
    assert saved["sampling"] == {"temperature": 0.0, "max_tokens": 400}
    assert saved["messages"][0] == {"role": "system", "content": "S"}
    assert saved["messages"][-1] == {"role": "assistant", "content": CAT + "\x07"}
    (reply,) = saved["replies"]
    assert (reply["text"], reply["finish_reason"], len(reply["tokens"])) == (CAT + "\x07", "stop", 6)
    assert bytes(itertools.chain(*(token["bytes"] for token in reply["tokens"][:5]))).decode() == CAT + "\x07"
    first = reply["tokens"][0]
    assert (first["id"], first["rank"], first["logprob"]) == (0xF0, 2, pytest.approx(-0.1))
    assert [best["rank"] for best in first["best"]] == [1, 2, 3]
    assert reply["tokens"][4]["logprob"] is None


def test_plain_output_has_only_replies() -> None:
    with chatting("one", "", "two", "refuse", script=f"a\n{CAT}".encode(), plain=True) as chat:
        chat.session.run()
    assert chat.stream.getvalue() == f"a\n{CAT}\n" * 2
    assert (len(chat.complaints), chat.session.failures) == (1, 1)
