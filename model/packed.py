"""Packed weights: matrices in a block format, in the kernels' order, and their exact values in XLA."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from model.formats import BlockFormat
from model.layout import COLUMN_BLOCK
from model.weights.rows import Arena

_CACHE_LINE = 64  # bytes
_RUN_BYTES = 1 << 18  # transposed at once: they stay in a core's cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] in a block format.

    `words` [ceil(n/32), D, W, 32] uint32 and `scales` [ceil(n/32), D, 32] uint8 or uint16, or [ceil(n/32), 0, 32] if
    the format has none; D is the number of blocks of K. Padded with zeros. With `order` [k] int32, the columns of the
    blocks are the weight's columns order[0], order[1], ...
    """

    words: Array
    scales: Array
    format: BlockFormat = field(metadata={"static": True})
    n: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})
    order: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedWeight:
    """Weights of different formats whose rows are one weight's, in order."""

    parts: tuple[PackedWeight, ...]


type Packed = PackedWeight | StackedWeight


def pack(
    shape: tuple[int, ...],
    block_format: BlockFormat,
    runs: Iterable[NDArray[np.uint8]],
    memory: Arena | None = None,
    order: NDArray[np.int32] | None = None,
) -> PackedWeight:
    """Pack a weight [n, k] that comes in runs of rows, each as the bytes of its blocks; only their order changes."""
    memory = Arena(0) if memory is None else memory
    n, k = shape
    depth, blocks, block = block_format.depth(k), -(-n // COLUMN_BLOCK), 0
    words = memory.empty((blocks, depth, block_format.words, COLUMN_BLOCK), np.uint32)
    scales = memory.empty((blocks, depth if block_format.scale_bytes else 0, COLUMN_BLOCK), block_format.scale_dtype)
    for rows in _column_blocks(runs, block_format.depth(k) * block_format.block_bytes):
        stop = block + len(rows) // COLUMN_BLOCK
        parts = rows.view(_block_type(block_format)).reshape(stop - block, COLUMN_BLOCK, depth)
        _transpose(parts["words"], words[block:stop])
        if block_format.scale_bytes:
            scales[block:stop] = parts["scale"].transpose(0, 2, 1)
        block = stop
    columns = None if order is None else jax.device_put(order)
    return PackedWeight(jax.device_put(words), jax.device_put(scales), block_format, n, k, columns)


def _block_type(block_format: BlockFormat) -> np.dtype[Any]:
    """A block as its words, in one item, and its scale."""
    words, scale = 4 * block_format.words, block_format.scale_bytes
    names, formats, offsets = ["words"], [f"V{words}"], [scale if block_format.scale_first else 0]
    if scale:
        names, formats = [*names, "scale"], [*formats, block_format.scale_dtype.str]
        offsets.append(0 if block_format.scale_first else words)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": block_format.block_bytes})


def _transpose(items: NDArray[np.void], words: NDArray[np.uint32]) -> None:
    """Write items [blocks, 32, D] of W words each to `words` [blocks, D, W, 32].

    The rows are copied to an odd number of cache lines each: at a multiple of some power of two, the 32 elements that
    are written together would evict each other from the cache.
    """
    blocks, columns, depth = items.shape
    row = depth * items.itemsize
    stride = (-(-row // _CACHE_LINE) | 1) * _CACHE_LINE
    buffer = np.empty((blocks, columns, stride), np.uint8)[..., :row]
    buffer.view(items.dtype)[:] = items
    words[:] = buffer.view(np.uint32).transpose(0, 2, 1).reshape(words.shape)


def _column_blocks(runs: Iterable[NDArray[np.uint8]], row: int) -> Iterator[NDArray[np.uint8]]:
    """The rows of `row` bytes in small runs of full column blocks; the last block is padded with zeros."""
    size = max(1, _RUN_BYTES // (row * COLUMN_BLOCK)) * COLUMN_BLOCK
    remainder: NDArray[np.uint8] | None = None
    for run in runs:
        rows = run
        if remainder is not None:
            count = COLUMN_BLOCK - len(remainder)
            remainder, rows = np.concatenate([remainder, rows[:count]]), rows[count:]
            if len(remainder) < COLUMN_BLOCK:
                continue
            yield remainder
        full = len(rows) // COLUMN_BLOCK * COLUMN_BLOCK
        for start in range(0, full, size):
            yield rows[start : min(full, start + size)]
        remainder = rows[full:] if full < len(rows) else None
    if remainder is not None:
        yield np.pad(remainder, ((0, -len(remainder) % COLUMN_BLOCK), (0, 0)))


def unpack_rows(weight: PackedWeight, rows: Array) -> Array:
    """Rows `rows` [M] int32 (each in 0 .. n-1), exact: [M, k], bfloat16 if the weight is, else float32."""
    block, column = rows // COLUMN_BLOCK, rows % COLUMN_BLOCK
    values = _values(weight.format, weight.words[block, :, :, column], weight.scales[block, :, column])
    return _natural_order(values.reshape(rows.shape[0], -1)[:, : weight.k], weight.order)


def unpack(weight: PackedWeight) -> Array:
    """The full weight [n, k], of the dtype of `unpack_rows`."""
    values = _values(weight.format, weight.words.transpose(0, 3, 1, 2), weight.scales.transpose(0, 2, 1))
    rows = values.reshape(weight.words.shape[0] * COLUMN_BLOCK, -1)
    return _natural_order(rows[: weight.n, : weight.k], weight.order)


def _natural_order(values: Array, order: Array | None) -> Array:
    return values if order is None else jnp.zeros_like(values).at[:, order].set(values)


def _values(block_format: BlockFormat, words: Array, scales: Array) -> Array:
    """Values [..., D * B] of blocks with words [..., D, W] and scales [..., D]: float32, or bfloat16 if stored so.

    Codes, factors, minima and their products are exact, so a value is rounded once at most, as by
    `gguf.quants.dequantize`.
    """
    match block_format.name:
        case "BF16":
            values = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
        case "F16":
            values = jax.lax.bitcast_convert_type(words, jnp.float16).astype(jnp.float32)
        case "F32":
            values = jax.lax.bitcast_convert_type(words, jnp.float32)
        case "FP8_128":
            scale = jax.lax.bitcast_convert_type(words[..., :1], jnp.float32)
            codes = _bytes(words[..., 1:]).astype(jnp.uint8)
            values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32) * scale
        case _:
            codes, factors, minima = _DECODERS[block_format.name](words, scales)  # [..., D, B], twice [..., D, groups]
            groups = codes.reshape(*factors.shape, -1).astype(jnp.float32)
            values = groups * factors[..., None]
            values = values if minima is None else values - minima[..., None]
    return values.reshape(*words.shape[:-2], -1)


def _bytes(words: Array) -> Array:
    """The bytes [..., 4 W] of words [..., W], as int32."""
    shifts = jnp.arange(0, 32, 8, dtype=jnp.uint32)
    return ((words[..., None] >> shifts) & 0xFF).astype(jnp.int32).reshape(*words.shape[:-1], -1)


def _parts(x: Array, bits: int, width: int) -> Array:
    """Codes of `bits` bits: of each `width` bytes of x the lowest bits, then the next ones."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.int32)[:, None]
    parts = (x.reshape(*x.shape[:-1], -1, 1, width) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(*x.shape[:-1], -1)


def _halves(words: Array) -> tuple[Array, Array]:
    """Two float16 in each word: both [..., 1] float32 of words [...]."""
    halves = jax.lax.bitcast_convert_type(words, jnp.float16).astype(jnp.float32)
    return halves[..., :1], halves[..., 1:]


def _float16(scales: Array) -> Array:
    """scales [..., D] uint16 as float32 [..., D, 1]."""
    return jax.lax.bitcast_convert_type(scales, jnp.float16).astype(jnp.float32)[..., None]


def _fifth_bits(word: Array) -> Array:
    return ((word[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1).astype(jnp.int32) << 4


type _Decoded = tuple[Array, Array, Array | None]  # codes, factors, minima: value = code * factor - minimum


def _q4_0(words: Array, scales: Array) -> _Decoded:
    return _parts(_bytes(words), 4, 16) - 8, _float16(scales), None


def _q4_1(words: Array, _: Array) -> _Decoded:
    factor, offset = _halves(words[..., 0])
    return _parts(_bytes(words[..., 1:]), 4, 16), factor, -offset


def _q5_0(words: Array, scales: Array) -> _Decoded:
    codes = _parts(_bytes(words[..., 1:]), 4, 16) | _fifth_bits(words[..., 0])
    return codes - 16, _float16(scales), None


def _q5_1(words: Array, _: Array) -> _Decoded:
    factor, offset = _halves(words[..., 0])
    return _parts(_bytes(words[..., 2:]), 4, 16) | _fifth_bits(words[..., 1]), factor, -offset


def _q8_0(words: Array, scales: Array) -> _Decoded:
    return _signed(_bytes(words)), _float16(scales), None


def _signed(x: Array) -> Array:
    return (x ^ 0x80) - 0x80


def _q2_k(words: Array, _: Array) -> _Decoded:
    both, (factor, minimum) = _bytes(words[..., :4]), _halves(words[..., 20])
    return _parts(_bytes(words[..., 4:20]), 2, 32), factor * (both & 15), minimum * (both >> 4)


def _q3_k(words: Array, scales: Array) -> _Decoded:
    six_bits = _parts(_bytes(words[..., 24:26]), 4, 8) | _parts(_bytes(words[..., 26:27]), 2, 4) << 4
    codes = _parts(_bytes(words[..., 8:24]), 2, 32) | _parts(_bytes(words[..., :8]), 1, 32) << 2
    return codes - 4, _float16(scales) * (six_bits - 32), None


def _scales_and_minima(words: Array) -> tuple[Array, Array]:
    """The factors and minima [..., 8] of a Q4_K or Q5_K block."""
    (factor, minimum), x = _halves(words[..., 0]), _bytes(words[..., 1:4])
    first, second, low = x[..., :4], x[..., 4:8], x[..., 8:]
    scales = jnp.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=-1)
    minima = jnp.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=-1)
    return factor * scales, minimum * minima


def _q4_k(words: Array, _: Array) -> _Decoded:
    return _parts(_bytes(words[..., 4:]), 4, 32), *_scales_and_minima(words)


def _q5_k(words: Array, _: Array) -> _Decoded:
    codes = _parts(_bytes(words[..., 12:]), 4, 32) | _parts(_bytes(words[..., 4:12]), 1, 32) << 4
    return codes, *_scales_and_minima(words)


def _q6_k(words: Array, scales: Array) -> _Decoded:
    codes = _parts(_bytes(words[..., :32]), 4, 64) | _parts(_bytes(words[..., 32:48]), 2, 32) << 4
    return codes - 32, _float16(scales) * _signed(_bytes(words[..., 48:])), None


# 4-bit codes of IQ4_NL and IQ4_XS, and twice the 4-bit floats of MXFP4.
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _lookup(values: tuple[int, ...], codes: Array) -> Array:
    return jnp.asarray(values, jnp.int32)[codes]


def _iq4_nl(words: Array, scales: Array) -> _Decoded:
    return _lookup(_IQ4_VALUES, _parts(_bytes(words), 4, 16)), _float16(scales), None


def _iq4_xs(words: Array, _: Array) -> _Decoded:
    factor, _high = _halves(words[..., 0])
    low = _parts(_bytes(words[..., 1:2]), 4, 1)
    high = ((words[..., :1] >> jnp.arange(16, 32, 2, dtype=jnp.uint32)) & 3).astype(jnp.int32)
    codes = _lookup(_IQ4_VALUES, _parts(_bytes(words[..., 2:]), 4, 16))
    return codes, factor * ((low | high << 4) - 32), None


def _mxfp4(words: Array, scales: Array) -> _Decoded:
    exponents = scales.astype(jnp.uint32)  # of 2^(e - 128); the two smallest are denormal, which counts as zero
    bits = jnp.where(exponents < 2, 0, (exponents - 1) << 23)
    factor = jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]
    return _lookup(_FP4_VALUES, _parts(_bytes(words), 4, 16)), factor, None


def _scale_and_minimum(words: Array, center: int) -> tuple[Array, Array]:
    """The scale [..., 1] of blocks, and (zero point - center) * scale, both exact."""
    scale = jax.lax.bitcast_convert_type(words[..., :1] & np.uint32(0xFFFFE000), jnp.float32)
    return scale, ((words[..., :1] & 0x1FFF).astype(jnp.int32) - center).astype(jnp.float32) * scale


def _int4(words: Array, _: Array) -> _Decoded:
    return _parts(_bytes(words[..., 1:]), 4, 16) - 8, *_scale_and_minimum(words, 8)


def _int8(words: Array, _: Array) -> _Decoded:
    return _signed(_bytes(words[..., 1:])), *_scale_and_minimum(words, 128)


_DECODERS: Mapping[str, Callable[[Array, Array], _Decoded]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
        "MXFP4": _mxfp4,
        **dict.fromkeys(("INT4_32", "INT4_64", "INT4_128"), _int4),
        **dict.fromkeys(("INT8_32", "INT8_128"), _int8),
    }
)
