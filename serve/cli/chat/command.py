"""The command line."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from serve.cli.chat.config import ChatConfig, sampling_params
from serve.cli.chat.conversation import Conversation, Prompter
from serve.cli.chat.lines import Typist, lines_of
from serve.cli.chat.screen import ChatScreen
from serve.cli.chat.session import Session
from serve.engine.engine import Engine
from serve.engine.request import SamplingParams
from serve.server.console import is_terminal, start_reporting
from serve.server.model_files import STARTUP_ERRORS
from serve.server.startup import Loaded, load
from serve.server.startup_events import failed, interrupted
from serve.text.chat import ChatFormat


def main(config: ChatConfig) -> int:
    """Returns the exit code: 0 at the end of what is typed, 1 where the model cannot be run or, without a terminal, a
    message could not be answered, 130 for Ctrl-C at start-up.
    """
    reporter = start_reporting(config)
    try:
        loaded = load(config, reporter)
    except STARTUP_ERRORS as error:
        reporter.report(failed(str(error)))
        return 1
    except KeyboardInterrupt:
        reporter.report(interrupted())
        return 130
    engine = loaded.start_engine()
    try:
        return _chat(config, loaded, engine)
    except KeyboardInterrupt:  # elsewhere than in a reply or at the prompt
        return 130
    finally:
        engine.stop()


def _chat(config: ChatConfig, loaded: Loaded, engine: Engine) -> int:
    typed = sys.stdin.isatty() and is_terminal(sys.stdout)
    typist = Typist() if typed else None
    console = Console(file=sys.stdout, highlight=False)
    screen = ChatScreen(console, loaded.tokenizer, plain=not typed)
    params = sampling_params(config, loaded.defaults.set_fields(), loaded.tokenizer.eos_token_ids)
    session = Session(
        engine=engine,
        prompter=Prompter(ChatFormat(loaded.tokenizer, loaded.chat_template), loaded.limits),
        screen=screen,
        params=params,
        ask=typist or lines_of(sys.stdin),
        complain=_complainer(console if typed else Console(file=sys.stderr, highlight=False)),
        now=time.monotonic,
        about={"model": loaded.name, "system_fingerprint": loaded.fingerprint, "sampling": _sampling(params)},
        chat=Conversation(config.system),
    )
    if typist is not None:
        session.put_back = typist.put_back
    screen.welcome(loaded.name)
    session.run()
    return 1 if session.failures and not typed else 0


def _complainer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """What is not at its default."""
    usual = asdict(SamplingParams(max_tokens=0))
    changed = {name: value for name, value in asdict(params).items() if value != usual[name]}
    changed.pop("stop_token_ids", None)  # the model's own
    return changed
