"""The command line `logprobd`: serve, score, decide, chat, models, quantize and kl."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from serve import __version__

# Command: the modules that have its parse_args and its main. The second is imported after the flags are parsed, so that
# --help and mistakes do not wait for jax.
_COMMANDS = {
    "serve": ("serve.config.flags", "serve.server.server"),
    "score": ("serve.cli.score.config", "serve.cli.score.command"),
    "decide": ("serve.cli.decide.config", "serve.cli.decide.command"),
    "chat": ("serve.cli.chat.config", "serve.cli.chat.command"),
    "models": ("serve.cli.models", "serve.cli.models"),
    "quantize": ("serve.cli.quantize", "serve.cli.quantize"),
    "kl": ("serve.cli.kl", "serve.cli.divergence"),
}
_HELP = """\
usage: logprobd COMMAND [flags]

OpenAI-compatible server of exact log-probabilities and ranks.

commands; each has its own --help:
  serve [MODEL]      serve HTTP; this is the default command
  score FILE         write the log-prob and rank of every token of a file
  decide FILE        answer the questions of a file by the probabilities of their options
  chat [MODEL]       chat in the terminal, with tokens colored by surprise
  models [FOLDER]    list local models, and whether they can be served
  models pull MODEL, models rm MODEL
                     download a model of the hub, and delete it
  quantize MODEL OUTPUT
                     write a GGUF file with weights of 4 to 8 bits
  kl MODEL MODEL_B FILE
                     measure how far a quantized model is from another on texts
  --version          print the version

Without MODEL, the default model SmolLM2-135M-Instruct is used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, by default `serve`, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if first == "--version":
        print(f"logprobd {__version__}")
        return 0
    if first in _COMMANDS:
        return _run(first, arguments[1:])
    if nearest := _nearest_command(first):
        print(f"logprobd: error: no command or model {first!r}; did you mean {nearest!r}?", file=sys.stderr)
        return 2
    return _run("serve", arguments)


def _run(command: str, arguments: Sequence[str]) -> int:
    parser, program = _COMMANDS[command]
    config = import_module(parser).parse_args(arguments)
    code: int = import_module(program).main(config)
    return code


def _nearest_command(word: str) -> str | None:
    """The command that a mistyped word resembles; None for a flag, a path or a hub id."""
    if word.startswith("-") or "/" in word or "." in word or Path(word).exists():
        return None
    nearest = get_close_matches(word, _COMMANDS, 1, cutoff=0.7)
    return nearest[0] if nearest else None
