"""Chooses between a kernel and XLA by the platform that a program is compiled for, not by the machine that compiles."""

from collections.abc import Callable
from typing import Any

import jax

from model.kernels import cpu


def by_platform(*arguments: Any, on_cpu: Callable[..., Any], xla: Callable[..., Any]) -> Any:
    """Of two forms of one function, `on_cpu` where the kernels are there and the program is for the CPU, else `xla`."""
    if cpu.load() is None:
        return xla(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=xla)
