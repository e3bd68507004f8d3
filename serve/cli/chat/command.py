"""`logprobd chat`: reads messages and commands, shows replies. A message may have several lines."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from serve.cli.chat.config import ChatConfig
from serve.cli.chat.conversation import Conversation, Reply, Turn
from serve.cli.chat.screen import ChatScreen
from serve.engine.request import EngineStoppedError
from serve.jobs.generate import SamplingKeywords
from serve.jobs.output import Output
from serve.jobs.request_queue import RequestError
from serve.llm import LLM
from serve.server.console import is_terminal, start_reporting
from serve.server.model_files import STARTUP_ERRORS
from serve.text.chat import PromptError

_FENCE = '"""'


def main(config: ChatConfig) -> int:
    """Run a chat and return the exit code.

    0 at the end of the input; 1 if the model cannot be loaded or, without a terminal, a message failed; 130 for Ctrl-C.
    """
    reporter = start_reporting(config)
    try:
        llm = LLM.open(config, reporter)
    except (*STARTUP_ERRORS, KeyboardInterrupt) as error:
        return reporter.fail(error)
    with llm:
        try:
            return _chat(config, llm)
        except KeyboardInterrupt:  # neither in a reply nor at the prompt
            return 130


def _chat(config: ChatConfig, llm: LLM) -> int:
    interactive = sys.stdin.isatty() and is_terminal(sys.stdout)
    terminal = Terminal() if interactive else None
    console = Console(file=sys.stdout, highlight=False)
    error_console = console if interactive else Console(file=sys.stderr, highlight=False)
    screen = ChatScreen(console, llm.loaded.tokenizer, plain=not interactive)
    options = SamplingKeywords(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        logprobs=llm.loaded.limits.max_logprobs,
    )
    session = Session(
        llm=llm,
        screen=screen,
        options=options,
        max_tokens=config.max_tokens,
        ask=terminal or lines_of(sys.stdin),
        show_error=lambda text: error_console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True),
        now=time.monotonic,
        chat=Conversation(config.system),
    )
    if terminal is not None:
        session.put_back = terminal.put_back
    screen.welcome(llm.loaded.name)
    session.run()
    return 1 if session.failures and not interactive else 0


@dataclass(slots=True)
class Session:
    llm: LLM
    screen: ChatScreen
    options: SamplingKeywords  # of replies
    max_tokens: int | None  # upper bound of replies; None: the model's default
    ask: Callable[[str], str]  # shows a prompt and reads a line; raises EOFError at the end
    show_error: Callable[[str], None]
    now: Callable[[], float]  # clock, seconds
    put_back: Callable[[str], None] = lambda _: None  # offers a message that was not sent for editing
    chat: Conversation = field(default_factory=Conversation)
    failures: int = 0  # messages and commands that failed

    def run(self) -> None:
        # One loop for all replies, in which Ctrl-C ends the reply and nothing else.
        with asyncio.Runner() as runner:
            while True:
                try:
                    text = read_message(self.ask)
                except EOFError:
                    return
                except KeyboardInterrupt:
                    self.screen.console.print()
                    self.screen.note("press Ctrl-D or type /quit to end")
                    continue
                if text.startswith("/"):
                    if text.split()[0] in ("/quit", "/exit"):
                        return
                    self._command(text, runner)
                elif text.strip():
                    self._send(text, runner)

    def _send(self, text: str, runner: asyncio.Runner) -> None:
        """Send a message and show the reply; the message stays unsent if there is no reply."""
        self.chat.unsent = text
        try:
            messages = self.chat.messages(text)
            outputs = self.llm.stream_chat(messages, max_new_tokens=self.max_tokens, **self.options)
        except PromptError as error:
            self._fail(f"{error} Use /reset or a shorter /system, then /retry.")
            self.put_back(text)
            return
        reply = Reply(self.llm.loaded.tokenizer, self.now)
        try:
            runner.run(self._show(outputs, reply))
        except KeyboardInterrupt:
            if not reply.tokens:
                self.screen.note("stopped before the first token; /retry sends the message again")
                return
        except (EngineStoppedError, RequestError) as error:
            self.screen.console.print()
            self._fail(f"{error or 'the engine has stopped'}; /retry sends the message again")
            return
        for piece in reply.end():
            self.screen.piece(piece)
        self.screen.summary(reply)
        self.chat.turns.append(Turn(text, reply))
        self.chat.unsent = None

    async def _show(self, outputs: AsyncGenerator[Output], reply: Reply) -> None:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for piece in reply.add(output):
                    self.screen.piece(piece)

    def _command(self, text: str, runner: asyncio.Runner) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                self.screen.help()
            case "/why" | "/top":
                self._why(rest)
            case "/tokens":
                if (reply := self._last()) is not None:
                    self.screen.tokens(reply)
            case "/retry":
                message = self.chat.undo()
                if message is None:
                    self._fail("there is no message yet")
                else:
                    self._send(message, runner)
            case "/system":
                self._system(rest)
            case "/reset":
                self.chat.turns.clear()
                self.screen.note("new chat")
            case "/save":
                self._save(rest)
            case _:
                self._fail(f"unknown command {name}; see /help. To send the line as a message, start it with a space")

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == "-" else text
        self.screen.note("no system message" if self.chat.system is None else f"system: {self.chat.system}")

    def _why(self, text: str) -> None:
        reply = self._last()
        if reply is None:
            return
        if not text:
            self.screen.why(reply, next(iter(reply.most_surprising(1)), 0))
        elif text.isdecimal() and 1 <= int(text) <= len(reply.tokens):
            self.screen.why(reply, int(text) - 1)
        else:
            self._fail(f"/why takes a number from 1 to {len(reply.tokens)}; /tokens shows them")

    def _save(self, name: str) -> None:
        if not name:
            self._fail("/save needs the name of a file")
            return
        path = Path(name).expanduser()
        loaded, options = self.llm.loaded, self.llm.sampling_options(**self.options)
        sampling = options.model_dump(exclude_defaults=True, exclude={"logprobs"}) | {"max_tokens": self.max_tokens}
        facts = {"model": loaded.name, "system_fingerprint": loaded.fingerprint, "sampling": sampling}
        text = json.dumps(facts | self.chat.as_json(), ensure_ascii=False, indent=1)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except (OSError, UnicodeEncodeError) as error:
            self._fail(f"{path}: {getattr(error, 'strerror', None) or error}")
            return
        self.screen.note(f"saved to {path}")

    def _last(self) -> Reply | None:
        """The last reply, if there is one; else an error is shown."""
        if self.chat.turns:
            return self.chat.turns[-1].reply
        self._fail("there is no reply yet")
        return None

    def _fail(self, text: str) -> None:
        self.failures += 1
        self.show_error(text)


def read_message(ask: Callable[[str], str]) -> str:
    r"""Read a message: a line, lines joined by backslashes at their ends, or lines between two \"\"\".

    Raises EOFError at the end of the input, after an unfinished message.
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

    def ask(_: str) -> str:
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

        def insert() -> None:
            readline.insert_text(self._draft)
            self._draft = ""

        readline.set_auto_history(True)
        readline.set_startup_hook(insert)

    def __call__(self, prompt: str) -> str:
        return input(prompt)

    def put_back(self, text: str) -> None:
        """Offer a text of one line for editing at the next prompt, if readline is available."""
        self._draft = "" if "\n" in text else text
