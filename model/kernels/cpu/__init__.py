"""Kernels for XLA:CPU in C++, called through XLA's foreign function interface.

They know arrays, not models. Their functions may be called once `load()` has registered them.
"""

from model.kernels.cpu.attention import attend
from model.kernels.cpu.head import normalizer, score, token_logprobs
from model.kernels.cpu.library import CpuKernels, load
from model.kernels.cpu.linear import (
    Packed,
    PackedInt8,
    PackedWeight,
    arrays_of,
    like,
    linear,
    pack,
    pack_int8,
    pack_int8_rows,
    pack_rows,
    unpack,
    unpack_rows,
)
from model.kernels.cpu.rows import geglu, rms_norm, rotate_and_store, soft_cap, swiglu

__all__ = [
    "CpuKernels",
    "Packed",
    "PackedInt8",
    "PackedWeight",
    "arrays_of",
    "attend",
    "geglu",
    "like",
    "linear",
    "load",
    "normalizer",
    "pack",
    "pack_int8",
    "pack_int8_rows",
    "pack_rows",
    "rms_norm",
    "rotate_and_store",
    "score",
    "soft_cap",
    "swiglu",
    "token_logprobs",
    "unpack",
    "unpack_rows",
]
