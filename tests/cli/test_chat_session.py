"""A chat from what is typed to what is shown, over a real engine with a scripted runner."""

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

from compiled.state import MAX_REQUESTED_IDS
from model.kv_cache import PAGE_SIZE
from serve.cli.chat.conversation import Conversation, Prompter
from serve.cli.chat.pieces import Piece
from serve.cli.chat.screen import ChatScreen
from serve.cli.chat.session import Session
from serve.engine.client import RequestHandle
from serve.engine.engine import Engine
from serve.engine.request import EngineLimits, EngineOptions, FinishReason, Request, SamplingParams
from serve.text.chat import ChatFormat
from tests.support.fake_runner import MAX_MODEL_LEN, K
from tests.support.http_client import END, VOCAB_SIZE, ScriptedRunner, byte_tokenizer

PAGES = 64
CAT = "🐈"


@dataclass(slots=True)
class Chat:
    """A session and what came of it."""

    session: Session
    engine: Engine
    runner: ScriptedRunner
    stream: io.StringIO
    complaints: list[str]
    put_back: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def prompts(self) -> list[str]:
        """What the model was given."""
        return [bytes(request.prompt_token_ids).decode() for request in self.requests]


def scripted_engine(script: Sequence[int]) -> tuple[Engine, ScriptedRunner]:
    """An engine that is not started; it says a script."""
    runner = ScriptedRunner(script, pages=PAGES, pages_per_row=MAX_MODEL_LEN // PAGE_SIZE)
    limits = EngineLimits(
        MAX_MODEL_LEN, K, VOCAB_SIZE, (PAGES - 1) * PAGE_SIZE, MAX_REQUESTED_IDS, whole_vocabulary=False
    )
    return Engine(runner, limits, EngineOptions(max_num_batched_tokens=68, max_num_queued_reqs=2)), runner


@contextmanager
def chatting(
    *lines: str | BaseException,
    script: Sequence[int] = b"Hello",
    plain: bool = False,
    max_tokens: int = 400,
    system: str | None = None,
) -> Iterator[Chat]:
    """A chat into which the lines will be typed, and Ctrl-D."""
    engine, runner = scripted_engine(script)
    limits = engine.limits
    stream, complaints, ticks = io.StringIO(), list[str](), itertools.count()
    console = Console(file=stream, width=100)
    tokenizer = byte_tokenizer()
    session = Session(
        engine=engine,
        prompter=Prompter(ChatFormat(tokenizer), limits),
        screen=ChatScreen(console, tokenizer, plain=plain),
        params=SamplingParams(max_tokens, temperature=0, stop_token_ids=frozenset({END})),
        ask=typing(lines),
        complain=complaints.append,
        now=lambda: next(ticks) / 10,  # ten tokens a second
        about={"model": "m"},
        chat=Conversation(system),
    )
    chat = Chat(session, engine, runner, stream, complaints)
    session.put_back = chat.put_back.append
    admit = engine.admit

    def record(request: Request, *, bypass_limits: bool = False) -> RequestHandle:
        chat.requests.append(request)
        return admit(request, bypass_limits=bypass_limits)

    engine.admit = record  # type: ignore[method-assign]
    engine.start()
    try:
        yield chat
    finally:
        runner.before_call = lambda _: None
        engine.stop()


def typing(lines: Sequence[str | BaseException]) -> Callable[[str], str]:
    left = iter(lines)

    def ask(_: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def test_a_reply_with_its_numbers() -> None:
    with chatting("Hi", script=f"Hi {CAT}!".encode()) as chat:
        chat.session.run()
    shown = chat.stream.getvalue().splitlines()
    assert shown[0] == f"Hi {CAT}!"
    # Token s has log-prob -(s + 1) / 10, and END comes last: 9 tokens with a mean of -0.5.
    assert shown[1].startswith(
        "9 tokens; 10.0 tokens/s; perplexity 1.65; most surprising #9 '<end>' 40.7 %, #8 '!' 44.9 %, "
    )
    assert shown[1].endswith("#7 '\\x88' 49.7 %")  # the last quarter of the cat
    assert chat.prompts() == ["user:Hi;>"]
    assert chat.session.failures == 0


def test_what_was_said_is_in_the_next_prompt() -> None:
    with chatting("one", " /two", "/reset", "three", system="S") as chat:
        chat.session.run()
    assert chat.prompts() == [
        "system:S;user:one;>",
        "system:S;user:one;assistant:Hello;user: /two;>",
        "system:S;user:three;>",
    ]


def test_the_system_message_and_retry() -> None:
    with chatting("/system Be brief.", "one", "/system -", "/retry", "/system") as chat:
        chat.session.run()
    assert chat.prompts() == ["system:Be brief.;user:one;>", "user:one;>"]
    assert len(chat.session.chat.turns) == 1
    assert chat.stream.getvalue().splitlines()[-1] == "no system message"


def test_a_reply_is_as_long_as_it_may_be() -> None:
    with chatting("a", "b", script=b"x" * 1000, max_tokens=3) as chat:
        chat.session.run()
    assert [turn.reply.text for turn in chat.session.chat.turns] == ["xxx", "xxx"]
    assert chat.stream.getvalue().count("cut at the most tokens there may be") == 2
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
def test_what_cannot_be_sent_is_not_lost(text: str, reason: str) -> None:
    with chatting("before", text, "after") as chat:
        chat.session.run()
    (complaint,) = chat.complaints
    assert reason in complaint
    assert chat.put_back == [text]
    assert chat.prompts() == ["user:before;>", "user:before;assistant:Hello;user:after;>"]
    assert chat.session.failures == 1


def test_a_message_that_did_not_fit_goes_after_a_reset() -> None:
    with chatting("a" * 480, "b" * 40, "/reset", "/retry") as chat:
        chat.session.run()
    assert len(chat.complaints) == 1
    assert chat.prompts()[1:] == ["user:" + "b" * 40 + ";>"]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as Python has it at first: a shell may have tests that run in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(chat: Chat, call: int, *, shown: bool) -> None:
    """Ctrl-C comes before a call of decode, which goes on once the request has been given up.

    Args:
        shown: it comes after something of the reply was shown, however slow the thread is that shows it.
    """
    given_up, seen, left = threading.Event(), threading.Event(), itertools.count(1)
    abort, show = chat.engine.abort, chat.session.screen.piece

    def noted(piece: Piece) -> None:
        show(piece)
        seen.set()

    def aborted(request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        abort(request_id, reason)
        given_up.set()

    def before_call(name: str) -> None:
        if name == "decode" and next(left) == call:
            assert not shown or seen.wait(20)
            os.kill(os.getpid(), signal.SIGINT)
            assert given_up.wait(20)

    chat.session.screen.piece = noted  # type: ignore[method-assign]
    chat.engine.abort = aborted  # type: ignore[method-assign]
    chat.runner.before_call = before_call


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_came() -> None:
    with chatting("Hi", "and?", script=b"x" * 300, max_tokens=20) as chat:
        interrupt_at(chat, 6, shown=True)
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
        interrupt_at(chat, 1, shown=False)
        chat.session.run()
    assert "stopped before the first token" in chat.stream.getvalue()
    assert chat.prompts() == ["user:Hi;>", "user:Hi;>"]
    assert len(chat.session.chat.turns) == 1


def test_ctrl_c_at_the_prompt_ends_nothing() -> None:
    with chatting(KeyboardInterrupt(), "Hi") as chat:
        chat.session.run()
    assert "Ctrl-D or /quit ends" in chat.stream.getvalue()
    assert len(chat.session.chat.turns) == 1


def test_a_failure_of_the_engine_is_said_and_the_message_can_be_sent_again() -> None:
    with chatting("Hi", "/retry") as chat:
        chat.runner.fail_once("decode", after=2)
        chat.session.run()
    (complaint,) = chat.complaints
    assert "/retry sends the message again" in complaint
    assert [turn.reply.text for turn in chat.session.chat.turns] == ["Hello"]


def test_alternatives_of_a_token() -> None:
    with chatting("Hi", "/why 2", "/why", "/tokens", script=b"Hello") as chat:
        chat.session.run()
    shown = chat.stream.getvalue()
    second, most, every = shown.split("token 2 of 6, after 'H'")[1], shown.split("token 6 of 6")[1], shown
    rows = [line.split() for line in second.splitlines() if line.strip().startswith(("'f'", "→", "'g'"))]
    assert rows[:3] == [
        ["'f'", "90.5", "%", "-0.1000", "1"],
        ["→", "'e'", "81.9", "%", "-0.2000", "2"],
        ["'g'", "below", "0.01", "%", "-inf", "3"],
    ]
    assert "→" in most
    assert [line.split()[1] for line in every.splitlines() if line.strip()[:1].isdigit() and "'" in line][-6:] == [
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
        ("/nothing at all", "there is no /nothing"),
    ],
)
def test_commands_that_cannot_be_carried_out(line: str, complaint: str) -> None:
    with chatting("Hi", line) as chat:
        chat.session.run()
    assert [complaint in each for each in chat.complaints] == [True]
    assert len(chat.requests) == 1


@pytest.mark.parametrize("command", ["/why", "/tokens", "/retry"])
def test_commands_before_anything_was_said(command: str) -> None:
    with chatting(command) as chat:
        chat.session.run()
    assert len(chat.complaints) == 1


def test_quit_ends() -> None:
    with chatting("/help", "/quit", "Hi") as chat:
        chat.session.run()
    assert chat.requests == []
    assert all(name in chat.stream.getvalue() for name in ("/why", "/save FILE", "/retry", "/quit"))


def test_saved_is_all_there_is(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    with chatting("Hi", f"/save {file}", script=f"{CAT}\x07".encode(), system="S") as chat:  # 7 is impossible: -inf
        chat.session.run()
    saved = json.loads(file.read_text("utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert saved["model"] == "m"
    assert saved["messages"][0] == {"role": "system", "content": "S"}
    assert saved["messages"][-1] == {"role": "assistant", "content": CAT + "\x07"}
    (reply,) = saved["replies"]
    assert (reply["text"], reply["finish_reason"], len(reply["tokens"])) == (CAT + "\x07", "stop", 6)
    assert bytes(itertools.chain(*(token["bytes"] for token in reply["tokens"][:5]))).decode() == CAT + "\x07"
    first = reply["tokens"][0]
    assert (first["id"], first["rank"], first["logprob"]) == (0xF0, 2, pytest.approx(-0.1))
    assert [best["rank"] for best in first["best"]] == [1, 2, 3]
    assert reply["tokens"][4]["logprob"] is None


def test_without_a_terminal_there_are_only_replies() -> None:
    with chatting("one", "", "two", "refuse", script=f"a\n{CAT}".encode(), plain=True) as chat:
        chat.session.run()
    assert chat.stream.getvalue() == f"a\n{CAT}\n" * 2
    assert (len(chat.complaints), chat.session.failures) == (1, 1)
