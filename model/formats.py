"""Formats of packed weights: the blocks of GGUF files, blocks of our own for quantized safetensors, and floats.

A packed weight [N, K] has, for each 32 columns of the product and each block of B elements of K, W words of 32 bits per
column: the bytes of the GGUF file in the file's order. A scale that is no full word is stored beside them.

Our own formats start with a word of a float32 scale. In INT4 and INT8 the scale is a float16 or bfloat16, whose lowest
13 bits as float32 are zero: they hold the zero point, and a value is scale * (code - zero point). FP8 is e4m3, rounded
to float32 once: scale * value.
Layouts of the blocks: ggml-common.h of the ggml project. `kernels/cpu/formats.h` describes the arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_MAX_EXPONENT = 249  # of MXFP4; the kernels' sums of larger values would overflow
_MAX_SCALE_BITS = (127 + 100) << 23  # 2^100; the same for float32 scales


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """The layout of a block: `words` words of 32 bits, and a scale of `scale_bytes` bytes, 0 for none."""

    name: str  # ggml's, or ours: the type of the codes and B
    block: int  # B, elements of K
    words: int  # W
    scale_bytes: int = 0
    scale_first: bool = True  # in the file: before the words, else after them
    float16_at: tuple[int, ...] = ()  # bytes of the file's block where its float16 factors start
    has_float32_scale: bool = False  # in the first word

    @property
    def block_bytes(self) -> int:
        return 4 * self.words + self.scale_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def is_float(self) -> bool:
        return self.name in FLOATS

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.scale_bytes == 1 else np.uint16)

    def has_finite_scales(self, rows: NDArray[np.uint8]) -> bool:
        """Whether all values of rows of blocks are finite and not too large; of floats it is not checked."""
        blocks = rows.reshape(-1, self.block_bytes)
        if self.name == "MXFP4":
            return bool((blocks[:, 0] <= _MAX_EXPONENT).all())
        if self.has_float32_scale:
            is_finite = bool((np.ascontiguousarray(blocks[:, :4]).view("<u4") & 0x7FFFFFFF < _MAX_SCALE_BITS).all())
            return is_finite and (self.name != "FP8_128" or bool((blocks[:, 4:] & 0x7F != 0x7F).all()))
        return all((blocks[:, at + 1] & 0x7C != 0x7C).all() for at in self.float16_at)

    def depth(self, k: int) -> int:
        """Number of blocks in a row of k elements."""
        return -(-k // self.block)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a weight [n, k] without the padding of columns."""
        return n * self.depth(k) * self.block_bytes


FLOATS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
)
# Formats that kernels do not read -> a wider one that holds the same values, for GGUF files.
WIDER_FORMATS: Mapping[str, str] = MappingProxyType({"TQ1_0": "Q2_K", "TQ2_0": "Q2_K", "IQ3_S": "Q5_K"})
FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        item.name: item
        for item in (
            BlockFormat("Q4_0", 32, 4, 2, float16_at=(0,)),
            BlockFormat("Q4_1", 32, 5, float16_at=(0, 2)),
            BlockFormat("Q5_0", 32, 5, 2, float16_at=(0,)),
            BlockFormat("Q5_1", 32, 6, float16_at=(0, 2)),
            BlockFormat("Q8_0", 32, 8, 2, float16_at=(0,)),
            BlockFormat("Q2_K", 256, 21, float16_at=(80, 82)),
            BlockFormat("Q3_K", 256, 27, 2, scale_first=False, float16_at=(108,)),
            BlockFormat("Q4_K", 256, 36, float16_at=(0, 2)),
            BlockFormat("Q5_K", 256, 44, float16_at=(0, 2)),
            BlockFormat("Q6_K", 256, 52, 2, scale_first=False, float16_at=(208,)),
            BlockFormat("IQ4_NL", 32, 4, 2, float16_at=(0,)),
            BlockFormat("IQ4_XS", 256, 34, float16_at=(0,)),
            BlockFormat("MXFP4", 32, 4, 1),
            *(BlockFormat(f"INT4_{block}", block, 1 + block // 8, has_float32_scale=True) for block in (32, 64, 128)),
            *(BlockFormat(f"INT8_{block}", block, 1 + block // 4, has_float32_scale=True) for block in (32, 128)),
            BlockFormat("FP8_128", 128, 33, has_float32_scale=True),
            *(BlockFormat(name, 32, 8 * dtype.itemsize) for name, dtype in FLOATS.items()),
        )
    }
)
