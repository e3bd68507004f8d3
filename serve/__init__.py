"""Who asks: requests, scheduling, HTTP. Imports compiled and model; nothing here is imported by them."""

__version__ = "0.2.0"
