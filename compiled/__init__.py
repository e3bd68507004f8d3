"""The steps of a model, compiled for fixed shapes. Imports model, never serve; knows no requests."""
