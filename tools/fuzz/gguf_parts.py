"""A GGUF file taken apart, so that it can be put together with another key, value or row of its table.

Not made with the project's reader, which is what is tried, nor with gguf.GGUFWriter, which writes only what is right.
"""

import struct
from dataclasses import dataclass
from typing import Any

STRING, ARRAY = 8, 9
# Type number of a value -> how struct packs it.
PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32  # bytes
_KINDS: dict[type, int] = {bool: 7, int: 4, float: 6, str: STRING}
_MOST = 10_000  # keys, rows or items: a file of more is not taken apart


@dataclass(frozen=True, slots=True)
class Value:
    """A key and its value as bytes: of an array, those of each item."""

    key: bytes
    kind: int
    items: tuple[bytes, ...]
    item_kind: int = 0  # of an array

    @classmethod
    def of(cls, key: str, value: Any) -> "Value":
        """From a Python value, or a list of some of one type."""
        if isinstance(value, list):
            kind = _KINDS[type(value[0])]
            return cls(key.encode(), ARRAY, tuple(packed(kind, each) for each in value), kind)
        kind = _KINDS[type(value)]
        return cls(key.encode(), kind, (packed(kind, value),))

    def packed(self) -> bytes:
        """As the file has it."""
        body = b"".join(self.items)
        if self.kind == ARRAY:
            body = struct.pack("<IQ", self.item_kind, len(self.items)) + body
        return string(self.key) + struct.pack("<I", self.kind) + body


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table of tensors."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int

    def packed(self) -> bytes:
        """As the file has it."""
        numbers = (len(self.dims), *self.dims, self.kind, self.offset % 2**64)
        return string(self.name) + struct.pack(f"<I{len(self.dims)}QIQ", *numbers)


@dataclass(slots=True)
class File:
    """All of it."""

    version: int
    values: list[Value]
    rows: list[Row]
    data: bytes  # of the tensors

    def packed(self) -> bytes:
        """As it is stored."""
        counts = struct.pack("<IQQ", self.version, len(self.rows), len(self.values))
        parts = [*(value.packed() for value in self.values), *(row.packed() for row in self.rows)]
        head = b"GGUF" + counts + b"".join(parts)
        return head + bytes(-len(head) % ALIGNMENT) + self.data


def string(text: bytes) -> bytes:
    """A text after its length."""
    return struct.pack("<Q", len(text)) + text


def packed(kind: int, value: Any) -> bytes:
    """A value that is no array."""
    return string(value.encode()) if kind == STRING else struct.pack("<" + PACKED[kind], value)


def taken_apart(data: bytes) -> File | None:
    """The parts of a file, None where it is no longer whole enough."""
    try:
        return _Reader(data).file()
    except (ValueError, struct.error):
        return None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def file(self) -> File:
        self._take(4)
        version, rows, values = self._numbers("<IQQ")
        made = [self._value() for _ in self._range(values)]
        table = [self._row() for _ in self._range(rows)]
        return File(version, made, table, self._data[-(-self._at // ALIGNMENT) * ALIGNMENT :])

    def _range(self, count: int) -> range:
        if count > _MOST:
            raise ValueError(count)
        return range(count)

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(kinds, self._take(struct.calcsize(kinds)))

    def _text(self) -> bytes:
        return self._take(self._numbers("<Q")[0])

    def _value(self) -> Value:
        key, (kind,) = self._text(), self._numbers("<I")
        if kind != ARRAY:
            return Value(key, kind, (self._item(kind),))
        item, count = self._numbers("<IQ")
        return Value(key, kind, tuple(self._item(item) for _ in self._range(count)), item)

    def _item(self, kind: int) -> bytes:
        if kind == STRING:
            return string(self._text())
        if kind not in PACKED:
            raise ValueError(kind)
        return self._take(struct.calcsize(PACKED[kind]))

    def _row(self) -> Row:
        name, (axes,) = self._text(), self._numbers("<I")
        return Row(name, self._numbers(f"<{min(axes, 8)}Q"), *self._numbers("<IQ"))
