"""Generators for the documentation."""
