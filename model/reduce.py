"""Sums and logarithms whose last bits do not depend on the number of rows.

XLA:CPU uses other code for few rows than for many: it adds in another order (measured: 4 rows differ, 8 and more
agree bit for bit, if they have at least 4,096 numbers together), and takes the logarithm of a scalar by other code than
that of a vector. So few rows are padded to many, and long sums are written as pairwise additions. Every sum over
features or over the vocabulary goes through here; `attention.py` pads its own products and sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from model.sharding import UNSHARDED, VocabAxis

_MIN_ROWS = 16
_MIN_SIZE = 1 << 12
_PARTS = 16
_LANES = 128  # a part's width is a multiple of it


def row_sum(x: Array) -> Array:
    """Sum over the last axis of x [M, N] float32: [M]."""
    missing = max(0, max(_MIN_ROWS, -(-_MIN_SIZE // x.shape[1])) - x.shape[0])
    return jnp.sum(jnp.pad(x, ((0, missing), (0, 0))), axis=-1)[: x.shape[0]]


def parts_of(x: Array) -> list[Array]:
    """x [M, N] split along N into 16 arrays [M, W], padded with -inf at the end.

    XLA:CPU reduces along a row one number after another. Combining the parts element by element becomes one vectorized
    loop over W: 13 times as fast for a count over 152k columns, 9 times for a log-sum-exp.
    """
    width = -(-x.shape[1] // (_PARTS * _LANES)) * _LANES
    padded = jnp.pad(x, ((0, 0), (0, _PARTS * width - x.shape[1])), constant_values=-jnp.inf)
    return jnp.split(padded, _PARTS, axis=1)


def log_sum_exp(x: Array, axis: VocabAxis = UNSHARDED) -> Array:
    """log(sum(exp(x))) over the last axis of x [M, N] float32: [M]. That axis may be sharded.

    The sum is written out: over the parts first, then as a tree of halves, which also rounds less than one long sum.
    """
    best = axis.pmax(jnp.max(x, axis=-1, keepdims=True))
    terms = functools.reduce(jnp.add, (jnp.exp(part - best) for part in parts_of(x)))
    terms = jax.lax.optimization_barrier(terms)  # otherwise XLA recomputes the exponentials for every level of the tree
    width = terms.shape[1]
    terms = jnp.pad(terms, ((0, 0), (0, (1 << (width - 1).bit_length()) - width)))
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    totals = jnp.pad(axis.psum(terms[:, 0]), (0, max(0, _MIN_ROWS - x.shape[0])), constant_values=1.0)
    return best[:, 0] + jnp.log(totals)[: x.shape[0]]
