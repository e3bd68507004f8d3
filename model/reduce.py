"""Sums and logarithms whose last bits do not depend on how many rows are computed beside them.

XLA:CPU takes other routes for few rows than for many: it adds in another order (measured: 4 rows differ, 8 and more
agree bit for bit) and takes the logarithm of a scalar by other code than that of a vector. So few rows are padded to
many, and long sums are spelled out as additions of halves. Every sum over features or over the vocabulary goes through
here; `attention.py` pads its own products and sums.
"""

import jax.numpy as jnp
from jax import Array

_MIN_ROWS = 16


def row_sum(x: Array) -> Array:
    """Sum over the last axis of x [M, N] float32: [M]."""
    missing = max(0, _MIN_ROWS - x.shape[0])
    return jnp.sum(jnp.pad(x, ((0, missing), (0, 0))), axis=-1)[: x.shape[0]]


def log_sum_exp(x: Array) -> Array:
    """log(sum(exp(x))) over the last axis of x [M, N] float32: [M].

    The sum is a tree of halves, which also loses less to rounding than one long sum.
    """
    M, N = x.shape
    best = jnp.max(x, axis=-1, keepdims=True)
    size = 1 << (N - 1).bit_length()
    terms = jnp.pad(jnp.exp(x - best), ((0, 0), (0, size - N)))
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    totals = jnp.pad(terms[:, 0], (0, max(0, _MIN_ROWS - M)), constant_values=1.0)
    return best[:, 0] + jnp.log(totals)[:M]
