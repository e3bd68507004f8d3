"""Panics of `tokenizers`: what its Rust code did not foresee comes as a BaseException of a class that has no name here.

One is known: a merge whose result is longer than every token (huggingface/tokenizers issue 2198), which a model's file
can bring about.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_CLASS = "PanicException"  # of pyo3, which nothing exports


class PanicError(Exception):
    """The library did not foresee its input."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Makes a panic an exception that handlers of errors take.

    Raises:
        PanicError: there was one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != _CLASS:
            raise
        raise PanicError(str(error)) from error
