"""Calls of the kernels.

A token has the same bits in every batch and chunk. Rows from `live` ([] int32) on are padding and give zeros.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from model.config import Experts
from model.kernels import ScoreOptions
from model.kernels.cpu.library import Target
from model.packed import PackedWeight
from model.token_logprobs import TokenLogprobs

jax.tree_util.register_dataclass(TokenLogprobs)  # its own module imports no jax


def linear(x: Array, weight: PackedWeight, live: Array | None = None) -> Array:
    """y [M, n] float32 = x [M, k] times the weight transposed, summed as stated in tiles.h and integers.h.

    x is float32, or bfloat16 if the weight is, too. A row of y has the same bits for every M. Rows from `live`
    ([] int32, None = M) on are padding: they are not computed, and y is zero there.

    Raises:
        TypeError, ValueError: x has another dtype or width.
    """
    _check_input(x, weight)
    live = jnp.int32(x.shape[0]) if live is None else live
    call = jax.ffi.ffi_call(Target.LINEAR, jax.ShapeDtypeStruct((x.shape[0], weight.n), jnp.float32))
    return call(x, weight.words, weight.scales, live, format=weight.format.name)


def expert_linear(x: Array, weight: PackedWeight, starts: Array) -> Array:
    """y [M, N] = x [M, K] times the weights of experts, [X * N, K], transposed: `linear` with rows of the same bits.

    Rows starts[e] to starts[e + 1] - 1 of x, with starts [X + 1] int32, are multiplied by rows e N to (e + 1) N - 1 of
    the weight, and a weight without rows is not read. Rows from starts[X] on are zero. N is a multiple of 32.

    Raises:
        TypeError, ValueError: x has another dtype or width.
    """
    _check_input(x, weight)
    shape = (x.shape[0], weight.n // (starts.shape[0] - 1))
    call = jax.ffi.ffi_call(Target.EXPERTS, jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(x, weight.words, weight.scales, starts, format=weight.format.name)


def route(logits: Array, bias: Array, live: Array, *, experts: Experts) -> tuple[Array, Array, Array, Array, Array]:
    """The fields of `model.experts.Routes` in order, for logits [M, X] float32 and bias [X] float32 of the choice.

    A softmax reads no bias.
    """
    (M, X), k = logits.shape, experts.per_token
    shapes = [((M, k), jnp.float32), *(((M, k), jnp.int32),), *(((M * k,), jnp.int32),) * 2, ((X + 1,), jnp.int32)]
    call = jax.ffi.ffi_call(Target.ROUTE, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
    attributes = {
        "normalized": experts.normalized,
        "sigmoid": experts.scoring == "sigmoid",
        "groups": np.int64(experts.groups),
        "open": np.int64(experts.open_groups),
        "scale": np.float32(experts.scale),
    }
    weights, ids, order, places, starts = call(logits, bias, live, **attributes)
    return weights, ids, order, places, starts


def combine(y: Array, places: Array, weights: Array, live: Array) -> Array:
    """Rows y[places] of each token [M k, N], times weights [M, k], added in order: [M, N]."""
    call = jax.ffi.ffi_call(Target.COMBINE, jax.ShapeDtypeStruct((weights.shape[0], y.shape[1]), jnp.float32))
    return call(y, places, weights, live)


def _check_input(x: Array, weight: PackedWeight) -> None:
    """Raise TypeError or ValueError unless x [M, k] suits the weight."""
    if x.dtype != jnp.float32 and not (x.dtype == jnp.bfloat16 and weight.format.name == "BF16"):
        raise TypeError(f"x is {x.dtype}, the weight {weight.format.name}")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {x.shape}, not [M, {weight.k}]")


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    tables: Array,
    positions: Array,
    sinks: Array | None = None,
    *,
    options: ScoreOptions,
) -> Array:
    """`model.attention.attend` with pages keys, values [N, K, 64, E] bfloat16 or float32; see attention.h."""
    R, T, H, E = queries.shape
    call = jax.ffi.ffi_call(Target.ATTENTION, jax.ShapeDtypeStruct((R, T, H * E), jnp.float32))
    attributes = {"window": np.int64(options.window), "scale": np.float32(options.scale)}
    sinks = jnp.zeros((0,), jnp.float32) if sinks is None else sinks
    return call(queries, keys, values, tables, positions, sinks, cap=np.float32(options.cap), **attributes)


def rms_norm(x: Array, weight: Array, live: Array, *, epsilon: float, dtype: DTypeLike) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * weight: x [M, D] and weight [D] float32 -> [M, D], rounded to dtype."""
    call = jax.ffi.ffi_call(Target.NORM, jax.ShapeDtypeStruct(x.shape, dtype))
    return call(x, weight, live, epsilon=np.float32(epsilon))


def swiglu(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """silu(gate) * up: gate_up [M, 2 F] float32, gate first -> [M, F], rounded to dtype."""
    return _gated(Target.SWIGLU, gate_up, live, dtype)


def geglu(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """gelu(gate) * up, gelu by its tanh approximation; as `swiglu`."""
    return _gated(Target.GEGLU, gate_up, live, dtype)


def clamped_swiglu(gate_up: Array, live: Array, *, dtype: DTypeLike) -> Array:
    """gate * sigmoid(1.702 gate) * (up + 1) of clamped gate and up; as `swiglu`."""
    return _gated(Target.CLAMPED_SWIGLU, gate_up, live, dtype)


def soft_cap(x: Array, live: Array, *, cap: float) -> Array:
    """cap * tanh(x / cap): x [M, N] float32 -> [M, N]."""
    return jax.ffi.ffi_call(Target.SOFT_CAP, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, live, cap=np.float32(cap))


def _gated(target: str, gate_up: Array, live: Array, dtype: DTypeLike) -> Array:
    M, width = gate_up.shape
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((M, width // 2), dtype))(gate_up, live)


def rotate_and_store(
    heads: Array, cos: Array, sin: Array, keys: Array, values: Array, tables: Array, positions: Array
) -> tuple[Array, Array, Array]:
    """`model.attention.rotate_and_store` with pages keys, values [N, K, 64, E], in place if they are donated.

    Padding is not stored and its queries are zeros. Returns queries [R, T, H, E] float32, and the pages.
    """
    R, T, all_heads, E = heads.shape
    results = (jax.ShapeDtypeStruct((R, T, all_heads - 2 * keys.shape[1], E), jnp.float32), keys, values)
    shapes = tuple(jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results)
    call = jax.ffi.ffi_call(Target.ROTATE, shapes, input_output_aliases={3: 1, 4: 2})
    queries, keys, values = call(heads, cos, sin, keys, values, tables, positions)
    return queries, keys, values


def token_logprobs(logits: Array, ids: Array, requested_ids: Array, live: Array, *, k: int) -> TokenLogprobs:
    """Log-probs and ranks of one id per row, of the k best and of the row's requested ids, in the order of head.h.

    logits [R, V] float32, ids [R] int32, requested_ids [R, B] int32 padded with NO_ID. Ids outside 0 .. V-1 give
    undefined values.
    """
    return TokenLogprobs(*_call(Target.LOGPROBS, requested_ids, k)(logits, ids, requested_ids, live)[:-1])


def normalizer(logits: Array, live: Array) -> Array:
    """log(sum(exp(logits))) [R] float32 of each row of logits [R, V]: the one that `token_logprobs` subtracts."""
    R = logits.shape[0]
    ids, requested_ids = jnp.zeros((R,), jnp.int32), jnp.zeros((R, 0), jnp.int32)
    return _call(Target.LOGPROBS, requested_ids, 0)(logits, ids, requested_ids, live)[-1]


def score(
    hidden: Array, weight: PackedWeight, ids: Array, requested_ids: Array, live: Array, *, k: int, cap: float = 0.0
) -> TokenLogprobs:
    """`token_logprobs` of the logits `linear(hidden, weight)` of hidden [R, K], to the last bit.

    No full row of logits is stored: a thread holds 1,024 columns at a time. A positive `cap` bounds the logits as
    `soft_cap` does.

    Raises:
        TypeError, ValueError: hidden has another dtype or width.
    """
    _check_input(hidden, weight)
    call = _call(Target.SCORE, requested_ids, k)
    attributes = {"vocab": np.int64(weight.n), "cap": np.float32(cap), "format": weight.format.name}
    return TokenLogprobs(*call(hidden, weight.words, weight.scales, ids, requested_ids, live, **attributes)[:-1])


def _call(target: str, requested_ids: Array, k: int) -> Callable[..., Sequence[Array]]:
    """A foreign call that returns the fields of TokenLogprobs in order, then the normalizer."""
    R, B = requested_ids.shape
    shapes = [((R,), jnp.float32), ((R,), jnp.int32), ((R, k), jnp.int32), ((R, k), jnp.float32)]
    shapes += [((R, B), jnp.float32), ((R, B), jnp.int32), ((R,), jnp.float32)]
    return jax.ffi.ffi_call(target, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
