"""Random mutations of JSON: a value, field or element is replaced, deleted, duplicated or moved."""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

type _Container = dict[str, Any] | list[Any]

NUMBERS = (
    *(0, 1, -1, 2, 3, 16, 64, 100, 127, 128, 255, 256, 259, 4096, 10_001, -2),
    *(2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**30),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 1e-7, 1e-45, 5e-324, 1e38, 3.5e38, 1.7e308),
)
STRINGS = (
    *("", "a", " ", "\0", "\n", "é", "日本語", "\U0001f642", "\ufeff", "\u202e", "e\u0301", "a" * 300, "\x7f" * 40),
    *("null", "true", "0", "-1", "1e5", "NaN", "user", "text", "..", "{{ x }}", "%s%n", "\\xff", "$ref", "__class__"),
)
# Placeholders for what json.dumps cannot write: invalid JSON, and deeply nested lists or objects.
_RAW, _LISTS, _OBJECTS = "\ue000raw", "\ue000lists", "\ue000objects"
_PLACEHOLDER = re.compile(f'"({_RAW}|{_LISTS}|{_OBJECTS})(\\d*)"')
_INVALID_JSON = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "01", "1.", "+1", "0x10", "1" * 400, "0." + "1" * 400),
    *(r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', '"\t"', r'"\x"', "'a'", "", "[", "{", "tru", "undefined", "/**/1"),
    '{"a":1,"a":2}',
)
_LEVELS = (3, 10, 62, 63, 64, 65, 66, 100, 300, 900, 1030, 3000, 20_000, 200_000)


def random_value(random: Random, depth: int = 0) -> Any:
    """Return a random JSON value."""
    match random.randrange(12 if depth < 3 else 8):
        case 0:
            return None
        case 1:
            return random.random() < 0.5
        case 2 | 3:
            return random.choice(NUMBERS)
        case 4:
            return random.randrange(-300, 300)
        case 5 | 6:
            return random.choice(STRINGS)
        case 7:
            return _RAW if random.random() < 0.2 else nested(random)
        case 8 | 9:
            return [random_value(random, depth + 1) for _ in range(random.randrange(4))]
        case 10:
            return {random.choice(STRINGS): random_value(random, depth + 1) for _ in range(random.randrange(3))}
        case _:
            return [random.randrange(256)] * random.choice((1, 2, 129, 2049))


def nested(random: Random) -> str:
    """Return a placeholder for a deeply nested value."""
    return f"{random.choice((_LISTS, _OBJECTS))}{random.choice(_LEVELS)}"


def mutate_json(value: dict[str, Any], random: Random, plausible_value: Callable[[str, Random], Any]) -> None:
    """Mutate an object in place, once.

    Args:
        plausible_value: returns a value for a field's name.
    """
    locations = list(_locations(value))
    if not locations:
        value[random.choice(STRINGS)] = random_value(random)
        return
    # Half of the mutations change a top-level field, where most of the request is.
    container, key = random.choice(locations[: len(value)] if random.random() < 0.5 else locations)
    target: Any = container
    old = target[key]
    match random.randrange(9):
        case 0 | 1:
            new = plausible_value(key, random) if isinstance(key, str) else random_value(random)
        case 2:
            new = random_value(random)
        case 3:
            new = _RAW if random.random() < 0.3 else nested(random)
        case 4:
            new = [old] * random.choice((1, 2, 3))
        case 5 | 6:
            new = _nudge(old, random)
        case 7:
            other, elsewhere = random.choice(locations)
            new = dict(_pairs(other))[elsewhere]
        case _:
            del target[key]
            return
    target[key] = _copy(new)


def _nudge(old: Any, random: Random) -> Any:
    """Return a similar value of the same type."""
    match old:
        case bool():
            return not old
        case int() | float():
            return random.choice((old + 1, old - 1, -old, old * 2, old / 2, old * 1000))
        case str():
            index = random.randrange(len(old) + 1)
            return random.choice(
                (old[:index], old[:index] + random.choice(STRINGS) + old[index:], old[:1000] * 3, old + "\0")
            )
        case list():
            return old * random.choice((2, 3, 50)) if 0 < len(old) < 100 else old[:1]
    return random_value(random)


def _copy(value: Any) -> Any:
    """Deep copy, so that no container is shared or contains itself."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _locations(value: _Container) -> Iterator[tuple[_Container, str | int]]:
    """Yield (container, key) of all values in the first 8 levels, top-level fields first."""
    level = [value]
    for _ in range(8):
        for container in level:
            for key, _ in _pairs(container):
                yield container, key
        level = [inner for container in level for _, inner in _pairs(container) if isinstance(inner, dict | list)]


def _pairs(container: _Container) -> list[tuple[str | int, Any]]:
    return [*(container.items() if isinstance(container, dict) else enumerate(container[:20]))]


def serialize(value: Any, random: Random) -> bytes:
    """Serialize a value and expand its placeholders; sometimes with spaces.

    Raises:
        RecursionError: it is nested too deeply.
    """
    spaces = (", ", ": ") if random.random() < 0.1 else (",", ":")
    text = json.dumps(value, ensure_ascii=False, separators=spaces)
    text = _PLACEHOLDER.sub(lambda found: _expand(found[1], int(found[2] or 0), random), text)
    return text.encode("utf-8", "surrogatepass")


def _expand(mark: str, levels: int, random: Random) -> str:
    if mark == _RAW:
        return random.choice(_INVALID_JSON)
    before, after = ("[", "]") if mark == _LISTS else ('{"x":', "}")
    return before * levels + '"x"' + after * levels
