"""Transformer: embed -> layers -> final hidden states; the head is separate, so that hidden states can be scored later.

Flax NNX only defines the modules. At load the abstract module is split once into a graph definition and flat leaves;
a step merges them again while it is traced.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from model.config import ModelConfig
from model.kv_cache import CacheLayout, PagedCache, addresses, write_hidden
from model.layers import Layer, RMSNorm, soft_cap
from model.linear import Linear, Weight, matmul, take_rows
from model.rotary import rotary_angles
from model.sharding import Cut


class Embedding(nnx.Module):
    """Token embeddings [V, D], which are also the head's weight where the two are tied."""

    def __init__(self, cut: Cut, dtype: jnp.dtype) -> None:
        config = cut.local
        self.weight = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.scale = math.sqrt(config.hidden_size) if config.traits.scaled_embedding else 1.0
        self.cut = cut

    def __call__(self, tokens: Array) -> Array:
        """tokens [R, T] int32 -> [R, T, D] float32."""
        R, T = tokens.shape
        rows = self._rows(tokens.reshape(R * T)).reshape(R, T, -1)
        return rows if self.scale == 1 else rows * jnp.float32(self.scale)

    def _rows(self, tokens: Array) -> Array:
        """tokens [M] -> [M, D] float32. Each token's row is in one shard."""
        width = self.cut.local.vocab_size
        at = self.cut.vocabulary.place(tokens, width)
        if self.cut.shards == 1:
            return take_rows(self.weight.get_value(), at).astype(jnp.float32)
        rows = take_rows(self.weight.get_value(), jnp.minimum(at, width - 1)).astype(jnp.float32)
        return self.cut.total(jnp.where((at < width)[:, None], rows, 0.0))


def traced_once[T](method: Callable[..., T]) -> Callable[..., T]:
    """`method` of modules (positional arguments only), traced for the first of those that are alike.

    The others take what was traced: most of what a start with warm caches takes is tracing, and layers are alike. XLA
    sees calls of one function, and inlines them.
    """

    def call(graph: Any, state: Any, *arguments: Any) -> T:
        return method(nnx.merge(graph, state), *arguments)

    traced = jax.jit(call, static_argnums=0)

    def run(module: nnx.Module, *arguments: Any) -> T:
        result: T = traced(*nnx.split(module), *arguments)
        return result

    return run


class Transformer(nnx.Module):
    """A decoder-only language model over a paged cache."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, shards: int = 1) -> None:
        self.cut = Cut(config, shards)
        self.config = config = self.cut.local
        self.embed = Embedding(self.cut, dtype)
        self.layers = nnx.List([Layer(self.cut, kind, dtype) for kind in config.layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = None if config.tie_word_embeddings else Linear(config.vocab_size, config.hidden_size, dtype)

    def __call__(self, tokens: Array, positions: Array, tables: Array, cache: PagedCache) -> tuple[Array, PagedCache]:
        """Runs new tokens of R rows and stores their keys, values and final hidden states.

        Args:
            tokens: [R, T] int32.
            positions: [R, T] int32 position of each token in its row, -1 for padding.
            tables: [R, P] int32 block tables.
            cache: the pages; every earlier token of the rows is in them.

        Returns:
            Final hidden states [R, T, D] and the cache.
        """
        at = addresses(tables, positions)
        ropes = dict.fromkeys(kind.rope for kind in self.config.layers)
        angles = {rope: rotary_angles(positions, self.config.head_dim, rope) for rope in ropes}
        x = self.embed(tokens)
        layers = list(cache.layers)
        run = traced_once(Layer.__call__)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layers[i] = run(layer, x, positions, angles[layer.attention.kind.rope], layers[i], tables, at)
        hidden = self.norm(x, at.live)
        pages = write_hidden(cache.hidden, self.cut.own_hidden(hidden), at)
        return hidden, PagedCache(tuple(layers), pages)

    def logits(self, hidden: Array, live: Array | None = None) -> Array:
        """hidden [M, D] -> [M, V] float32, or a shard's columns of it; `live` as in Linear."""
        with jax.named_scope("head"):
            logits = soft_cap(matmul(hidden, self.head_weight(), live), live, self.config.logit_cap)
            if self.cut.shards == 1:
                return logits
            return jnp.where(self.cut.vocabulary.ids(logits.shape[1]) < self.cut.whole.vocab_size, logits, -jnp.inf)

    def head_weight(self) -> Weight:
        """The head's weight [V, D]: the embeddings where the two are tied."""
        head = self.embed if self.head is None else self.head
        weight: Weight = head.weight.get_value()
        return weight


@dataclass(frozen=True, slots=True)
class BoundModel:
    """A Transformer taken apart: what is traced (definition) and what is passed to every step (leaves)."""

    config: ModelConfig
    dtype: jnp.dtype
    definition: Any  # nnx.GraphDef and the leaves' tree, closed over by the steps
    leaves: tuple[Array, ...]
    mesh: Mesh | None = None  # over which the leaves are cut; the definition is that of one shard

    @property
    def cut(self) -> Cut:
        """How it is cut."""
        return Cut(self.config, self.mesh.size if self.mesh else 1)

    @property
    def platform(self) -> str:
        """What it runs on, as JAX names it: "cpu", "gpu" or "tpu"."""
        return str(self._device.platform)

    @property
    def device_kind(self) -> str:
        """The name of the chips that it runs on."""
        return str(self._device.device_kind)

    @property
    def _device(self) -> jax.Device:
        device: jax.Device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device

    @property
    def cache_layout(self) -> CacheLayout:
        """How its cache lies there."""
        return CacheLayout(self.cut, self.dtype, self.platform)

    def merge(self, leaves: tuple[Array, ...]) -> Transformer:
        """The module around (traced) leaves."""
        graph, tree = self.definition
        model: Transformer = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        return model


def abstract_weights(config: ModelConfig, dtype: jnp.dtype, shards: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Target path -> shape and dtype, in each shard, of every weight, as `model.weights` names them."""
    _, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, dtype, shards)))
    return {_path(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def bind(config: ModelConfig, dtype: jnp.dtype, weights: Mapping[str, Any], mesh: Mesh | None = None) -> BoundModel:
    """Fills an abstract Transformer with `weights` (target path -> array, packed weight or ShapeDtypeStruct).

    With a mesh the arrays lie in it as `model.sharding` says, and the Transformer is that of one shard.

    Raises:
        KeyError: a weight is absent; `model.weights` has reported such a thing before.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, dtype, mesh.size if mesh else 1)))
    flat = [(path, leaf.replace(weights[_path(path)])) for path, leaf in nnx.to_flat_state(state)]
    leaves, tree = jax.tree.flatten(nnx.from_flat_state(flat))
    return BoundModel(config, dtype, (graph, tree), tuple(leaves), mesh)


def _path(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
