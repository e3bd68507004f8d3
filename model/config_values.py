"""Values of a configuration, checked: what is missing or of another type is named."""

from collections.abc import Mapping
from typing import Any

from model.config import ConfigError

_MAX_LAYERS = 10_000  # a damaged number of them is refused before they are made


def layer_count(source: Mapping[str, Any], key: str) -> int:
    """L.

    Raises:
        ConfigError: as do all here; it is missing, no integer, or absurd.
    """
    count = int_of(source, key)
    if not 1 <= count <= _MAX_LAYERS:
        raise ConfigError(f"{key} must be from 1 to {_MAX_LAYERS}, got {count}")
    return count


def head_dim_of(source: Mapping[str, Any], key: str, hidden: int, heads: int) -> int:
    """E: as the file says, else what the hidden size leaves for each head."""
    if source.get(key) is not None:
        return int_of(source, key)
    if heads < 1 or hidden % heads:
        raise ConfigError(f"hidden size {hidden} is not a multiple of {heads} heads, and no head size is given")
    return hidden // heads


def strings_of(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings of config.json; empty where there is none."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"config.json: {key} must be a list of strings")
    return value


def mapping_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of config.json; empty where there is none."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object")
    return value


def int_of(source: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer; `default` where there is none."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be an integer, got {value!r}")
    return value


def float_of(source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number; `default` where there is none."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {value!r}")
    return float(value)


def floats_of(source: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A list of numbers."""
    value = source.get(key)
    if not isinstance(value, list) or not all(isinstance(each, int | float) for each in value):
        raise ConfigError(f"{key} must be a list of numbers")
    return tuple(float(each) for each in value)
