"""ModelConfig: the sizes of one network, read from a model's files by `config_hf.py` and `config_gguf.py`."""

import math
from dataclasses import dataclass, replace

from model.families import FAMILIES, Family
from model.rope import Rope


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
        """The family's properties."""
        return FAMILIES[self.family]

    @property
    def num_layers(self) -> int:
        """L."""
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
