"""The command line: `serve`, `score`, `chat`."""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Runs what the first word names, or else a server; returns the exit code."""
    # Imported when they are asked for: none needs what the others need.
    if arguments[:1] == ["score"]:
        from serve.cli.score.command import main as score

        return score(arguments[1:])
    if arguments[:1] == ["chat"]:
        from serve.cli.chat.command import main as chat

        return chat(arguments[1:])
    from serve.server.server import main as serve

    return serve(arguments)
