"""Kernels for NVIDIA GPUs in Pallas, which Triton compiles. What lives here knows arrays and nothing of models."""

from model.kernels.gpu.attention import attend, runs_here, takes

__all__ = ["attend", "runs_here", "takes"]
