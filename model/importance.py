"""Importance of a linear map's inputs: the mean of their squares over texts, for the rounding of its weight."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from model.attention import rotary_angles
from model.kv_cache import PAGE_SIZE, addresses_of
from model.layers import Layer
from model.linear import Linear
from model.transformer import BoundModel

CHUNK = 512  # tokens that are run at once, without those before them; a multiple of the page size

type Importance = dict[str, NDArray[np.float32]]  # path of a weight [N, K] -> [K]


def input_importance(
    model: BoundModel, texts: Sequence[Sequence[int]], on_chunk: Callable[[], None] = lambda: None
) -> Importance:
    """Mean squares of the inputs of every linear map, head included, over the token ids of texts, at least one token.

    The head's are under the path of its weight, which is the embedding if the two are tied.
    """
    squares = jax.jit(partial(_squares, model))
    sums: dict[str, NDArray[np.float64]] = {}
    for token_ids in chunks_of(texts):
        tokens, positions = np.zeros((1, CHUNK), np.int32), np.full((1, CHUNK), -1, np.int32)
        tokens[0, : len(token_ids)], positions[0, : len(token_ids)] = token_ids, np.arange(len(token_ids))
        for path, values in squares(model.leaves, tokens, positions).items():
            sums[path] = sums.get(path, np.float64(0)) + np.asarray(values, np.float64)
        on_chunk()
    count = sum(map(len, texts))
    return {path: (values / count).astype(np.float32) for path, values in sums.items()}


def chunks_of(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    for token_ids in texts:
        for start in range(0, len(token_ids), CHUNK):
            yield token_ids[start : start + CHUNK]


def _squares(model: BoundModel, leaves: tuple[Array, ...], tokens: Array, positions: Array) -> dict[str, Array]:
    """Sums of squares [K] over tokens [1, T], by the path of the weight. Position -1 is padding."""
    module = model.merge(leaves)
    pages = CHUNK // PAGE_SIZE
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.cache_layout.shape(1 + pages))
    addresses = addresses_of(jnp.arange(1, 1 + pages, dtype=jnp.int32)[None], positions)
    sums: dict[str, Array] = {}

    def record(path: str, x: Array) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        sums[path] = (jnp.where(positions.reshape(-1, 1) >= 0, rows, 0.0) ** 2).sum(axis=0)

    def recorded(path: str, linear: Linear) -> Callable[..., Array]:
        def call(x: Array, live: Array | None = None) -> Array:
            record(path, x)
            return linear(x, live)

        return call

    def watch(prefix: str, layer: Layer) -> None:
        for owner, name in (
            (layer.attention, "qkv"),
            (layer.attention, "out"),
            (layer.mlp, "gate_up"),
            (layer.mlp, "down"),
        ):
            kind = "attention" if owner is layer.attention else "mlp"
            setattr(owner, name, recorded(f"{prefix}.{kind}.{name}.weight", getattr(owner, name)))

    x = module.embed(tokens)
    for i, (layer, layer_pages) in enumerate(zip(module.layers, cache.layers, strict=True)):
        watch(f"layers.{i}", layer)
        angles = rotary_angles(positions, model.config.head_dim, layer.attention.kind.rope)
        x, _, _ = layer(x, angles, layer_pages, addresses)
    hidden = module.norm(x, addresses.live)
    record("embed.weight" if module.head is None else "head.weight", hidden)
    return sums
