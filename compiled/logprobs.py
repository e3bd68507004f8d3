"""Log-prob, unique rank and exact top-k of rows of logits."""

import jax
import jax.numpy as jnp
from jax import Array

from compiled.state import TokenLogprobs
from model.reduce import log_sum_exp

BLOCK = 128


def token_logprobs(logits: Array, ids: Array, k: int) -> TokenLogprobs:
    """The numbers of one token per row.

    The rank is 1 + #(logit > own) + #(logit == own with a lower id), by comparison over the whole vocabulary: it is
    the token's position in a stable descending sort, for every k.

    Args:
        logits: [R, V] float32.
        ids: [R] int32, the token of each row.
        k: number of alternatives.
    """
    with jax.named_scope("logprobs"):
        logits = jnp.where(logits == 0, 0.0, logits)  # -0 and +0 are one value for the rank and two for a sort
        normalizer = log_sum_exp(logits)[:, None]
        own = jnp.take_along_axis(logits, ids[:, None], axis=-1)
        with jax.named_scope("rank"):
            lower = jnp.arange(logits.shape[-1], dtype=jnp.int32) < ids[:, None]
            ahead = (logits > own) | ((logits == own) & lower)
            rank = 1 + jnp.sum(ahead, axis=-1, dtype=jnp.int32)
        values, top_ids = blocked_top_k(logits, k)
        return TokenLogprobs((own - normalizer)[:, 0], rank, top_ids, values - normalizer)


def blocks_of(x: Array) -> Array:
    """x [R, V] as [R, ceil(V / 128), 128], padded with -inf."""
    R, V = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(R, -1, BLOCK)


def blocked_top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Exact stable top-k of x [R, V]: values and ids [R, k], best first, equal values by ascending id.

    The k best values lie in the k blocks with the best maxima (equal maxima: the blocks first in order), and among
    equal values those blocks hold the lowest ids. A plain `lax.top_k` beside other uses of the same logits becomes a
    full sort on CPU. x must hold no NaN and no -0.
    """
    blocks = blocks_of(x)
    count = min(k, blocks.shape[1])
    _, chosen = jax.lax.top_k(blocks.max(axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # ascending, so that candidates stay in the order of their ids
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(x.shape[0], count * BLOCK)
    values, at = jax.lax.top_k(candidates, k)
    ids = jnp.take_along_axis(chosen, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return values, ids.astype(jnp.int32)
