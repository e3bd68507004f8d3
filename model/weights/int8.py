"""int8 weights: 32 elements of a row share a float16 scale, as in GGUF's Q8_0 (`block_q8_0` of the ggml project)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32
_LARGEST = 127
_TOGETHER = 1 << 16  # values rounded at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class Int8Array:
    """A matrix [N, K]: element [i, j] is values[i, j] * scales[i, j // 32]."""

    values: NDArray[np.int8]  # [N, K]
    scales: NDArray[np.float16]  # [N, ceil(K / 32)]


def quantise(matrix: NDArray[Any]) -> Int8Array:
    """Rounds a matrix [N, K] of any float type to the nearest of 255 steps of each group.

    A group's greatest becomes 127 or -127, or less where float16 has no scale as small as it asks for. A matrix whose
    values are too large for float16 scales gets infinite ones.
    """
    n, k = matrix.shape
    made = Int8Array(np.empty((n, k), np.int8), np.empty((n, -(-k // GROUP)), np.float16))
    rows = max(1, _TOGETHER // k)
    for start in range(0, n, rows):
        some = slice(start, start + rows)
        _round_rows(np.asarray(matrix[some], np.float32), made.values[some], made.scales[some])
    return made


def _round_rows(matrix: NDArray[np.float32], values: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    n, k = matrix.shape
    groups = np.pad(matrix, ((0, 0), (0, -k % GROUP))).reshape(n, -1, GROUP)
    with np.errstate(all="ignore"):
        greatest = np.abs(groups).max(axis=2)
        scales[:] = greatest / _LARGEST
        # Among float16's subnormal numbers the nearest may be so much smaller that 127 steps would not reach.
        too_small = greatest > (_LARGEST + 0.5) * scales.astype(np.float32)
        scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
        steps = scales.astype(np.float32)[:, :, None]
        # By the scale as it is stored: what float16 has rounded off it is not lost a second time.
        rounded = np.where(steps > 0, np.rint(groups / steps), 0)
        limited = np.clip(np.nan_to_num(rounded), -_LARGEST, _LARGEST).astype(np.int8)
    values[:] = limited.reshape(n, -1)[:, :k]
