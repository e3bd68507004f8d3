"""int8 weights: 32 elements of a row share a float16 scale, as in GGUF's Q8_0 (`block_q8_0` of the ggml project)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP = 32
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8Array:
    """A matrix [N, K]: element [i, j] is values[i, j] * scales[i, j // 32]."""

    values: NDArray[np.int8]  # [N, K]
    scales: NDArray[np.float16]  # [N, ceil(K / 32)]


def quantise(matrix: NDArray[np.float32]) -> Int8Array:
    """Rounds a matrix [N, K] to the nearest of 255 steps of each group; a group's greatest becomes 127 or -127.

    A matrix whose values are too large for float16 scales gets infinite ones.
    """
    n, k = matrix.shape
    groups = np.pad(matrix, ((0, 0), (0, -k % GROUP))).reshape(n, -1, GROUP)
    with np.errstate(all="ignore"):
        scales = (np.abs(groups).max(axis=2) / _LARGEST).astype(np.float16)
        steps = scales.astype(np.float32)[:, :, None]
        # By the scale as it is stored: what float16 has rounded off it is not lost a second time.
        rounded = np.where(steps > 0, np.rint(groups / steps), 0)
        values = np.clip(np.nan_to_num(rounded), -_LARGEST, _LARGEST).astype(np.int8)
    return Int8Array(np.ascontiguousarray(values.reshape(n, -1)[:, :k]), scales)
