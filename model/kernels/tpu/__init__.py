"""Kernels for TPUs: those that JAX ships in Pallas, behind our shapes. What lives here knows arrays, not models."""

from model.kernels.tpu.attention import attend, kv_heads_of_tiles, lanes_of_tiles, reads, takes

__all__ = ["attend", "kv_heads_of_tiles", "lanes_of_tiles", "reads", "takes"]
