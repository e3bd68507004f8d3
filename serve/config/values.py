"""Parsers of option values: each raises ValueError, whose message shows the value."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%|[kmgt]i?|)b?)", re.IGNORECASE)


type MemoryAmount = int | float  # bytes, or a share of the free memory in (0, 1]


def parse_memory(text: str) -> MemoryAmount:
    """Parse "800M", "2GiB", "1073741824", "50%" or "0.5"; raises ValueError for anything else."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is neither bytes, such as 800M or 2GiB, nor a share, such as 0.5 or 50%")
    number, unit = float(match[1]), match[2].lower()
    if unit != "%" and not (unit == "" and "." in match[1]):
        return int(number * _UNITS[unit])
    share = number / 100 if unit else number
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is not a share above 0 and at most 1")
    return share


def error_reason(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def mb(size: int) -> str:
    """Bytes as "1,234 MB"."""
    return f"{size / 1e6:,.0f} MB"


def parse_bytes(text: str) -> int:
    """Parse a number of bytes such as "64MiB"; raises ValueError for anything else."""
    size = parse_memory(text)
    if isinstance(size, float):
        raise ValueError(f"{text!r} is a share; give bytes, such as 64MiB")
    return size


@dataclass(frozen=True, slots=True)
class OneOf:
    """Parse one of several words; raises ValueError for any other."""

    choices: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.choices:
            raise ValueError(f"{text!r} is not one of {', '.join(self.choices)}{suggestion(text, self.choices)}")
        return text


@dataclass(frozen=True, slots=True)
class Between[N: (int, float)]:
    """Parse a number between two bounds, inclusive, of their type; raises ValueError for anything else."""

    low: N
    high: N
    unit: str = ""  # for --help

    def __call__(self, text: str) -> N:
        kind = type(self.low)
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is not between {self.low} and {self.high}")
        return value


def api_key(text: str, source: str = "") -> str:
    """Check a key; raises ValueError, whose message starts with `source` and does not show the key."""
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError(f"{source}a key must be non-empty ASCII text without spaces")
    return text


def root_path(text: str) -> str:
    """The prefix of a URL's path, with a slash before it and none after it; raises ValueError for other characters."""
    if not re.fullmatch(r"[\w.~/-]*", text, re.ASCII):
        raise ValueError(f"{text!r} is not a path of letters, digits, and the characters - . _ ~ /")
    return f"/{text.strip('/')}".rstrip("/")


def strings(text: str) -> tuple[str, ...]:
    """Parse a JSON list of strings; raises ValueError for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{text!r} is not a JSON list of strings, such as ["*"]')
    return tuple(value)


def suggestion(word: str, words: Iterable[str]) -> str:
    """The nearest of `words` as the end of an error message; empty if none is near."""
    nearest = difflib.get_close_matches(word, [*words], 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
