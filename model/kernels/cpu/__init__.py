"""Kernels for XLA:CPU in C++, called through XLA's foreign function interface.

They know arrays, not models. Their functions may be called once `load()` has registered them.
"""

from model.kernels.cpu.library import CpuKernels as CpuKernels
from model.kernels.cpu.library import load as load
from model.kernels.cpu.linear import Packed as Packed
from model.kernels.cpu.linear import PackedInt8 as PackedInt8
from model.kernels.cpu.linear import PackedWeight as PackedWeight
from model.kernels.cpu.linear import linear as linear
from model.kernels.cpu.linear import pack as pack
from model.kernels.cpu.linear import pack_int8 as pack_int8
from model.kernels.cpu.linear import unpack as unpack
from model.kernels.cpu.linear import unpack_rows as unpack_rows
from model.kernels.cpu.operations import attend as attend
from model.kernels.cpu.operations import geglu as geglu
from model.kernels.cpu.operations import normalizer as normalizer
from model.kernels.cpu.operations import rms_norm as rms_norm
from model.kernels.cpu.operations import rotate_and_store as rotate_and_store
from model.kernels.cpu.operations import score as score
from model.kernels.cpu.operations import soft_cap as soft_cap
from model.kernels.cpu.operations import swiglu as swiglu
from model.kernels.cpu.operations import token_logprobs as token_logprobs
