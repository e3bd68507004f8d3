"""Texts of a scoring: the lines' token ids, and the windows of long texts."""

from dataclasses import dataclass
from typing import Any

import orjson

from serve.cli.batch.source import BatchError, Line
from serve.jobs.score import EncodedText, TextEncoder, Window, first_window
from serve.text.chat import PromptError

_PAIR = ("prompt", "completion")
_ID, _TOOLS = "id", "tools"


class LineError(Exception):
    """One line cannot be scored. The message says why, without the line's number."""


@dataclass(frozen=True, slots=True)
class Context:
    """Context of the model and treatment of longer texts."""

    size: int  # tokens
    long: str  # error, truncate or window
    stride: int  # tokens that each window but the first scores

    def windows(self, tokens: int) -> tuple[Window, ...]:
        """Windows that score each token of a text but the first exactly once; with "truncate", only those that fit.

        Raise LineError if the text is too long and `long` is "error".
        """
        if tokens > self.size and self.long == "error":
            raise LineError(
                f"has {tokens:,} tokens, above the context of {self.size:,}: use --long window to score all of them, "
                "or --long truncate to score the first"
            )
        end = min(tokens, self.size)
        windows = first_window(end)
        while self.long == "window" and end < tokens:
            first, end = end, min(end + self.stride, tokens)
            windows.append(Window(end - self.size, end, first))
        return tuple(windows)

    def identity(self) -> dict[str, int | None]:
        """The values on which the scores depend."""
        return {
            "context": None if self.long == "error" else self.size,
            "context_stride": self.stride if self.long == "window" else None,
        }


def make_context(size: int, long: str, stride: int | None) -> Context:
    """The context of a model; the stride defaults to half of it. Raise BatchError if it leaves no context."""
    if stride is not None and stride >= size:
        raise BatchError(f"--stride {stride}: must be below the context of {size:,} tokens")
    return Context(size, long, stride or max(1, size // 2))


@dataclass(frozen=True, slots=True)
class Text:
    encoded: EncodedText
    id: Any = None  # JSON value


@dataclass(frozen=True, slots=True)
class TextReader:
    encoder: TextEncoder
    text_field: str | None = None

    @staticmethod
    def fields(text_field: str | None) -> tuple[str, ...]:
        return (*_text_fields(text_field), *_PAIR, _ID, _TOOLS)

    def read(self, line: Line, *, is_text: bool) -> Text:
        """Encode a line, which is the text itself or a JSON value. Raise LineError if it cannot be scored."""
        if line.error is not None:
            raise LineError(line.error)
        try:
            value = line.data.decode() if is_text else orjson.loads(line.data)
            if isinstance(value, str):
                return Text(self.encoder.text(value, "text"))
            if not isinstance(value, dict):
                raise LineError("is neither a JSON object nor a string")
            return Text(self._encode(value), value.get(_ID))
        except UnicodeDecodeError as error:
            raise LineError(f"is not UTF-8: byte {error.start + 1} of the line") from error
        except orjson.JSONDecodeError as error:
            raise LineError(f"is not JSON: {error}") from error
        except PromptError as error:
            raise LineError(str(error)) from None

    def _encode(self, row: dict[str, Any]) -> EncodedText:
        tools = row.get(_TOOLS)
        for name in _text_fields(self.text_field):
            if row.get(name) is not None:
                return self.encoder.text(row[name], name, tools)
            if self.text_field is None and name == "text" and all(row.get(field) is not None for field in _PAIR):
                return self.encoder.pair(row["prompt"], row["completion"], _PAIR, tools)
        raise LineError(f"has no {self.text_field or 'text, prompt and completion, messages or token_ids'}")


def _text_fields(text_field: str | None) -> tuple[str, ...]:
    """Fields that may hold the text, in order of precedence."""
    return ("text", "messages", "token_ids") if text_field is None else (text_field,)
