"""`logprobd chat`: joins model, terminal and session."""

import sys
import time

from rich.console import Console
from rich.text import Text

from serve.cli.chat.config import ChatConfig
from serve.cli.chat.conversation import Conversation
from serve.cli.chat.screen import ChatScreen
from serve.cli.chat.session import Session, Terminal, lines_of
from serve.jobs.generate import SamplingKeywords
from serve.llm import LLM
from serve.server.console import is_terminal, start_reporting
from serve.server.model_files import STARTUP_ERRORS


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
    loaded = llm.loaded
    interactive = sys.stdin.isatty() and is_terminal(sys.stdout)
    terminal = Terminal() if interactive else None
    console = Console(file=sys.stdout, highlight=False)
    error_console = console if interactive else Console(file=sys.stderr, highlight=False)
    screen = ChatScreen(console, loaded.tokenizer, plain=not interactive)
    options = SamplingKeywords(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        logprobs=loaded.limits.max_logprobs,
    )
    sampling = llm.sampling_options(**options).model_dump(exclude_defaults=True, exclude={"logprobs"})
    session = Session(
        llm=llm,
        screen=screen,
        options=options,
        max_tokens=config.max_tokens,
        ask=terminal or lines_of(sys.stdin),
        show_error=lambda text: error_console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True),
        now=time.monotonic,
        about={
            "model": loaded.name,
            "system_fingerprint": loaded.fingerprint,
            "sampling": sampling | {"max_tokens": config.max_tokens},
        },
        chat=Conversation(config.system),
    )
    if terminal is not None:
        session.put_back = terminal.put_back
    screen.welcome(loaded.name)
    session.run()
    return 1 if session.failures and not interactive else 0
