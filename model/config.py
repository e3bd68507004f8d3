"""ModelConfig: the sizes of one network, and how `config_hf.py` and `config_gguf.py` read its values from files."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from reprlib import Repr
from typing import Any, Literal

from model.families import FAMILIES
from model.family import HEAD, OUT_BIAS, QKV_BIAS, Family
from model.latent import Latent
from model.layout import COLUMN_BLOCK
from model.rope import Rope
from model.weight_specs import WeightSpec

# Damaged numbers are rejected before memory is allocated for them.
_MAX_LAYERS = 1000
_MAX_HEAD_DIM = 1 << 16
_MAX_INTEGER = (1 << 31) - 1
_MAX_FACTOR = 1e6  # of a context's length; at 1e16 arithmetic fails

_SHORT = Repr(maxstring=200)


class ConfigError(ValueError):
    """A model's configuration lacks a value, contradicts itself or needs an unsupported feature."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Properties that differ between layers."""

    rope: Rope | None  # None: no rotary embedding
    window: int = 0  # tokens that a query attends to, itself included; 0 = all before it
    is_sparse: bool = False  # the MLP is a mixture of experts
    query_growth: tuple[float, int] | None = None  # (b, n): queries at position p are times 1 + b log(1 + floor(p / n))


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that sparse layers have as MLP."""

    count: int  # X
    per_token: int  # experts that a token is routed to
    size: int  # XF, features of an expert
    normalized: bool  # the weights of a token's experts add up to 1, before they are scaled
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1  # of consecutive experts
    open_groups: int = 1  # number of groups, the best ones, whose experts a token may be routed to
    scale: float = 1.0  # of the weights
    shared_size: int = 0  # SF, features of an MLP that is added for every token; 0: none

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ConfigError(f"{self.per_token} experts per token are not from 1 to {self.count} experts")
        size = self.count // max(1, self.groups)
        if self.groups < 1 or self.count % self.groups or (self.groups > 1 and self.scoring == "sigmoid" and size < 2):
            raise ConfigError(f"{self.count} experts cannot be split into {self.groups} groups")
        if not 1 <= self.open_groups <= self.groups or self.per_token > self.open_groups * size:
            raise ConfigError(
                f"{self.per_token} experts per token do not fit {self.open_groups} of {self.groups} groups"
            )
        _check_positive("the scale of experts' weights", self.scale)

    def dims(self) -> dict[str, int]:
        """As `ModelConfig.dims`; 2 SF is that of the shared MLP's gate and up."""
        return {"X": self.count, "XF": self.size, "SF": self.shared_size}


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
    experts: Experts | None = None
    # Latent attention is multi-query attention over the cache: K is 1 and E that of a cached token.
    latent: Latent | None = None
    qkv_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of the outputs of attention and MLP
    logit_scale: float = 1.0
    shard_features: int = COLUMN_BLOCK  # F of a shard is a multiple of it, if there are several

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def rotated_dims(self) -> int:
        """The first dimensions of a head, which are rotated."""
        return next((kind.rope.dims for kind in self.layers if kind.rope), 0) or self.head_dim

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def for_length(self, tokens: int) -> "ModelConfig":
        """The network of a server whose requests have up to `tokens` tokens."""
        layers = [replace(kind, rope=kind.rope and kind.rope.for_length(tokens)) for kind in self.layers]
        return replace(self, layers=tuple(layers))

    def dims(self) -> dict[str, int]:
        """Axis sizes by letters of the weight table: V, D, F, Q = H*E, KV = K*E, QKV, FF = 2 F, E, H, K, X, XF, 1."""
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
            **(self.experts.dims() if self.experts else {}),
            **(self.latent.dims(self.num_heads) if self.latent else {}),
            "1": 1,
        }

    def weights(self) -> dict[str, WeightSpec]:
        """Every weight of the network, by its path."""
        attention = self.latent.weights(self.num_heads) if self.latent else ()
        dense = self.traits.weights(0, attention)
        sparse = self.traits.weights(self.experts.count, attention) if self.experts else dense
        tables = [sparse if kind.is_sparse else dense for kind in self.layers]
        layers = [spec.of_layer(i) for i, table in enumerate(tables) for spec in table if spec.is_per_layer]
        embedding, *last = [spec for spec in dense if not spec.is_per_layer]
        absent = {HEAD.path} if self.tie_word_embeddings else set()
        absent |= (
            set()
            if self.qkv_bias
            else {bias.path.format(i=i) for bias in (QKV_BIAS, OUT_BIAS) for i in range(self.num_layers)}
        )
        return {spec.path: spec for spec in (embedding, *layers, *last) if spec.path not in absent}

    def __post_init__(self) -> None:
        for name in ("num_layers", *(field.name for field in fields(self) if field.type is int)):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        caps = [name for name in ("attention_cap", "logit_cap") if getattr(self, name)]
        scales = ("attention_scale", "embedding_scale", "residual_scale", "logit_scale")
        for name in ("rms_norm_eps", *scales, *caps):
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
        if not 0 <= kind.rope.dims <= self.head_dim or kind.rope.dims % 2:
            raise ConfigError(f"{kind.rope.dims} rotated dimensions do not fit head_dim {self.head_dim}")
        _check_positive("rope_theta", kind.rope.theta)
        _check_positive("rotary scale", kind.rope.scale)
        for divisors in (kind.rope.divisors, kind.rope.long_divisors):
            if divisors and len(divisors) != (kind.rope.dims or self.head_dim) // 2:
                raise ConfigError(f"{len(divisors)} rotary factors do not fit head_dim {self.head_dim}")
            for divisor in divisors:
                _check_positive("a rotary factor", divisor)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a positive number, got {value}")


def short_repr(value: object) -> str:
    """A file's value for a message, truncated if it is long or deep."""
    return _SHORT.repr(value)


def layer_kinds(
    windows: list[int],
    uses_rope: list[bool],
    rope: Rope,
    local_rope: Rope,
    query_growth: tuple[float, int] | None = None,
) -> tuple[LayerKind, ...]:
    """Layers by window and use of RoPE; `local_rope` is that of layers with a window."""
    return tuple(
        LayerKind((local_rope if window else rope) if is_rotary else None, window, query_growth=query_growth)
        for window, is_rotary in zip(windows, uses_rope, strict=True)
    )


def layer_count(source: Mapping[str, Any], key: str) -> int:
    """L.

    Raises:
        ConfigError: the value is missing, no integer, or out of range; also raised by the other functions.
    """
    return int_of(source, key, low=1, high=_MAX_LAYERS)


def head_dim_of(source: Mapping[str, Any], key: str, hidden: int, heads: int) -> int:
    """E: the file's value, else hidden size over heads. Also checks that both are at least 1."""
    exists = source.get(key) is not None
    if hidden < 1 or heads < 1 or (not exists and hidden % heads):
        hint = "" if exists else ", and no head size is given"
        raise ConfigError(f"hidden size {hidden} is not a multiple of {heads} heads{hint}")
    return int_of(source, key, hidden // heads, low=1, high=_MAX_HEAD_DIM)


def check_keys(source: Mapping[str, Any], known: Collection[str], neutral: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse keys that may change the arithmetic: neither known, nor null, nor of their neutral value."""
    for key, value in source.items():
        if key not in known and value is not None and not (key in neutral and value == neutral[key]):
            raise ConfigError(f"{prefix}{key} {short_repr(value)} is not supported")


def bool_of(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean of config.json; `default` if it is missing."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {short_repr(value)}")
    return value


def strings_of(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings of config.json; empty if it is missing."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} must be a list of strings")
    return value


def mapping_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of config.json; empty if it is missing."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be an object")
    return value


def int_of(
    source: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    low: int = -_MAX_INTEGER,
    high: int = _MAX_INTEGER,
) -> int:
    """An integer from `low` to `high`; `default` if it is missing."""
    value = _value_of(source, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be an integer, got {short_repr(value)}")
    if not low <= value <= high:
        raise ConfigError(f"{key} must be from {low} to {high}, got {short_repr(value)}")
    return value


def float_of(source: Mapping[str, Any], key: str, default: float | None = None, *, above: float | None = None) -> float:
    """A number, above a limit; `default` if it is missing."""
    value = _value_of(source, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, got {short_repr(value)}")
    number = _finite(key, value)
    if above is not None and not number > above:
        raise ConfigError(f"{key} must be above {above:g}, got {number}")
    return number


def factor_of(source: Mapping[str, Any], key: str, default: float | None = None, *, low: float = 1.0) -> float:
    """A number of rotary scaling, from `low` to 1e6; `default` if it is missing."""
    factor = float_of(source, key, default)
    if not low <= factor <= _MAX_FACTOR:
        raise ConfigError(f"{key} must be from {low:g} to {_MAX_FACTOR:g}, got {factor}")
    return factor


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
        raise ConfigError(f"{key} must be finite, got {short_repr(value)}")
    return number
