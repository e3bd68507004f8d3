"""How one model is cut over the devices of a mesh: tensor parallelism (Shoeybi et al. 2019, "Megatron-LM").

Axes are named by the letters of the weight table; a rule says which of them are cut. Heads, the MLP's features and the
vocabulary are; so q, k, v, gate, up and the head need nothing from other shards, and what follows attention and MLP is
summed over them. A step runs as one program per device (`jax.shard_map`) with the sizes of `Cut.local`.

Any number of shards takes any model: what does not come out even is filled with zeros, which add nothing, and where
there are fewer key/value heads than shards, several shards hold the same one.
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
from model.families import WeightRow

TENSOR = "tensor"  # the mesh axis
# Logical axis -> mesh axis; letters as in ModelConfig.dims(). D of the residual stream and E are in every shard whole.
RULES: dict[str, str | None] = {
    "V": TENSOR,
    "F": TENSOR,
    "FF": TENSOR,
    "Q": TENSOR,
    "KV": TENSOR,
    "QKV": TENSOR,
    "D": None,
    "E": None,
}
_LANES = 128  # a shard's columns of the vocabulary are whole blocks of the top-k, whole words of a mask
_GROUP = 32  # and of the MLP's features: whole groups of int8 weights

type Kept = NDArray[np.int64]  # [shards, n]: what each shard holds of an axis, by index; -1 is a zero


@dataclass(frozen=True, slots=True)
class VocabularyAxis:
    """The axis V of an array in a step: whole, or the part of it that one of several shards holds.

    Its methods are for use inside `jax.shard_map` where there are several. W is the width of a part, V without.
    """

    shards: int = 1

    def first(self, width: int) -> Array | int:
        """The id of the first column."""
        return 0 if self.shards == 1 else jax.lax.axis_index(TENSOR) * width

    def ids(self, width: int) -> Array:
        """The id [W] int32 of each column."""
        ids: Array = self.first(width) + jnp.arange(width, dtype=jnp.int32)
        return ids

    def total(self, x: Array) -> Array:
        """The sum of what each shard has."""
        total: Array = x if self.shards == 1 else jax.lax.psum(x, TENSOR)
        return total

    def largest(self, x: Array) -> Array:
        """The greatest of what each shard has."""
        largest: Array = x if self.shards == 1 else jax.lax.pmax(x, TENSOR)
        return largest

    def each(self, x: Array) -> Array:
        """What every shard has of a small x [...]: [shards, ...]."""
        each: Array = x[None] if self.shards == 1 else jax.lax.all_gather(x, TENSOR)
        return each

    def before(self, x: Array) -> Array:
        """The sum of what the shards before this one have."""
        if self.shards == 1:
            return jnp.zeros_like(x)
        mine = jax.lax.axis_index(TENSOR)
        earlier = jnp.arange(self.shards).reshape(-1, *(1,) * x.ndim) < mine
        return jnp.where(earlier, self.each(x), 0).sum(axis=0, dtype=x.dtype)

    def place(self, ids: Array, width: int) -> Array:
        """The column of each id; W for one that lies in another shard."""
        if self.shards == 1:
            return ids
        local = ids - self.first(width)
        return jnp.where((local >= 0) & (local < width), local, width)

    def take(self, x: Array, ids: Array) -> Array:
        """Entries [R, B] of x [R, W] at ids [R, B]; an id outside the vocabulary means nothing."""
        if self.shards == 1:
            return jnp.take_along_axis(x, ids, axis=-1, mode="clip")
        at = self.place(ids, x.shape[1])
        mine = jnp.take_along_axis(x, at, axis=-1, mode="clip")
        return self.total(jnp.where(at < x.shape[1], mine, jnp.zeros_like(mine)))

    def part_of(self, x: Array, width: int) -> Array:
        """This shard's columns [..., W] of an array [..., V] that every shard has, zeros after its end."""
        if self.shards == 1:
            return x
        padded = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, self.shards * width - x.shape[-1]),))
        part: Array = jax.lax.dynamic_slice_in_dim(padded, self.first(width), width, axis=-1)
        return part


WHOLE = VocabularyAxis()


@dataclass(frozen=True, slots=True)
class Cut:
    """A model cut into shards; one shard is the model as it is."""

    whole: ModelConfig
    shards: int = 1

    @property
    def vocabulary(self) -> VocabularyAxis:
        """The axis of logits."""
        return VocabularyAxis(self.shards)

    @property
    def local(self) -> ModelConfig:
        """The sizes of one shard."""
        if self.shards == 1:
            return self.whole
        queries, keys = self._heads()
        return replace(
            self.whole,
            vocab_size=self._width("V", _LANES),
            intermediate_size=self._width("F", _GROUP),
            num_heads=queries.shape[1],
            num_kv_heads=keys.shape[1],
        )

    @property
    def hidden_size(self) -> int:
        """Features of a cached hidden state that one shard keeps."""
        return -(-self.whole.hidden_size // self.shards)

    def total(self, x: Array) -> Array:
        """The sum of what each shard has."""
        return self.vocabulary.total(x)

    def own_hidden(self, hidden: Array) -> Array:
        """Hidden states [..., D] to the features that this shard keeps."""
        return self.vocabulary.part_of(hidden, self.hidden_size)

    def whole_hidden(self, stored: Array) -> Array:
        """Hidden states [M, D] from what each shard stores of them, which may have zeros behind it."""
        own = stored[:, : self.hidden_size]
        if self.shards == 1:
            return own
        hidden: Array = jax.lax.all_gather(own, TENSOR, axis=1, tiled=True)
        return hidden[:, : self.whole.hidden_size]

    def count(self, letter: str) -> int:
        """Entries of an axis over all shards: the zeros left out, what several hold counted as often."""
        return int((self.kept(letter) >= 0).sum())

    def kept(self, letter: str) -> Kept:
        """What each shard holds of an axis."""
        sizes = self.whole.dims()
        match letter:
            case "V":
                return self._even(sizes["V"], self._width("V", _LANES))
            case "F":
                return self._even(sizes["F"], self._width("F", _GROUP))
            case "Q" | "KV":
                return _elements(self._heads()[letter == "KV"], self.whole.head_dim)
            case "QKV":
                return self.stacked("Q", "KV", "KV")
            case "FF":
                return self.stacked("F", "F")
        return np.broadcast_to(np.arange(sizes[letter]), (self.shards, sizes[letter]))

    def stacked(self, *letters: str) -> Kept:
        """What each shard holds of axes that lie one after another."""
        starts = np.cumsum([0, *(self.whole.dims()[letter] for letter in letters)])
        parts = [self.kept(letter) for letter in letters]
        return np.concatenate(
            [np.where(part < 0, -1, part + start) for part, start in zip(parts, starts, strict=False)], axis=1
        )

    def kept_of(self, row: WeightRow) -> tuple[Kept, ...]:
        """What each shard holds of each axis of a weight."""
        rows = self.stacked(*(piece.shape[0] for piece in row.pieces))
        return (rows, *(self.kept(letter) for letter in row.pieces[0].shape[1:]))

    def _width(self, letter: str, multiple: int) -> int:
        size = self.whole.dims()[letter]
        return size if self.shards == 1 else -(-size // (self.shards * multiple)) * multiple

    def _even(self, size: int, width: int) -> Kept:
        at = np.arange(self.shards * width).reshape(self.shards, width)
        return np.where(at < size, at, -1)

    def _heads(self) -> tuple[Kept, Kept]:
        """Query and key/value heads of each shard. The queries of a key/value head follow one another."""
        heads, G = self.whole.num_kv_heads, self.whole.num_heads // self.whole.num_kv_heads
        if self.shards <= heads:
            keys = self._even(heads, -(-heads // self.shards))
            pieces, piece = 1, np.zeros(self.shards, np.int64)
        else:  # each of them in as many shards as there are for it, which share its queries
            pieces = self.shards // heads
            keys = self._even(heads, 1)[np.minimum(np.arange(self.shards) // pieces, self.shards - 1)]
            piece = np.arange(self.shards) % pieces
        own = -(-G // pieces)
        within = piece[:, None] * own + np.arange(own)  # [shards, G'] of a key/value head's queries
        within = np.where(within < G, within, -1)
        queries = np.where((keys[:, :, None] >= 0) & (within[:, None] >= 0), keys[:, :, None] * G + within[:, None], -1)
        return queries.reshape(self.shards, -1), keys


def _elements(heads: Kept, size: int) -> Kept:
    """The elements of heads of so many."""
    elements = heads[:, :, None] * size + np.arange(size)
    return np.where(heads[:, :, None] < 0, -1, elements).reshape(heads.shape[0], -1)


def spec_of(letters: Sequence[str]) -> PartitionSpec:
    """Where an array's axes lie, by their letters."""
    return PartitionSpec(*(RULES[letter] for letter in letters))


def spec_of_row(row: WeightRow) -> PartitionSpec:
    """Where a weight's axes lie. A packed weight's first two axes are those of the weight."""
    return spec_of(row.pieces[0].shape)


def weight_rows(config: ModelConfig) -> dict[str, WeightRow]:
    """Target path -> its row of the family's table."""
    return {
        row.target.format(i=layer): row
        for row in config.traits.weights
        for layer in (range(config.num_layers) if "{i}" in row.target else (0,))
    }


def tensor_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh over which a model is cut into as many shards as there are devices."""
    return Mesh(np.asarray(devices), (TENSOR,))
