"""Minimum work of a program per device: bytes from memory, flops, bytes between devices.

The roofline (Williams et al. 2009) of a step: each weight it uses is read once, and so are the cached keys and values
of its rows; intermediate results never go to memory. Of experts, as many are used as if each token chose at random.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from compiled.programs import Shape
from compiled.shapes import DecodeShape, HeadShape, PrefillShape
from model.config import ModelConfig
from model.kv_cache import PAGE_SIZE
from model.transformer import BoundModel, abstract_weights
from tools.portability.chips import Chip

_FLOAT = 4  # bytes per value summed over devices


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one device."""

    read: int  # bytes from its memory
    flops: int
    linked: int  # bytes to and from other devices

    def seconds(self, chip: Chip) -> float:
        """Minimum time: memory and arithmetic overlap; a layer waits for the links."""
        return max(self.read / chip.bandwidth, self.flops / chip.peak) + self.linked / chip.links

    def bound(self, chip: Chip) -> str:
        """The resource that takes the most time."""
        times = {
            "memory": self.read / chip.bandwidth,
            "arithmetic": self.flops / chip.peak,
            "links": self.linked / chip.links,
        }
        return max(times, key=lambda name: times[name])


def work_of(model: BoundModel, shape: Shape, context: int) -> Work | None:
    """Return the work of a step or a block of scored rows; None for programs that only fill memory.

    Args:
        model: may be abstract.
        context: cached tokens per row.
    """
    config, cut, size = model.parallel.local, model.parallel, jnp.dtype(model.dtype).itemsize
    V, D, L = config.vocab_size, config.hidden_size, config.num_layers
    shapes = abstract_weights(model.config, model.dtype, cut.shards).values()  # per device
    matrices = sum(math.prod(each.shape) for each in shapes if len(each.shape) > 1)
    layers = matrices - V * D * (1 if config.tie_word_embeddings else 2)
    match shape:
        case DecodeShape() | PrefillShape():
            rows, prefills = shape.rows, isinstance(shape, PrefillShape)
            tokens = rows * shape.tokens if isinstance(shape, PrefillShape) else rows
            head = 0 if prefills else V * D
            attention = 4 * tokens * context * L * config.num_heads * config.head_dim
            unused, idle = _unused_experts(config, tokens), _unused_experts(config, 1)
            read = size * (layers - unused + head + tokens * D) + rows * context * _bytes_per_token(model)
            summed = (2 * L + 1) * tokens * D * _FLOAT  # after attention and MLP of each layer, and the embeddings
            flops = 2 * tokens * (layers - idle + head) + attention
            return Work(read, flops, _linked(cut.shards, summed))
        case HeadShape(rows):
            return Work(size * rows * D + size * V * D, 2 * rows * V * D, _linked(cut.shards, rows * D * size) // 2)
    return None


def _unused_experts(config: ModelConfig, tokens: int) -> int:
    """Number of weights of the experts that no token uses; the expectation if each token chooses at random."""
    experts = config.experts
    if experts is None:
        return 0
    unused = experts.count * (1 - experts.per_token / experts.count) ** tokens
    return round(unused * sum(kind.is_sparse for kind in config.layers) * 3 * config.hidden_size * experts.size)


def _bytes_per_token(model: BoundModel) -> int:
    """Bytes per token of keys and values on one device."""
    layout = model.cache_layout
    return layout.bytes_per_page // PAGE_SIZE - layout.hidden_size * jnp.dtype(model.dtype).itemsize


def _linked(shards: int, size: int) -> int:
    """Bytes to and from each device for a ring all-reduce of `size` bytes, which takes two rounds.

    An all-gather takes one.
    """
    return 4 * (shards - 1) * size // shards
