"""Amounts of memory as the command line takes them: bytes, or a fraction of what is free."""

import re
from dataclasses import dataclass

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%|[kmgt]i?|)b?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MemoryAmount:
    """Bytes, or a share of the free memory."""

    size: int | float  # int: bytes; float: a share above 0, at most 1

    def bytes_of(self, free: int | None) -> int | None:
        """In bytes, where `free` are free; None for a share of an unknown amount."""
        if isinstance(self.size, int):
            return self.size
        return None if free is None else int(self.size * free)


def parse_memory(text: str) -> MemoryAmount:
    """Reads "800M", "2GiB", "1073741824", "50%" or "0.5".

    Raises:
        ValueError: it is none of these.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is neither bytes, such as 800M or 2GiB, nor a share, such as 0.5 or 50%")
    number, unit = float(found[1]), found[2].lower()
    if unit != "%" and not (unit == "" and "." in found[1]):
        return MemoryAmount(int(number * _UNITS[unit]))
    share = number / 100 if unit else number
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is no share above 0 and up to all")
    return MemoryAmount(share)


def mb(size: int) -> str:
    """Bytes as "1,234 MB"."""
    return f"{size / 1e6:,.0f} MB"
