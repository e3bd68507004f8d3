"""Tables of accuracy and determinism."""
