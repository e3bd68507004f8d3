"""Tensor parallelism: how one model is sharded over the devices of a mesh (Shoeybi et al. 2019, "Megatron-LM").

Axes are named by the letters of the weight table, and a rule says which of them are sharded: heads, the MLP's features
and the vocabulary. So q, k, v, gate, up and the head need nothing from other shards, and the outputs of attention and
MLP are summed over them. A step runs as one program per device (`jax.shard_map`) with the sizes of
`TensorParallel.local`.

Any number of shards takes any model: uneven axes are padded with zeros, which add nothing, and if there are fewer
key/value heads than shards, several shards hold the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

from model.config import ModelConfig
from model.weight_specs import WeightSpec

TENSOR = "tensor"  # the mesh axis
# The sharded axes, by letters of ModelConfig.dims(); D of the residual stream and E are replicated.
_SHARDED = {"V", "F", "FF", "XF", "H", "Q", "KV", "QKV"}
_LANES = 128  # a shard's vocabulary is a multiple of it: full blocks of the top-k, full words of a mask

type ShardIndices = NDArray[np.int64]  # [shards, n]: the indices of an axis that each shard holds; -1 is padding


@dataclass(frozen=True, slots=True)
class VocabAxis:
    """The axis V of an array in a step: all of it, or the part that one of several shards holds.

    With several shards its methods are for use inside `jax.shard_map`. W is the width of a part, V without shards.
    """

    shards: int = 1

    def offset(self, width: int) -> Array | int:
        """Id of the shard's first column."""
        return 0 if self.shards == 1 else jax.lax.axis_index(TENSOR) * width

    def ids(self, width: int) -> Array:
        """Id [W] int32 of each column."""
        ids: Array = self.offset(width) + jnp.arange(width, dtype=jnp.int32)
        return ids

    def psum(self, x: Array) -> Array:
        total: Array = x if self.shards == 1 else jax.lax.psum(x, TENSOR)
        return total

    def pmax(self, x: Array) -> Array:
        largest: Array = x if self.shards == 1 else jax.lax.pmax(x, TENSOR)
        return largest

    def all_gather(self, x: Array) -> Array:
        """The x [...] of every shard: [shards, ...]."""
        gathered: Array = x[None] if self.shards == 1 else jax.lax.all_gather(x, TENSOR)
        return gathered

    def exclusive_psum(self, x: Array) -> Array:
        """Sum over the shards before this one."""
        if self.shards == 1:
            return jnp.zeros_like(x)
        index = jax.lax.axis_index(TENSOR)
        earlier = jnp.arange(self.shards).reshape(-1, *(1,) * x.ndim) < index
        return jnp.where(earlier, self.all_gather(x), 0).sum(axis=0, dtype=x.dtype)

    def local_index(self, ids: Array, width: int) -> Array:
        """The shard's column of each id; W for an id in another shard."""
        if self.shards == 1:
            return ids
        index = ids - self.offset(width)
        return jnp.where((index >= 0) & (index < width), index, width)

    def take(self, x: Array, ids: Array) -> Array:
        """Entries [R, B] of x [R, W] at ids [R, B]; undefined for an id outside the vocabulary."""
        if self.shards == 1:
            return jnp.take_along_axis(x, ids, axis=-1, mode="clip")
        index = self.local_index(ids, x.shape[1])
        entries = jnp.take_along_axis(x, index, axis=-1, mode="clip")
        return self.psum(jnp.where(index < x.shape[1], entries, jnp.zeros_like(entries)))

    def shard(self, x: Array, width: int) -> Array:
        """This shard's columns [..., W] of a replicated array [..., V], zeros after its end."""
        if self.shards == 1:
            return x
        padded = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, self.shards * width - x.shape[-1]),))
        part: Array = jax.lax.dynamic_slice_in_dim(padded, self.offset(width), width, axis=-1)
        return part


UNSHARDED = VocabAxis()


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """How a model is split into shards; one shard is the full model."""

    config: ModelConfig
    shards: int = 1

    @property
    def vocab_axis(self) -> VocabAxis:
        return VocabAxis(self.shards)

    @property
    def local(self) -> ModelConfig:
        if self.shards == 1:
            return self.config
        queries, keys = self._heads()
        experts = self.config.experts
        return replace(
            self.config,
            experts=experts and replace(experts, size=self._width("XF", self.config.shard_features)),
            vocab_size=self._width("V", _LANES),
            intermediate_size=self._width("F", self.config.shard_features),
            num_heads=queries.shape[1],
            num_kv_heads=keys.shape[1],
        )

    @property
    def hidden_size(self) -> int:
        """Features of a cached hidden state that one shard stores."""
        return -(-self.config.hidden_size // self.shards)

    def psum(self, x: Array) -> Array:
        return self.vocab_axis.psum(x)

    def once(self, x: Array) -> Array:
        """x in the first shard, zeros in the others: what is added to a part of a sum over shards."""
        return x if self.shards == 1 else jnp.where(jax.lax.axis_index(TENSOR) == 0, x, jnp.zeros_like(x))

    def shard_hidden(self, hidden: Array) -> Array:
        """The features of hidden states [..., D] that this shard stores."""
        return self.vocab_axis.shard(hidden, self.hidden_size)

    def gather_hidden(self, stored: Array) -> Array:
        """Hidden states [M, D] from what each shard stores of them, which may end in zeros."""
        local = stored[:, : self.hidden_size]
        if self.shards == 1:
            return local
        hidden: Array = jax.lax.all_gather(local, TENSOR, axis=1, tiled=True)
        return hidden[:, : self.config.hidden_size]

    def count(self, letter: str) -> int:
        """Entries of an axis over all shards: replicated entries count for each shard, padding does not."""
        return int((self.indices(letter) >= 0).sum())

    def indices(self, letter: str) -> ShardIndices:
        """Indices of an axis that each shard holds."""
        sizes = self.config.dims()
        match letter:
            case "V":
                return self._even(sizes["V"], self._width("V", _LANES))
            case "F" | "XF":
                return self._even(sizes[letter], self._width(letter, self.config.shard_features))
            case "H":
                return self._heads()[0]
            case "Q" | "KV":
                return _elements(self._heads()[letter == "KV"], self.config.head_dim)
            case "QKV":
                return self.stacked_indices("Q", "KV", "KV")
            case "FF":
                return self.stacked_indices("F", "F")
        return np.broadcast_to(np.arange(sizes[letter]), (self.shards, sizes[letter]))

    def stacked_indices(self, *letters: str) -> ShardIndices:
        """Indices that each shard holds of several axes in a row."""
        starts = np.cumsum([0, *(self.config.dims()[letter] for letter in letters)])
        parts = [self.indices(letter) for letter in letters]
        return np.concatenate(
            [np.where(part < 0, -1, part + start) for part, start in zip(parts, starts, strict=False)], axis=1
        )

    def weight_indices(self, weight: WeightSpec) -> tuple[ShardIndices, ...]:
        """Indices that each shard holds of each axis of a weight."""
        rows = self.stacked_indices(*(tensor.shape[0] for tensor in weight.tensors))
        return (rows, *(self.indices(letter) for letter in weight.tensors[0].shape[1:]))

    def _width(self, letter: str, multiple: int) -> int:
        size = self.config.dims()[letter]
        return size if self.shards == 1 else -(-size // (self.shards * multiple)) * multiple

    def _even(self, size: int, width: int) -> ShardIndices:
        indices = np.arange(self.shards * width).reshape(self.shards, width)
        return np.where(indices < size, indices, -1)

    def _heads(self) -> tuple[ShardIndices, ShardIndices]:
        """Query and key/value heads of each shard. The queries of a key/value head are consecutive."""
        heads, G = self.config.num_kv_heads, self.config.num_heads // self.config.num_kv_heads
        if self.shards <= heads:
            keys = self._even(heads, -(-heads // self.shards))
            replicas, replica = 1, np.zeros(self.shards, np.int64)
        else:  # each head is in as many shards as there are for it, which share its queries
            replicas = self.shards // heads
            keys = self._even(heads, 1)[np.minimum(np.arange(self.shards) // replicas, self.shards - 1)]
            replica = np.arange(self.shards) % replicas
        count = -(-G // replicas)
        group = replica[:, None, None] * count + np.arange(count)  # [shards, 1, G'] of a key/value head's queries
        heads_of_keys = keys[:, :, None]
        queries = np.where((heads_of_keys >= 0) & (group < G), heads_of_keys * G + group, -1)
        return queries.reshape(self.shards, -1), keys


def _elements(heads: ShardIndices, size: int) -> ShardIndices:
    """Indices of the elements of heads of `size` elements."""
    elements = heads[:, :, None] * size + np.arange(size)
    return np.where(heads[:, :, None] < 0, -1, elements).reshape(heads.shape[0], -1)


def partition_spec(weight: WeightSpec) -> PartitionSpec:
    """How a weight is sharded. A packed weight's first two axes are those of the weight."""
    return PartitionSpec(*(TENSOR if letter in _SHARDED else None for letter in weight.tensors[0].shape))


def tensor_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh that shards a model over all `devices`."""
    return Mesh(np.asarray(devices), (TENSOR,))
