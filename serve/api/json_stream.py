"""JSON as bytes, where a value may be too large to be held: it is written piece by piece into a hole in the rest."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson


def dump(value: Any) -> bytes:
    """JSON. numpy's float32 is printed as the shortest text that gives the same float32."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


class Hole:
    """Stands in a value for JSON that comes in pieces. No dataclass: orjson would write its fields."""

    def __init__(self, pieces: AsyncGenerator[bytes]) -> None:
        self.pieces = pieces


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON text and its holes in order."""

    texts: list[bytes]  # one more than holes: before, between and after them
    holes: list[Hole]

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The whole text. The first piece ends in a hole, if there is one: what fails in opening it fails first."""
        text = self.texts[0]
        for hole, after in zip(self.holes, self.texts[1:], strict=True):
            async with aclosing(hole.pieces) as pieces:
                async for piece in pieces:
                    yield text + piece
                    text = b""
            text += after
        yield text


def make_body(value: Any) -> Body:
    """The JSON of a value that may hold `Hole`s."""
    mark = uuid.uuid4().hex  # no text in the value can hold it but by guessing 122 bits
    holes: list[Hole] = []

    def marked(part: Any) -> str:
        if not isinstance(part, Hole):
            raise TypeError(f"{type(part).__name__} has no JSON")
        holes.append(part)
        return mark

    data = orjson.dumps(value, default=marked, option=orjson.OPT_SERIALIZE_NUMPY)
    return Body(data.split(f'"{mark}"'.encode()), holes)
