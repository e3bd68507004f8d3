"""The command line: `serve`, `score`, `chat`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand that the first word names, else a server, and return the exit code.

    Flags are parsed before the command itself is imported, so that --help and mistakes answer at once.
    """
    if arguments[:1] == ["score"]:
        from serve.cli.score.config import parse_args as parse_score_args

        score_config = parse_score_args(arguments[1:])
        from serve.cli.score.command import main as score

        return score(score_config)
    if arguments[:1] == ["chat"]:
        from serve.cli.chat.config import parse_args as parse_chat_args

        chat_config = parse_chat_args(arguments[1:])
        from serve.cli.chat.command import main as chat

        return chat(chat_config)
    from serve.config.flags import parse_args

    config = parse_args(arguments[1:] if arguments[:1] == ["serve"] else arguments)
    from serve.server.server import main as serve

    return serve(config)


def run() -> None:
    """Console script `logprobd`."""
    sys.exit(main(sys.argv[1:]))
