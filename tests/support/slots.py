"""Slots and token masks for tests of sampling."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiled.state import SlotState


def empty_slots(Z: int, V: int) -> SlotState:
    """Return Z empty slots as numpy arrays."""
    return SlotState(
        tokens=np.zeros(Z, np.int32),
        bias=np.zeros((Z, V), np.float32),
        counts=np.zeros((Z, V), np.int32),
        seen=np.zeros((Z, V), np.bool_),
    )


def packed(allowed: Any, *, spare: bool = False) -> NDArray[np.uint32]:
    """Pack allowed [..., V] bool into words [..., W]; `spare` is the value of the bits past V."""
    allowed = np.asarray(allowed, np.bool_)
    missing = -allowed.shape[-1] % 32
    padded = np.concatenate([allowed, np.full((*allowed.shape[:-1], missing), spare)], axis=-1)
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4").astype(np.uint32)
