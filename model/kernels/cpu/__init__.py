"""Kernels for XLA:CPU in C++, called through XLA's foreign function interface.

They know arrays, not models. Their functions may be called once `load_library()` has registered them.
"""

from model.kernels.cpu.library import CpuKernels as CpuKernels
from model.kernels.cpu.library import load_library as load_library
from model.kernels.cpu.operations import attend as attend
from model.kernels.cpu.operations import clamped_swiglu as clamped_swiglu
from model.kernels.cpu.operations import combine as combine
from model.kernels.cpu.operations import expert_linear as expert_linear
from model.kernels.cpu.operations import geglu as geglu
from model.kernels.cpu.operations import linear as linear
from model.kernels.cpu.operations import normalizer as normalizer
from model.kernels.cpu.operations import rms_norm as rms_norm
from model.kernels.cpu.operations import rotate_and_store as rotate_and_store
from model.kernels.cpu.operations import route as route
from model.kernels.cpu.operations import score as score
from model.kernels.cpu.operations import soft_cap as soft_cap
from model.kernels.cpu.operations import swiglu as swiglu
from model.kernels.cpu.operations import token_logprobs as token_logprobs
