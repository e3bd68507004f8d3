"""Kernels for NVIDIA GPUs in Pallas, which Triton compiles. What lives here knows arrays and nothing of models."""

from model.kernels.gpu.attention import attend, takes

__all__ = ["attend", "takes"]
