"""Calls of the kernels, and the packed weights that they read: in their order, bfloat16 or int8 with scales.

A token has the same bits in every batch and chunk. Rows from `live` ([] int32) on are padding and give zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from model.kernels import ScoreOptions
from model.kernels.cpu.library import Target
from model.layout import COLUMN_BLOCK, GROUP_SIZE
from model.token_logprobs import TokenLogprobs
from model.weights.rows import Int8Array, aligned_empty

jax.tree_util.register_dataclass(TokenLogprobs)  # its own module imports no jax

_BF16 = np.dtype(ml_dtypes.bfloat16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] packed as `data` [ceil(n/32), ceil(k/2), 32, 2] bfloat16, padded with zeros.

    Element [i, j] is data[i // 32, j // 2, i % 32, j % 2].
    """

    data: Array
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedInt8:
    """A weight [n, k] as int8 with a float16 scale for each 32 of a row: the values of GGUF's Q8_0.

    `data` [ceil(n/32), ceil(k/32) * 32, 32] int8 and `scales` [ceil(n/32), ceil(k/32), 32] float16, padded with zeros:
    element [i, j] is data[i // 32, j, i % 32] * scales[i // 32, j // 32, i % 32].
    """

    data: Array
    scales: Array
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})


type Packed = PackedWeight | PackedInt8


def pack(shape: tuple[int, ...], runs: Iterable[NDArray[Any]]) -> PackedWeight:
    """Pack a weight [n, k] that comes in runs of rows, rounded to bfloat16 if it is wider."""
    n, k = shape
    # A pair moves as one 32-bit word.
    words, block = aligned_empty((-(-n // COLUMN_BLOCK), (k + 1) // 2, COLUMN_BLOCK), np.uint32), 0
    for rows in _column_blocks(runs):
        pairs = np.ascontiguousarray(_padded(rows.astype(_BF16, copy=False), 0, k % 2)).view(np.uint32)
        blocks = pairs.reshape(-1, COLUMN_BLOCK, words.shape[1])
        words[block : block + len(blocks)] = blocks.transpose(0, 2, 1)
        block += len(blocks)
    return PackedWeight(jax.device_put(words.view(_BF16).reshape(*words.shape, 2)), n, k)


def pack_int8(shape: tuple[int, ...], runs: Iterable[Int8Array]) -> PackedInt8:
    """Pack a weight [n, k] that comes in runs of rows; only the order of its values changes."""
    n, k = shape
    groups = -(-k // GROUP_SIZE)
    data = aligned_empty((-(-n // COLUMN_BLOCK), groups * GROUP_SIZE, COLUMN_BLOCK), np.int8)
    scales, block = aligned_empty((data.shape[0], groups, COLUMN_BLOCK), np.float16), 0
    for joined in _column_blocks(run.joined() for run in runs):
        rows = Int8Array.split(joined, k)
        padded = _padded(rows.values, 0, -k % GROUP_SIZE).reshape(-1, COLUMN_BLOCK, groups * GROUP_SIZE)
        data[block : block + len(padded)] = padded.transpose(0, 2, 1)
        scales[block : block + len(padded)] = rows.scales.reshape(-1, COLUMN_BLOCK, groups).transpose(0, 2, 1)
        block += len(padded)
    return PackedInt8(jax.device_put(data), jax.device_put(scales), n, k)


def _column_blocks(runs: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The rows in runs of full column blocks; the last block is padded with zeros."""
    remainder: NDArray[Any] | None = None
    for run in runs:
        rows = run if remainder is None else np.concatenate([remainder, run])
        full = len(rows) // COLUMN_BLOCK * COLUMN_BLOCK
        if full:
            yield rows[:full]
        remainder = rows[full:] if full < len(rows) else None
    if remainder is not None:
        yield _padded(remainder, -len(remainder) % COLUMN_BLOCK, 0)


def _padded(array: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    return np.pad(array, ((0, rows), (0, columns))) if rows or columns else array


def unpack_rows(weight: Packed, rows: Array) -> Array:
    """Rows `rows` [M] int32 (each in 0 .. n-1) of the weight, exact: [M, k], bfloat16, or float32 of an int8 weight."""
    block, column = rows // COLUMN_BLOCK, rows % COLUMN_BLOCK
    if isinstance(weight, PackedWeight):
        return weight.data[block, :, column].reshape(rows.shape[0], -1)[:, : weight.k]
    values = weight.data[block, :, column].astype(jnp.float32)  # [M, k padded]
    scales = weight.scales[block, :, column].astype(jnp.float32)
    scaled = values.reshape(rows.shape[0], -1, GROUP_SIZE) * scales[:, :, None]
    return scaled.reshape(rows.shape[0], -1)[:, : weight.k]


def unpack(weight: Packed) -> Array:
    """The full weight [n, k], of the dtype of `unpack_rows`."""
    blocks = weight.data.shape[0]
    if isinstance(weight, PackedWeight):
        rows = weight.data.transpose(0, 2, 1, 3)  # [B, 32, k/2, 2]
    else:
        values = weight.data.astype(jnp.float32).reshape(blocks, -1, GROUP_SIZE, COLUMN_BLOCK)
        rows = (values * weight.scales.astype(jnp.float32)[:, :, None]).transpose(0, 3, 1, 2)  # [B, 32, groups, 32]
    return rows.reshape(blocks * COLUMN_BLOCK, -1)[: weight.n, : weight.k]


def linear(x: Array, weight: Packed, live: Array | None = None, *, dtype: DTypeLike = jnp.float32) -> Array:
    """y [M, n] = x [M, k] bfloat16 times the weight transposed, summed in float32 in the order stated in tiles.h.

    A row of y has the same bits for every M. Rows from `live` ([] int32, None = M) on are padding: they are not
    computed, and y is zero there. A bfloat16 y is the float32 result rounded to nearest even.

    Raises:
        TypeError, ValueError: x has another dtype or width.
    """
    _check_input(x, weight)
    live = jnp.int32(x.shape[0]) if live is None else live
    target = Target.LINEAR if isinstance(weight, PackedWeight) else Target.LINEAR_INT8
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], weight.n), dtype))
    return call(x, *jax.tree.leaves(weight), live)


def _check_input(x: Array, weight: Packed) -> None:
    """Raise TypeError or ValueError unless x is [M, k] bfloat16."""
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"x is {x.dtype}, not bfloat16")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x has shape {x.shape}, not [M, {weight.k}]")


def attend(
    queries: Array, keys: Array, values: Array, tables: Array, positions: Array, *, options: ScoreOptions
) -> Array:
    """`model.attention.attend` with pages keys, values [N, K, 64, E] bfloat16 or float32; see attention.h."""
    R, T, H, E = queries.shape
    call = jax.ffi.ffi_call(Target.ATTENTION, jax.ShapeDtypeStruct((R, T, H * E), jnp.float32))
    attributes = {"window": np.int64(options.window), "scale": np.float32(options.scale)}
    return call(queries, keys, values, tables, positions, cap=np.float32(options.cap), **attributes)


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
    hidden: Array, weight: Packed, ids: Array, requested_ids: Array, live: Array, *, k: int, cap: float = 0.0
) -> TokenLogprobs:
    """`token_logprobs` of the logits hidden [R, K] bfloat16 times weight transposed, to the last bit.

    No full row of logits is stored: a thread holds 1,024 columns at a time. A positive `cap` bounds the logits as
    `soft_cap` does.

    Raises:
        TypeError, ValueError: hidden has another dtype or width.
    """
    _check_input(hidden, weight)
    call = _call(Target.SCORE if isinstance(weight, PackedWeight) else Target.SCORE_INT8, requested_ids, k)
    attributes = {"vocab": np.int64(weight.n), "cap": np.float32(cap)}
    return TokenLogprobs(*call(hidden, *jax.tree.leaves(weight), ids, requested_ids, live, **attributes)[:-1])


def _call(target: str, requested_ids: Array, k: int) -> Callable[..., Sequence[Array]]:
    """A foreign call that returns the fields of TokenLogprobs in order, then the normalizer."""
    R, B = requested_ids.shape
    shapes = [((R,), jnp.float32), ((R,), jnp.int32), ((R, k), jnp.int32), ((R, k), jnp.float32)]
    shapes += [((R, B), jnp.float32), ((R, B), jnp.int32), ((R,), jnp.float32)]
    return jax.ffi.ffi_call(target, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
