"""Kernels for TPUs: JAX's Pallas kernels, adapted to our layouts. They know arrays, not models."""

from model.kernels.tpu.attention import attend, kv_heads_of_tiles, lanes_of_tiles, reads, takes

__all__ = ["attend", "kv_heads_of_tiles", "lanes_of_tiles", "reads", "takes"]
