"""The numbers of tokens: log-prob, unique rank, exact top-k. From logits, or as the head's product gives them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.kernels.cpu.library import NUMBERS_TARGET, SCORE_INT8_TARGET, SCORE_TARGET, require
from model.kernels.cpu.linear import Packed, PackedWeight, arrays_of, check_input


class Numbers(NamedTuple):
    """Of R rows, from the raw distribution; zeros in rows of padding. Ids outside 0 .. V-1 give nothing of meaning."""

    logprob: Array  # [R] float32 of the row's own id
    rank: Array  # [R] int32, 1 + those greater, and those equal with a lower id
    top_ids: Array  # [R, k] int32, best first, equal ones by ascending id
    top_logprobs: Array  # [R, k] float32
    named_logprobs: Array  # [R, B] float32 of the named ids
    named_ranks: Array  # [R, B] int32
    normalizer: Array  # [R] float32, what taken from a logit gives its log-prob


def token_numbers(logits: Array, ids: Array, named_ids: Array, live: Array, *, k: int) -> Numbers:
    """The numbers of one id per row, of the k best and of the ids that a row names, in the order of head.h.

    Args:
        logits: [R, V] float32.
        ids: [R] int32.
        named_ids: [R, B] int32: ids, then the largest int32.
        live: [] int32 rows; those after them are padding.
        k: at most V.

    Raises:
        RuntimeError: `load()` gives None.
    """
    require()
    return Numbers(*_call(NUMBERS_TARGET, named_ids, k)(logits, ids, named_ids, live))


def score(
    hidden: Array, weight: Packed, ids: Array, named_ids: Array, live: Array, *, k: int, cap: float = 0.0
) -> Numbers:
    """`token_numbers` of the logits hidden [R, K] bfloat16 times weight transposed, to the last bit.

    A row of logits never exists as a whole: a thread holds 1,024 columns of them. `cap` bounds them as `soft_cap` does;
    0 leaves them.

    Raises:
        RuntimeError: `load()` gives None.
        TypeError, ValueError: hidden has another dtype or width.
    """
    require()
    check_input(hidden, weight)
    call = _call(SCORE_TARGET if isinstance(weight, PackedWeight) else SCORE_INT8_TARGET, named_ids, k)
    return Numbers(
        *call(hidden, *arrays_of(weight), ids, named_ids, live, vocab=np.int64(weight.n), cap=np.float32(cap))
    )


def _call(target: str, named_ids: Array, k: int) -> Callable[..., Sequence[Array]]:
    R, B = named_ids.shape
    shapes = [((R,), jnp.float32), ((R,), jnp.int32), ((R, k), jnp.int32), ((R, k), jnp.float32)]
    shapes += [((R, B), jnp.float32), ((R, B), jnp.int32), ((R,), jnp.float32)]
    return jax.ffi.ffi_call(target, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
