"""The command line `logprobd`: serve, score, chat and models."""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from serve import __version__

_HELP = """\
usage: logprobd COMMAND [flags]

OpenAI-compatible server of exact log-probabilities and ranks.

commands; each has its own --help:
  serve [MODEL]      serve HTTP; this is the default command
  score FILE         write the log-prob and rank of every token of a file
  chat [MODEL]       chat in the terminal, with tokens colored by surprise
  models [FOLDER]    list local models, and whether they can be served
  --version          print the version

Without MODEL, the default model SmolLM2-135M-Instruct is used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, by default `serve`, and return the exit code.

    Args:
        argv: arguments without the program's name, by default those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if first == "--version":
        print(f"logprobd {__version__}")
        return 0
    if first in _COMMANDS:
        return _COMMANDS[first](arguments[1:])
    if nearest := _nearest_command(first):
        print(f"logprobd: error: no command or model {first!r}; did you mean {nearest!r}?", file=sys.stderr)
        return 2
    return _serve(arguments)


def run() -> None:
    """Entry point of the console script and of `python -m serve`."""
    sys.exit(main())


# Each command parses its flags before it imports the rest, so that --help and mistakes do not wait for jax.
def _serve(arguments: Sequence[str]) -> int:
    from serve.config.flags import parse_args

    config = parse_args(arguments)
    from serve.server.server import main as serve

    return serve(config)


def _score(arguments: Sequence[str]) -> int:
    from serve.cli.score.config import parse_args

    config = parse_args(arguments)
    from serve.cli.score.command import main as score

    return score(config)


def _chat(arguments: Sequence[str]) -> int:
    from serve.cli.chat.config import parse_args

    config = parse_args(arguments)
    from serve.cli.chat.command import main as chat

    return chat(config)


def _models(arguments: Sequence[str]) -> int:
    from serve.cli.models import main as models
    from serve.cli.models import parse_args

    return models(parse_args(arguments))


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "score": _score,
    "chat": _chat,
    "models": _models,
}


def _nearest_command(word: str) -> str | None:
    """The command that a mistyped first word resembles; None for a flag, a path or a hub id."""
    if word.startswith("-") or "/" in word or "." in word or Path(word).exists():
        return None
    nearest = get_close_matches(word, _COMMANDS, 1, cutoff=0.7)
    return nearest[0] if nearest else None
