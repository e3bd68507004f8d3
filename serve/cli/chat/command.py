"""`logprobd chat`: joins model, terminal and session."""

import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from serve.cli.chat.config import MAX_LENGTH, ChatConfig
from serve.cli.chat.conversation import Conversation
from serve.cli.chat.screen import ChatScreen
from serve.cli.chat.session import Session, Terminal, lines_of
from serve.config.generation_config import GenerationDefaults, SamplingFields
from serve.engine.request import SamplingParams
from serve.jobs.generate import sampling_values
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
    params = sampling_params(config, loaded.defaults, loaded.tokenizer.eos_token_ids)
    session = Session(
        llm=llm,
        screen=screen,
        params=params,
        ask=terminal or lines_of(sys.stdin),
        show_error=lambda text: error_console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True),
        now=time.monotonic,
        about={"model": loaded.name, "system_fingerprint": loaded.fingerprint, "sampling": _changed(params)},
        chat=Conversation(config.system),
    )
    if terminal is not None:
        session.put_back = terminal.put_back
    screen.welcome(loaded.name)
    session.run()
    return 1 if session.failures and not interactive else 0


def sampling_params(config: ChatConfig, defaults: GenerationDefaults, eos_token_ids: frozenset[int]) -> SamplingParams:
    """Sampling parameters of replies: the options, or else the model's defaults."""
    options = SamplingFields.model_validate(config, from_attributes=True)
    max_tokens = config.max_tokens or defaults.max_new_tokens or MAX_LENGTH
    return SamplingParams(max_tokens, stop_token_ids=eos_token_ids, **sampling_values(defaults.fill(options)))


def _changed(params: SamplingParams) -> dict[str, Any]:
    """Values that differ from the defaults, without the stop tokens."""
    defaults = asdict(SamplingParams(max_tokens=0))
    changed = {name: value for name, value in asdict(params).items() if value != defaults[name]}
    changed.pop("stop_token_ids", None)
    return changed
