"""Fixtures of the server's tests."""

import logging
import sys
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Restore what set_up_logs changes in this process."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("serve", "compiled", "model")]
    state, levels = (root.handlers[:], root.level), [logger.level for logger in ours]
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    root.handlers[:] = []  # basicConfig would close them
    yield
    logging.captureWarnings(False)
    (root.handlers[:], root.level) = state
    for logger, level in zip(ours, levels, strict=True):
        logger.setLevel(level)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
