"""Session: reads messages and commands, runs requests, shows replies."""

import asyncio
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve.cli.chat.conversation import Conversation, Prompter, Turn
from serve.cli.chat.lines import read_message
from serve.cli.chat.reply import Reply
from serve.cli.chat.screen import ChatScreen
from serve.engine.client import EngineClient
from serve.engine.request import EngineStoppedError, FinishReason, Request, SamplingParams
from serve.text.chat import PromptError


class ReplyError(Exception):
    """The engine failed on a reply; the message says why."""


@dataclass(slots=True)
class Session:
    """One chat.

    Attributes:
        failures: messages and commands that could not be carried out.
    """

    engine: EngineClient
    prompter: Prompter
    screen: ChatScreen
    params: SamplingParams  # max_tokens: at most
    ask: Callable[[str], str]  # raises EOFError at the end
    complain: Callable[[str], None]
    now: Callable[[], float]  # seconds
    about: dict[str, Any]  # for /save
    put_back: Callable[[str], None] = lambda _: None  # a message that was not sent, to be changed
    chat: Conversation = field(default_factory=Conversation)
    failures: int = 0

    def run(self) -> None:
        """Until the end of what is typed."""
        # One loop for all replies, in which Ctrl-C ends the reply and nothing else.
        with asyncio.Runner() as runner:
            while True:
                try:
                    text = read_message(self.ask)
                except EOFError:
                    return
                except KeyboardInterrupt:
                    self.screen.console.print()
                    self.screen.say("Ctrl-D or /quit ends")
                    continue
                if text.startswith("/"):
                    if text.split()[0] in ("/quit", "/exit"):
                        return
                    self._command(text, runner)
                elif text.strip():
                    self._say(text, runner)

    def _say(self, text: str, runner: asyncio.Runner) -> None:
        """Sends a message; it stays unsent where no reply comes."""
        self.chat.unsent = text
        try:
            ids, room = self.prompter.prompt(self.chat.messages(text))
        except PromptError as error:
            self._fail(f"{error} Use /reset or a shorter /system, then /retry.")
            self.put_back(text)
            return
        params = replace(self.params, max_tokens=min(self.params.max_tokens, room))
        reply = Reply(self.prompter.chats.tokenizer, self.now)
        try:
            runner.run(self._stream(Request(uuid.uuid4().hex, ids, params), reply))
        except KeyboardInterrupt:
            if not reply.tokens:
                self.screen.say("stopped before the first token; /retry sends the message again")
                return
        except (EngineStoppedError, ReplyError) as error:
            self.screen.console.print()
            self._fail(f"{error or 'the engine has stopped'}; /retry sends the message again")
            return
        for piece in reply.end():
            self.screen.piece(piece)
        self.screen.ended(reply)
        self.chat.turns.append(Turn(text, reply))
        self.chat.unsent = None

    async def _stream(self, request: Request, reply: Reply) -> None:
        with self.engine.admit(request) as handle:
            async for event in handle:
                if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise ReplyError(event.error or "the reply was ended")
                for piece in reply.add(event):
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
                again = self.chat.take_back()
                if again is None:
                    self._fail("nothing was said yet")
                else:
                    self._say(again, runner)
            case "/system":
                self._system(rest)
            case "/reset":
                self.chat.turns.clear()
                self.screen.say("a new chat")
            case "/save":
                self._save(rest)
            case _:
                self._fail(f"there is no {name}; /help tells the commands. A space before the / sends the line")

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == "-" else text
        self.screen.say("no system message" if self.chat.system is None else f"system: {self.chat.system}")

    def _why(self, text: str) -> None:
        reply = self._last()
        if reply is None:
            return
        if not text:
            places = reply.most_surprising(1)
            self.screen.why(reply, places[0] if places else 0)
        elif text.isdecimal() and 1 <= int(text) <= len(reply.tokens):
            self.screen.why(reply, int(text) - 1)
        else:
            self._fail(f"/why takes a number from 1 to {len(reply.tokens)}; /tokens shows them")

    def _save(self, name: str) -> None:
        if not name:
            self._fail("/save needs the name of a file")
            return
        path = Path(name).expanduser()
        text = json.dumps(self.about | self.chat.as_json(), ensure_ascii=False, indent=1)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except (OSError, UnicodeEncodeError) as error:
            self._fail(f"{path}: {getattr(error, 'strerror', None) or error}")
            return
        self.screen.say(f"written to {path}")

    def _last(self) -> Reply | None:
        if self.chat.turns:
            return self.chat.turns[-1].reply
        self._fail("there is no reply yet")
        return None

    def _fail(self, text: str) -> None:
        self.failures += 1
        self.complain(text)
