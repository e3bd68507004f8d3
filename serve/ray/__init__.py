"""Replicas behind one address, on Ray Serve."""
