"""Reads compiled programs: operations, bytes, flops."""
