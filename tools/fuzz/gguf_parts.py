"""Parse a GGUF file into keys, values and tensor rows and serialize it again.

It uses neither the project's reader, which is under test, nor gguf.GGUFWriter, which writes only valid files.
"""

import struct
from dataclasses import dataclass
from typing import Any

STRING, ARRAY = 8, 9
# Value type -> struct format.
PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32  # bytes
_KINDS: dict[type, int] = {bool: 7, int: 4, float: 6, str: STRING}
_MAX_COUNT = 10_000  # keys, rows or items; a larger file is not parsed


@dataclass(frozen=True, slots=True)
class Value:
    """A key and its value as bytes, one element per array item."""

    key: bytes
    kind: int
    items: tuple[bytes, ...]
    item_kind: int = 0  # of an array

    @classmethod
    def of(cls, key: str, value: Any) -> "Value":
        """Encode a Python value or a homogeneous list."""
        if isinstance(value, list):
            kind = _KINDS[type(value[0])]
            return cls(key.encode(), ARRAY, tuple(pack(kind, each) for each in value), kind)
        kind = _KINDS[type(value)]
        return cls(key.encode(), kind, (pack(kind, value),))

    def pack(self) -> bytes:
        """Serialize."""
        body = b"".join(self.items)
        if self.kind == ARRAY:
            body = struct.pack("<IQ", self.item_kind, len(self.items)) + body
        return string(self.key) + struct.pack("<I", self.kind) + body


@dataclass(frozen=True, slots=True)
class Row:
    """An entry of the tensor table."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int

    def pack(self) -> bytes:
        """Serialize."""
        numbers = (len(self.dims), *self.dims, self.kind, self.offset % 2**64)
        return string(self.name) + struct.pack(f"<I{len(self.dims)}QIQ", *numbers)


@dataclass(slots=True)
class File:
    """A complete file."""

    version: int
    values: list[Value]
    rows: list[Row]
    data: bytes  # tensor data

    def pack(self) -> bytes:
        """Serialize."""
        counts = struct.pack("<IQQ", self.version, len(self.rows), len(self.values))
        parts = [*(value.pack() for value in self.values), *(row.pack() for row in self.rows)]
        head = b"GGUF" + counts + b"".join(parts)
        return head + bytes(-len(head) % ALIGNMENT) + self.data


def string(text: bytes) -> bytes:
    """Serialize a string with its length."""
    return struct.pack("<Q", len(text)) + text


def pack(kind: int, value: Any) -> bytes:
    """Serialize a scalar."""
    return string(value.encode()) if kind == STRING else struct.pack("<" + PACKED[kind], value)


def parse(data: bytes) -> File | None:
    """Parse a file; None if it is too damaged."""
    try:
        return _Reader(data).file()
    except (ValueError, struct.error):
        return None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    def file(self) -> File:
        self._take(4)
        version, rows, values = self._numbers("<IQQ")
        made = [self._value() for _ in self._range(values)]
        table = [self._row() for _ in self._range(rows)]
        return File(version, made, table, self._data[-(-self._offset // ALIGNMENT) * ALIGNMENT :])

    def _range(self, count: int) -> range:
        if count > _MAX_COUNT:
            raise ValueError(count)
        return range(count)

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._offset:
            raise ValueError(count)
        self._offset += count
        return self._data[self._offset - count : self._offset]

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
