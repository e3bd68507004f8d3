"""Kernels for NVIDIA GPUs in Pallas, compiled by Triton. They know arrays, not models."""

from model.kernels.gpu.attention import attend, runs_here, takes

__all__ = ["attend", "runs_here", "takes"]
