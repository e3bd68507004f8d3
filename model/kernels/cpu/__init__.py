"""Kernels for XLA:CPU in C++, compiled by `python -m model.kernels.cpu.build`, called through XLA's FFI.

What lives here knows arrays and nothing of models. Where `load()` gives None, XLA does the work.
"""

from model.kernels.cpu.attention import attend
from model.kernels.cpu.head import normalizer, score, token_logprobs
from model.kernels.cpu.library import CpuKernels, load
from model.kernels.cpu.linear import (
    COLUMNS,
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
    "COLUMNS",
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
