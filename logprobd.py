"""Exact log-probs from Python."""
