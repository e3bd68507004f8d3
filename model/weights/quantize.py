"""Rounds matrices to ggml's block formats: the least weighted squared error over candidates of each block's scale.

Formats: `block_*` of the ggml project. In here a block's elements are the second-last axis, B, and blocks the last, n:
sums over a block are then sums of rows.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.formats import FORMATS

type Floats = NDArray[Any]  # float32
type Bytes = NDArray[np.uint8]

_BATCH_VALUES = 1 << 17  # values rounded at once: they stay in a core's cache
_STEPS = tuple(np.linspace(-0.9, 0.9, 19).tolist())  # candidates: the extreme value becomes its last level minus a step
_REFINEMENTS = 2
_MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_MXFP4_BIAS = 127
_LARGEST_CODE = 63  # of a 6-bit scale
_TOO_LARGE = "holds values that are too large for float16 scales"
_LARGEST = 1e7  # no format has float16 scales for larger values


def quantize(matrix: Floats, kind: str, importance: Floats | None = None) -> Bytes:
    """Round a matrix to a block format.

    Args:
        matrix: [N, K]; K is a multiple of the format's block.
        kind: a key of ENCODERS, such as "Q4_K".
        importance: [K], the mean square of each input of the linear map; None: all are alike.

    Returns:
        ggml's blocks, [N, K / block * block_bytes].

    Raises:
        ValueError: a value is not finite, or too large for float16 scales.
    """
    form, encode = FORMATS[kind], ENCODERS[kind]
    n, k = matrix.shape
    result = np.empty((n, k // form.block * form.block_bytes), np.uint8)
    columns = np.ones(k, np.float32) if importance is None else importance.astype(np.float32)
    # An input that is always zero keeps a small weight: its column is arbitrary, but not worthless.
    columns = np.maximum(columns / max(float(columns.mean()), 1e-30), np.float32(1e-4)).reshape(-1, form.block)
    count = max(1, _BATCH_VALUES // k)

    def run(start: int) -> None:
        values = np.asarray(matrix[start : start + count], np.float32)
        blocks = np.ascontiguousarray(values.reshape(-1, form.block).T)
        with np.errstate(all="ignore"):
            encoded = encode(blocks, np.tile(columns.T, len(values)))
        result[start : start + count] = encoded.reshape(len(values), -1)

    if not np.isfinite(matrix).all():
        raise ValueError("holds values that are not finite")
    if np.abs(matrix).max(initial=0) > _LARGEST:
        raise ValueError(_TOO_LARGE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # its default of some more threads takes memory, but no less time
        [*pool.map(run, range(0, n, count))]
    return result


def _divide(a: Floats | float, b: Floats) -> Floats:
    """a / b, or 0 where b is 0."""
    quotient: Floats = np.divide(
        a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32), where=b != 0
    )
    return quotient


def _levels(values: Floats, low: int, high: int) -> Floats:
    """The nearest integers from `low` to `high`."""
    rounded: Floats = np.rint(values)
    return np.clip(rounded, low, high, out=rounded)


def _symmetric(x: Floats, w: Floats, low: int, high: int) -> Floats:
    """The scale [..., n] with the least error of scale * level to x [..., B, n], weighted by w."""
    top, bottom = x.max(axis=-2), x.min(axis=-2)
    extreme = np.where(top > -bottom, top, bottom)
    wx = w * x
    best, scale = np.zeros_like(extreme), np.zeros_like(extreme)

    def improve(inverse: Floats) -> None:
        nonlocal best, scale
        q = _levels(x * inverse[..., None, :], low, high)
        xq = (wx * q).sum(axis=-2)
        qq = (w * q * q).sum(axis=-2)
        candidate = _divide(xq, qq)
        gain = xq * candidate  # decrease of the error
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, candidate, scale)

    for step in _STEPS:
        improve(_divide(low + step, extreme))
    for _ in range(_REFINEMENTS):
        improve(_divide(1.0, scale))
    return scale


def _affine(x: Floats, w: Floats, levels: int, *, negative: bool) -> tuple[Floats, Floats]:
    """Scale and minimum [..., n] with the least error of scale * level + minimum to x [..., B, n], weighted by w.

    Levels are 0 to `levels`; with `negative` the minimum is at most 0.
    """
    low, high = x.min(axis=-2), x.max(axis=-2)
    if negative:
        low = np.minimum(low, 0)
    wx = w * x
    sw, sx = w.sum(axis=-2), wx.sum(axis=-2)
    best, scale, minimum = np.full_like(low, -np.inf), np.zeros_like(low), low

    def improve(inverse: Floats, offset: Floats) -> None:
        nonlocal best, scale, minimum
        q = _levels((x - offset[..., None, :]) * inverse[..., None, :], 0, levels)
        wq = w * q
        sq, sqq, sxq = wq.sum(axis=-2), (wq * q).sum(axis=-2), (wx * q).sum(axis=-2)
        determinant = sw * sqq - sq * sq
        new_scale = _divide(sw * sxq - sx * sq, determinant)
        new_minimum = np.where(determinant > 0, _divide(sqq * sx - sq * sxq, determinant), sx / sw)
        if negative:
            is_positive = new_minimum > 0
            new_scale = np.where(is_positive, _divide(sxq, sqq), new_scale)
            new_minimum = np.where(is_positive, 0, new_minimum)
        gain = new_scale * sxq + new_minimum * sx
        better = (gain > best) & (new_scale >= 0)
        best = np.where(better, gain, best)
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)

    for step in _STEPS:
        improve(_divide(levels + step, high - low), low)
    for _ in range(_REFINEMENTS):
        improve(_divide(1.0, scale), minimum)
    return scale, minimum


def _half(values: Floats) -> tuple[NDArray[np.float16], Floats]:
    """Values rounded to float16, and these as float32."""
    halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(_TOO_LARGE)
    return halves, halves.astype(np.float32)


def _columns(*parts: NDArray[Any]) -> Bytes:
    """Fields of blocks, each [fields, n] or [n], as bytes [n, block_bytes]."""
    rows = [np.ascontiguousarray(part.T if part.ndim > 1 else part[:, None]) for part in parts]
    return np.concatenate([row.view(np.uint8) for row in rows], axis=1)


def _nibbles(q: Bytes) -> Bytes:
    """Levels [32, n] -> [16, n]: element i + 16 above element i."""
    return (q[:16] & np.uint8(15)) | (q[16:] << np.uint8(4))


def _fifth_bits(q: Bytes) -> Bytes:
    """Bits 4 of levels [32, n], four bytes per block."""
    return np.packbits(q >> 4, axis=0, bitorder="little")


def _encode_symmetric(x: Floats, w: Floats, bits: int) -> Bytes:
    """Q4_0, Q5_0 and Q8_0: a float16 scale, then levels."""
    middle = 1 << (bits - 1)
    low, high = (-127, 127) if bits == 8 else (-middle, middle - 1)
    stored, scale = _half(_symmetric(x, w, low, high))
    q = _levels(x * _divide(1.0, scale), low, high)
    if bits == 8:
        return _columns(stored, q.astype(np.int8))
    levels = (q + middle).astype(np.uint8)
    return _columns(stored, *((_fifth_bits(levels),) if bits == 5 else ()), _nibbles(levels))


def _encode_affine(x: Floats, w: Floats, bits: int) -> Bytes:
    """Q4_1 and Q5_1: a float16 scale and minimum, then levels."""
    levels = (1 << bits) - 1
    scale, minimum = _affine(x, w, levels, negative=False)
    (stored, scale), (stored_minimum, minimum) = _half(scale), _half(minimum)
    q = _levels((x - minimum) * _divide(1.0, scale), 0, levels).astype(np.uint8)
    return _columns(stored, stored_minimum, *((_fifth_bits(q),) if bits == 5 else ()), _nibbles(q))


def _encode_k(x: Floats, w: Floats, bits: int) -> Bytes:
    """Q4_K and Q5_K: 8 groups of 32 whose scales and minima are 6-bit multiples of two float16 values."""
    levels = (1 << bits) - 1
    x, w = x.reshape(8, 32, -1), w.reshape(8, 32, -1)
    scale, minimum = _affine(x, w, levels, negative=True)
    steps = [_half(np.maximum(values, 0).max(axis=0) / _LARGEST_CODE) for values in (scale, -minimum)]
    codes = [_codes(values, step) for values, (_, step) in zip((scale, -minimum), steps, strict=True)]
    for _ in range(_REFINEMENTS):
        codes = _improve_codes(x, w, codes, [step for _, step in steps], levels)
        steps = _refit(x, w, codes, [step for _, step in steps], levels)
    q = _group_levels(x, codes, [step for _, step in steps], levels).astype(np.uint8)
    return k_blocks([stored for stored, _ in steps], codes, q, bits)


def k_blocks(steps: Sequence[NDArray[np.float16]], codes: Sequence[NDArray[Any]], levels: Bytes, bits: int) -> Bytes:
    """Q4_K or Q5_K of two steps [n], 6-bit codes [8, n] of scales and minima, and levels [8, 32, n]."""
    pairs = levels.reshape(4, 2, 32, -1)  # groups 2 i and 2 i + 1 share bytes
    low = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    high = [np.packbits(levels >> 4, axis=0, bitorder="little")[0]] if bits == 5 else []
    return _columns(*steps, _packed_codes(*codes), *high, low.reshape(128, -1))


def _codes(values: Floats, step: Floats) -> Floats:
    return _levels(_divide(np.maximum(values, 0), step), 0, _LARGEST_CODE)


def _group_levels(x: Floats, codes: list[Floats], steps: list[Floats], levels: int) -> Floats:
    """Levels [8, 32, n] of values, given the codes [8, n] of scales and minima and their steps [n]."""
    scale, minimum = (code * step for code, step in zip(codes, steps, strict=True))
    return _levels((x + minimum[:, None]) * _divide(1.0, scale)[:, None], 0, levels)


def _improve_codes(x: Floats, w: Floats, codes: list[Floats], steps: list[Floats], levels: int) -> list[Floats]:
    """For each group the best of the codes and their neighbors."""
    best, found = np.full(codes[0].shape, np.inf, np.float32), codes
    for scale_step in (0, -1, 1):
        for minimum_step in (0, -1, 1):
            near = [
                np.clip(code + d, 0, _LARGEST_CODE) for code, d in zip(codes, (scale_step, minimum_step), strict=True)
            ]
            q = _group_levels(x, near, steps, levels)
            error = x - (near[0] * steps[0])[:, None] * q + (near[1] * steps[1])[:, None]
            total = (w * error * error).sum(axis=1)
            better = total < best
            best = np.where(better, total, best)
            found = [np.where(better, new, old) for new, old in zip(near, found, strict=True)]
    return found


def _refit(
    x: Floats, w: Floats, codes: list[Floats], steps: list[Floats], levels: int
) -> list[tuple[NDArray[np.float16], Floats]]:
    """The two float16 steps with the least error for given levels and codes."""
    a = codes[0][:, None] * _group_levels(x, codes, steps, levels)
    b = -np.broadcast_to(codes[1][:, None], x.shape)
    waa, wab, wbb = ((w * left * right).sum(axis=(0, 1)) for left, right in ((a, a), (a, b), (b, b)))
    wax, wbx = ((w * left * x).sum(axis=(0, 1)) for left in (a, b))
    determinant = waa * wbb - wab * wab
    solved = determinant > 1e-6 * waa * wbb
    scale = np.where(solved, _divide(wbb * wax - wab * wbx, determinant), _divide(wax, waa))
    minimum = np.where(solved, _divide(waa * wbx - wab * wax, determinant), 0)
    is_valid = (scale > 0) & (minimum >= 0) & (solved | (wbb == 0))
    return [_half(np.where(is_valid, new, old)) for new, old in zip((scale, minimum), steps, strict=True)]


def _packed_codes(scales: NDArray[Any], minima: NDArray[Any]) -> Bytes:
    """6-bit codes [8, n] of scales and minima in 12 bytes [12, n]: four times 6 bits of each, then the rest."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    return np.concatenate([s[:4] | (s[4:] >> 4 << 6), m[:4] | (m[4:] >> 4 << 6), (s[4:] & 15) | (m[4:] << 4)], axis=0)


def _encode_q6_k(x: Floats, w: Floats) -> Bytes:
    """Q6_K: 16 groups of 16 whose scales are 8-bit multiples of a float16 value."""
    x, w = x.reshape(16, 16, -1), w.reshape(16, 16, -1)
    scale = _symmetric(x, w, -32, 31)
    top, bottom = scale.max(axis=0), scale.min(axis=0)
    stored, step = _half(np.where(top > -bottom, top, bottom) / -128)
    for refinement in range(_REFINEMENTS + 1):
        codes = _levels(_divide(scale, step), -128, 127)
        q = _levels(x * _divide(1.0, codes * step)[:, None], -32, 31)
        if refinement < _REFINEMENTS:
            a = codes[:, None] * q
            fitted = _divide((w * a * x).sum(axis=(0, 1)), (w * a * a).sum(axis=(0, 1)))
            stored, step = _half(np.where(fitted != 0, fitted, step))
    halves = (q + 32).astype(np.uint8).reshape(2, 4, 32, -1)  # per 128: four runs of 32
    low = (halves[:, :2] & 15) | (halves[:, 2:] << 4)
    high = np.bitwise_or.reduce([(halves[:, i] >> 4) << (2 * i) for i in range(4)])
    return _columns(low.reshape(128, -1), high.reshape(64, -1), codes.astype(np.int8), stored)


def _encode_mxfp4(x: Floats, w: Floats) -> Bytes:
    """MXFP4: a power of two, then 4-bit floats (OCP Microscaling Formats 1.0)."""
    largest = np.abs(x).max(axis=0)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2
    best, found = np.full(largest.shape, np.inf, np.float32), exponent
    middles = (_MXFP4_VALUES[1:] + _MXFP4_VALUES[:-1]) / 2

    def levels(exponent: Floats) -> NDArray[np.intp]:
        return np.searchsorted(middles, np.abs(x) * np.exp2(-exponent))

    for candidate in (exponent, exponent + 1, exponent - 1):
        error = np.abs(x) - _MXFP4_VALUES[levels(candidate)] * np.exp2(candidate)
        total = (w * error * error).sum(axis=0)
        better = total < best
        best, found = np.where(better, total, best), np.where(better, candidate, found)
    found = np.clip(found, 1 - _MXFP4_BIAS, 127)
    q = (levels(found) + 8 * (x < 0)).astype(np.uint8)
    return _columns((found + _MXFP4_BIAS).astype(np.uint8), _nibbles(q))


# Of each format: values and weights [B, n] -> bytes [n, block_bytes].
ENCODERS: Mapping[str, Callable[[Floats, Floats], Bytes]] = MappingProxyType(
    {
        "Q4_0": lambda x, w: _encode_symmetric(x, w, 4),
        "Q4_1": lambda x, w: _encode_affine(x, w, 4),
        "Q5_0": lambda x, w: _encode_symmetric(x, w, 5),
        "Q5_1": lambda x, w: _encode_affine(x, w, 5),
        "Q8_0": lambda x, w: _encode_symmetric(x, w, 8),
        "Q4_K": lambda x, w: _encode_k(x, w, 4),
        "Q5_K": lambda x, w: _encode_k(x, w, 5),
        "Q6_K": _encode_q6_k,
        "MXFP4": _encode_mxfp4,
    }
)
