"""Reads values of a configuration; errors name the key that is missing or has a wrong type."""

import math
from collections.abc import Mapping
from reprlib import Repr
from typing import Any

from model.config import ConfigError

# Damaged numbers are rejected before memory is allocated for them.
_MAX_LAYERS = 1000
_MAX_HEAD_DIM = 1 << 16
MAX_FACTOR = 1e6  # of a context's length; at 1e16 arithmetic fails
_INTEGERS = 1 << 31  # bound of the magnitude of integers

_SHORT = Repr(maxstring=200)


def shown(value: object) -> str:
    """A file's value for a message, truncated if it is long or deep."""
    return _SHORT.repr(value)


def layer_count(source: Mapping[str, Any], key: str) -> int:
    """L.

    Raises:
        ConfigError: the value is missing, no integer, or out of range; also raised by the other functions.
    """
    count = int_of(source, key)
    if not 1 <= count <= _MAX_LAYERS:
        raise ConfigError(f"{key} must be from 1 to {_MAX_LAYERS}, got {count}")
    return count


def head_dim_of(source: Mapping[str, Any], key: str, hidden: int, heads: int) -> int:
    """E: the file's value, else hidden size over heads. Also checks that both are at least 1."""
    exists = source.get(key) is not None
    if hidden < 1 or heads < 1 or (not exists and hidden % heads):
        hint = "" if exists else ", and no head size is given"
        raise ConfigError(f"hidden size {hidden} is not a multiple of {heads} heads{hint}")
    size = int_of(source, key, hidden // heads)
    if not 1 <= size <= _MAX_HEAD_DIM:
        raise ConfigError(f"the head size must be from 1 to {_MAX_HEAD_DIM}, got {size}")
    return size


def strings_of(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings of config.json; empty if it is missing."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"config.json: {key} must be a list of strings")
    return value


def mapping_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of config.json; empty if it is missing."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object")
    return value


def int_of(source: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer; `default` if it is missing."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be an integer, got {shown(value)}")
    if abs(value) >= _INTEGERS:
        raise ConfigError(f"{key} must be below {_INTEGERS}, got {shown(value)}")
    return value


def float_of(source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number; `default` if it is missing."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {shown(value)}")
    return _finite(key, value)


def floats_of(source: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A list of numbers."""
    value = source.get(key)
    if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
        raise ConfigError(f"{key} must be a list of numbers")
    return tuple(_finite(key, item) for item in value)


def _finite(key: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{key} must be finite, got {shown(value)}")
    return number
