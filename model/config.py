"""ModelConfig: the sizes of one network, and how `config_hf.py` and `config_gguf.py` read its values from files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import Repr
from typing import Any

from model.families import FAMILIES, Family
from model.rope import Rope

# Damaged numbers are rejected before memory is allocated for them.
_MAX_LAYERS = 1000
_MAX_HEAD_DIM = 1 << 16
MAX_FACTOR = 1e6  # of a context's length; at 1e16 arithmetic fails
_INTEGERS = 1 << 31  # bound of the magnitude of integers

_SHORT = Repr(maxstring=200)


class ConfigError(ValueError):
    """A model's configuration lacks a value, contradicts itself or needs an unsupported feature."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Properties of attention that differ between layers."""

    rope: Rope | None  # None: no rotary embedding
    window: int = 0  # tokens that a query attends to, itself included; 0 = all before it


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of one network. Hashable, so it can be a static argument."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    layers: tuple[LayerKind, ...]
    rms_norm_eps: float
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool
    attention_scale: float  # factor of the scores
    attention_cap: float = 0.0  # replaces a score by cap * tanh(score / cap); 0 = off
    logit_cap: float = 0.0  # the same for logits

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def for_length(self, tokens: int) -> "ModelConfig":
        """The network of a server whose requests have up to `tokens` tokens."""
        layers = [replace(kind, rope=kind.rope and kind.rope.for_length(tokens)) for kind in self.layers]
        return replace(self, layers=tuple(layers))

    def dims(self) -> dict[str, int]:
        """Axis sizes by the letters of the weight table: V, D, F, Q = H*E, KV = K*E, QKV, FF = 2 F, E, H, K."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "Q": q,
            "KV": kv,
            "QKV": q + 2 * kv,
            "FF": 2 * self.intermediate_size,
            "E": self.head_dim,
            "H": self.num_heads,
            "K": self.num_kv_heads,
        }

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rms_norm_eps", "attention_scale"):
            _check_positive(name, getattr(self, name))
        for name in ("attention_cap", "logit_cap"):
            if getattr(self, name):
                _check_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even size")
        for kind in set(self.layers):
            self._check_layer(kind)

    def _check_layer(self, kind: LayerKind) -> None:
        if kind.window < 0:
            raise ConfigError(f"a sliding window must be at least 1, got {kind.window}")
        if kind.rope is None:
            return
        _check_positive("rope_theta", kind.rope.theta)
        _check_positive("rotary scale", kind.rope.scale)
        for divisors in (kind.rope.divisors, kind.rope.long_divisors):
            if divisors and len(divisors) != self.head_dim // 2:
                raise ConfigError(f"{len(divisors)} rotary factors do not fit head_dim {self.head_dim}")
            for divisor in divisors:
                _check_positive("a rotary factor", divisor)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a positive number, got {value}")


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
    value = _value_of(source, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be an integer, got {shown(value)}")
    if abs(value) >= _INTEGERS:
        raise ConfigError(f"{key} must be below {_INTEGERS}, got {shown(value)}")
    return value


def float_of(source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number; `default` if it is missing."""
    value = _value_of(source, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {shown(value)}")
    return _finite(key, value)


def _value_of(source: Mapping[str, Any], key: str, default: float | None) -> Any:
    value = default if source.get(key) is None else source[key]
    if value is None:
        raise ConfigError(f"{key} is missing")
    return value


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
