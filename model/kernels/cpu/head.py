"""Log-prob, unique rank and exact top-k of tokens, from logits or straight from the head's product."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.kernels.cpu.library import Target
from model.kernels.cpu.linear import Packed, PackedWeight, check_input
from model.token_logprobs import TokenLogprobs

jax.tree_util.register_dataclass(TokenLogprobs)


def token_logprobs(logits: Array, ids: Array, requested_ids: Array, live: Array, *, k: int) -> TokenLogprobs:
    """Log-probs and ranks of one id per row, of the k best and of the row's requested ids, in the order of head.h.

    Padding rows give zeros. Ids outside 0 .. V-1 give undefined values.

    Args:
        logits: [R, V] float32.
        ids: [R] int32.
        requested_ids: [R, B] int32, padded with NO_ID.
        live: [] int32, number of rows before the padding.
        k: at most V.
    """
    return TokenLogprobs(*_call(Target.LOGPROBS, requested_ids, k)(logits, ids, requested_ids, live)[:-1])


def normalizer(logits: Array, live: Array) -> Array:
    """log(sum(exp(logits))) [R] float32 of each row of logits [R, V]: the one that `token_logprobs` subtracts."""
    R = logits.shape[0]
    ids, requested_ids = jnp.zeros((R,), jnp.int32), jnp.zeros((R, 0), jnp.int32)
    return _call(Target.LOGPROBS, requested_ids, 0)(logits, ids, requested_ids, live)[-1]


def score(
    hidden: Array, weight: Packed, ids: Array, requested_ids: Array, live: Array, *, k: int, cap: float = 0.0
) -> TokenLogprobs:
    """`token_logprobs` of the logits hidden [R, K] bfloat16 times weight transposed, to the last bit.

    No full row of logits is stored: a thread holds 1,024 columns at a time. A positive `cap` bounds the logits as
    `soft_cap` does.

    Raises:
        TypeError, ValueError: hidden has another dtype or width.
    """
    check_input(hidden, weight)
    call = _call(Target.SCORE if isinstance(weight, PackedWeight) else Target.SCORE_INT8, requested_ids, k)
    attributes = {"vocab": np.int64(weight.n), "cap": np.float32(cap)}
    return TokenLogprobs(*call(hidden, *jax.tree.leaves(weight), ids, requested_ids, live, **attributes)[:-1])


def _call(target: str, requested_ids: Array, k: int) -> Callable[..., Sequence[Array]]:
    """A foreign call that returns the fields of TokenLogprobs in order, then the normalizer."""
    R, B = requested_ids.shape
    shapes = [((R,), jnp.float32), ((R,), jnp.int32), ((R, k), jnp.int32), ((R, k), jnp.float32)]
    shapes += [((R, B), jnp.float32), ((R, B), jnp.int32), ((R,), jnp.float32)]
    return jax.ffi.ffi_call(target, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
