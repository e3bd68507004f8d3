"""Transformer: embed -> layers -> final hidden states; the head is separate, so that hidden states can be scored later.

Flax NNX only defines the modules. At load the abstract module is split once into a graph definition and flat leaves;
tracing a step merges them again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from model.activations import soft_cap
from model.attention import rotary_angles
from model.config import ModelConfig
from model.kernels.dispatch import Kernels
from model.kv_cache import CacheLayout, PagedCache, addresses_of, write_experts, write_hidden
from model.layers import Layer
from model.linear import Linear, ModelSpec, Weight, matmul, take_rows
from model.norms import norm_of
from model.sharding import TensorParallel


class Embedding(nnx.Module):
    """Token embeddings [V, D]; also the head's weight if the two are tied."""

    def __init__(self, spec: ModelSpec) -> None:
        config = spec.parallel.local
        self.weight = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), spec.dtype))
        self.scale = config.embedding_scale
        self.parallel = spec.parallel

    def __call__(self, tokens: Array) -> Array:
        """tokens [R, T] int32 -> [R, T, D] float32."""
        R, T = tokens.shape
        rows = self._rows(tokens.reshape(R * T)).reshape(R, T, -1)
        return rows if self.scale == 1 else rows * jnp.float32(self.scale)

    def _rows(self, tokens: Array) -> Array:
        """tokens [M] -> [M, D] float32. Each token's row is in one shard."""
        weight = self.weight.get_value()
        if self.parallel.shards == 1:
            return take_rows(weight, tokens).astype(jnp.float32)
        width = self.parallel.local.vocab_size
        index = self.parallel.vocab_axis.local_index(tokens, width)
        rows = take_rows(weight, jnp.minimum(index, width - 1)).astype(jnp.float32)
        return self.parallel.psum(jnp.where((index < width)[:, None], rows, 0.0))


def traced_once[T](method: Callable[..., T]) -> Callable[..., T]:
    """`method` of modules (positional arguments only), traced once for all modules of equal structure.

    Tracing dominates a start with warm caches, and layers are alike. XLA sees calls of one function and inlines them.
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

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.config = config = spec.parallel.local
        self.embed = Embedding(spec)
        self.layers = nnx.List([Layer(spec, kind) for kind in config.layers])
        # Of hidden states that are only multiplied by the head.
        self.norm = norm_of(spec, spec.dtype, scale=config.logit_scale)
        self.head = None if config.tie_word_embeddings else Linear(config.vocab_size, config.hidden_size, spec)

    def __call__(self, tokens: Array, positions: Array, tables: Array, cache: PagedCache) -> tuple[Array, PagedCache]:
        """Run new tokens of R rows and store their keys, values, experts and final hidden states.

        Args:
            tokens: [R, T] int32.
            positions: [R, T] int32 position of each token in its row, -1 for padding.
            tables: [R, P] int32 block tables.
            cache: pages that hold every earlier token of the rows.

        Returns:
            Final hidden states [R, T, D] and the cache.
        """
        addresses = addresses_of(tables, positions)
        ropes = dict.fromkeys(kind.rope for kind in self.config.layers)
        angles = {rope: rotary_angles(positions, self.config.head_dim, rope) for rope in ropes}
        x = self.embed(tokens)
        layers = list(cache.layers)
        experts: list[Array | None] = []  # of each layer
        run = traced_once(Layer.__call__)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layers[i], chosen = run(layer, x, angles[layer.attention.kind.rope], layers[i], addresses)
                experts.append(chosen)
        hidden = self.norm(x, addresses.live)
        pages = write_hidden(cache.hidden, self.spec.parallel.shard_hidden(hidden), addresses)
        return hidden, PagedCache(tuple(layers), pages, write_experts(cache.experts, experts, addresses))

    def logits(self, hidden: Array, live: Array | None = None) -> Array:
        """hidden [M, D] -> logits [M, V] float32, or a shard's columns of them; `live` as in Linear."""
        parallel, kernels = self.spec.parallel, self.spec.kernels
        with jax.named_scope("head"):
            logits = matmul(hidden, self.head_weight(), kernels, live)
            logits = soft_cap(logits, live, self.config.logit_cap, kernels)
            if parallel.shards == 1:
                return logits
            return jnp.where(parallel.vocab_axis.ids(logits.shape[1]) < parallel.config.vocab_size, logits, -jnp.inf)

    def head_weight(self) -> Weight:
        """The head's weight [V, D]: the embeddings if the two are tied."""
        head = self.embed if self.head is None else self.head
        weight: Weight = head.weight.get_value()
        return weight


@dataclass(frozen=True, slots=True)
class BoundModel:
    """A Transformer split into its definition, which is traced, and its leaves, which are passed to every step."""

    config: ModelConfig
    dtype: jnp.dtype  # of matrices and final hidden states
    kv_dtype: jnp.dtype  # of cached keys and values
    kernels: Kernels
    definition: Any  # nnx.GraphDef of one shard and the leaves' tree, closed over by the steps
    leaves: tuple[Array, ...]
    mesh: Mesh | None = None  # None: one device

    @property
    def parallel(self) -> TensorParallel:
        return TensorParallel(self.config, self.mesh.size if self.mesh else 1)

    @property
    def platform(self) -> str:
        """The platform, as JAX names it: "cpu", "gpu" or "tpu"."""
        return str(self._device.platform)

    @property
    def device_kind(self) -> str:
        return str(self._device.device_kind)

    @property
    def _device(self) -> jax.Device:
        device: jax.Device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device

    @property
    def cache_layout(self) -> CacheLayout:
        return CacheLayout(self.parallel, self.kv_dtype, self.dtype, self.platform)

    def merge(self, leaves: tuple[Array, ...]) -> Transformer:
        """The module with (traced) leaves."""
        graph, tree = self.definition
        model: Transformer = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        return model


def abstract_weights(config: ModelConfig, dtype: jnp.dtype, shards: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, as in `ModelConfig.weights`, -> shape and dtype of every weight in each shard."""
    _, state = _abstract(ModelSpec(TensorParallel(config, shards), dtype, Kernels()))
    return {_path(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def bind(
    config: ModelConfig, dtype: jnp.dtype, weights: Mapping[str, Any], kernels: Kernels, mesh: Mesh | None = None
) -> BoundModel:
    """Fill an abstract Transformer with `weights` (path -> array, packed weight or ShapeDtypeStruct).

    Cached keys and values get the matrices' dtype. With a mesh the weights are sharded over it as in `model.sharding`,
    and the Transformer is that of one shard.

    Raises:
        KeyError: a weight is missing, which `model.weights` reports earlier.
    """
    graph, state = _abstract(ModelSpec(TensorParallel(config, mesh.size if mesh else 1), dtype, kernels))
    flat = [(path, leaf.replace(weights[_path(path)])) for path, leaf in nnx.to_flat_state(state)]
    leaves, tree = jax.tree.flatten(nnx.from_flat_state(flat))
    return BoundModel(config, dtype, dtype, kernels, (graph, tree), tuple(leaves), mesh)


def _abstract(spec: ModelSpec) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(spec)))


def _path(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
