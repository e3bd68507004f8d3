"""Which tokens of a text are scored together, where the text is longer than the model's context."""

from dataclasses import dataclass

from serve.cli.score.errors import LineError, ScoreError


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens begin..end-1 of a text, of which those from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True, slots=True)
class Context:
    """What a model holds, and what is done with a longer text."""

    size: int  # tokens
    long: str  # error, truncate or window
    stride: int  # tokens that each window but the first scores

    def windows(self, tokens: int) -> list[Window]:
        """Windows that score each token of a text but the first exactly once; with "truncate", of those that fit.

        Raises:
            LineError: the text is too long, and nothing is said of what to do.
        """
        if tokens > self.size and self.long == "error":
            raise LineError(
                f"has {tokens:,} tokens, above the {self.size:,} of the context: --long window scores all, --long "
                "truncate the first"
            )
        end = min(tokens, self.size)
        found = [Window(0, end, 1)] if end > 1 else []
        while self.long == "window" and end < tokens:
            first, end = end, min(end + self.stride, tokens)
            found.append(Window(end - self.size, end, first))
        return found


def make_context(size: int, long: str, stride: int | None) -> Context:
    """The context of a model; half of it is the stride where none is named.

    Raises:
        ScoreError: the stride leaves no context.
    """
    if stride is not None and stride >= size:
        raise ScoreError(f"--stride {stride}: it must be below the context of {size:,} tokens")
    return Context(size, long, stride or max(1, size // 2))
