"""Packed weights: rounded from arrays, or of random blocks."""

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from jax.typing import ArrayLike
from numpy.typing import NDArray

from model.formats import FLOATS, FORMATS
from model.packed import _DECODERS, PackedWeight
from model.packed import pack as pack_blocks
from model.weights.rows import quantized

CODED = tuple(_DECODERS)  # multiplied as integers
IN_GGUF = tuple(name for name in CODED if name in GGMLQuantizationType.__members__)


def pack(w: ArrayLike, name: str = "BF16") -> PackedWeight:
    """w [N, K] rounded to a format and packed."""
    rows = np.asarray(w)
    return pack_blocks(rows.shape, FORMATS[name], [quantized(rows, FORMATS[name])])


def random_blocks(name: str, n: int, k: int, seed: int = 0, *, spread: int = 2) -> NDArray[np.uint8]:
    """Rows [n, bytes] of random blocks; their scales are finite, and random over `spread` powers of ten."""
    block_format, random = FORMATS[name], np.random.default_rng(seed)
    depth = block_format.depth(k)
    if name in FLOATS:
        padded = np.zeros((n, depth * block_format.block), np.float32)
        padded[:, :k] = random.standard_normal((n, k), np.float32)
        return padded.astype(FLOATS[name]).view(np.uint8)
    blocks = random.integers(0, 256, (n, depth, block_format.block_bytes), np.uint8)
    for start in block_format.float16_at:
        scales = random.standard_normal((n, depth, 1)) * 10.0 ** random.integers(-spread, 1, (n, depth, 1))
        blocks[..., start : start + 2] = scales.astype(np.float16).view(np.uint8)
    if block_format.has_float32_scale:
        scales = random.standard_normal((n, depth, 1)) * 10.0 ** random.integers(-spread, 1, (n, depth, 1))
        words = scales.astype(np.float32).view(np.uint32)
        if name.startswith("INT"):  # scales are float16 or bfloat16
            scales[1::2] = scales[1::2].astype(ml_dtypes.bfloat16)
            zeros = random.integers(0, 17 if name.startswith("INT4") else 256, words.shape, np.uint32)
            words = (
                np.where(np.arange(n)[:, None, None] % 2, scales, scales.astype(np.float16)).astype(np.float32)
            ).view(np.uint32) | zeros
        else:
            blocks[blocks & 0x7F == 0x7F] = 0  # NaN
        blocks[..., :4] = words.view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = random.integers(127 - spread, 129, blocks.shape[:2])
    return blocks.reshape(n, -1)


def values_of(name: str, rows: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """The float32 values [n, k] of rows of blocks, by the gguf package, or by the definition of our own formats."""
    if name in FLOATS:
        return rows.view(FLOATS[name]).astype(np.float32)[:, :k]
    if FORMATS[name].has_float32_scale:
        return _values_of_ours(name, rows.reshape(len(rows), -1, FORMATS[name].block_bytes))[:, :k]
    values: NDArray[np.float32] = gguf.quants.dequantize(rows, GGMLQuantizationType[name])
    return values[:, :k]


def _values_of_ours(name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    word, codes = blocks[..., :4].copy().view(np.uint32), blocks[..., 4:]
    if name == "FP8_128":
        values = codes.copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * word.view(np.float32)
        return np.asarray(values.reshape(len(blocks), -1))
    scale, zero = (word & 0xFFFFE000).view(np.float32), (word & 0x1FFF).astype(np.float32)
    if name.startswith("INT4"):
        halves = codes.reshape(*codes.shape[:2], -1, 1, 16)
        codes = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-2).reshape(*codes.shape[:2], -1)
    else:
        codes = codes ^ np.uint8(0x80)
    return np.asarray(((codes.astype(np.float32) - zero) * scale).reshape(len(blocks), -1))


def random_weight(
    name: str, n: int, k: int, seed: int = 0, *, spread: int = 2
) -> tuple[PackedWeight, NDArray[np.float32]]:
    """A weight of random blocks, packed from two runs of rows, and its values [n, k]."""
    rows = random_blocks(name, n, k, seed, spread=spread)
    return pack_blocks((n, k), FORMATS[name], [rows[:5], rows[5:]]), values_of(name, rows, k)


def limit(x: ArrayLike, values: NDArray[np.float32], weight: PackedWeight | None = None) -> NDArray[np.float64]:
    """What the sums of a product can be off by: each at most half a unit in the last place of a partial sum.

    With `weight`, in integers: an element of x also differs by half a unit in the last of 23 places of the largest in
    its group, and products with codes and with offsets are added apart.
    """
    magnitudes, sizes = np.abs(np.asarray(x, np.float64)), np.abs(values.astype(np.float64))
    count = values.shape[1]
    if weight is None:
        return np.asarray(2.0**-24 * count * (magnitudes @ sizes.T))
    sizes, largest = _sizes(weight), np.zeros_like(magnitudes)
    for first in range(0, count, 32):
        largest[:, first : first + 32] = magnitudes[:, first : first + 32].max(axis=1, keepdims=True)
    return np.asarray((2.0**-24 * (count + 4) * magnitudes + 2.0**-23 * largest) @ sizes.T)


def _sizes(weight: PackedWeight) -> NDArray[np.float64]:
    """Sizes [n, k] of a coded weight's values before offsets are subtracted, plus those of the offsets."""
    words, scales = weight.words.transpose(0, 3, 1, 2), weight.scales.transpose(0, 2, 1)
    codes, factors, minima = _DECODERS[weight.format.name](words, scales)
    sizes = np.abs(np.asarray(factors, np.float64))[..., None] * np.abs(np.asarray(codes)).reshape(*factors.shape, -1)
    if minima is not None:
        sizes += np.abs(np.asarray(minima, np.float64))[..., None]
    return sizes.reshape(words.shape[0] * words.shape[1], -1)[: weight.n, : weight.k]
