"""Activations of MLPs, and the soft cap of logits, by a kernel or by XLA."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.kernels import cpu
from model.kernels.dispatch import Kernels
from model.linear import all_live


def gated(gate_up: Array, live: Array | None, activation: str, dtype: jnp.dtype, kernels: Kernels) -> Array:
    """activation(gate) * up of gate_up [M, 2 F] float32, gate first: [M, F], rounded to dtype; `live` as in Linear."""
    live = all_live(gate_up) if live is None else live
    on_cpu, xla = {
        "silu": (cpu.swiglu, swiglu_in_xla),
        "gelu": (cpu.geglu, geglu_in_xla),
        "clamped_silu": (cpu.clamped_swiglu, clamped_swiglu_in_xla),
    }[activation]
    y: Array = kernels.dispatch(gate_up, live, on_cpu=partial(on_cpu, dtype=dtype), xla=partial(xla, dtype=dtype))
    return y


def swiglu_in_xla(gate_up: Array, _live: Array, *, dtype: DTypeLike) -> Array:
    """silu(gate) * up on any platform; results of rows from `live` on are undefined."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def geglu_in_xla(gate_up: Array, _live: Array, *, dtype: DTypeLike) -> Array:
    """gelu(gate) * up on any platform, gelu by its tanh approximation; as `swiglu_in_xla`.

    (1 + tanh(u)) / 2 is written as sigmoid(2 u), which is accurate where it is small.
    """
    gate, up = jnp.split(gate_up, 2, axis=-1)
    share = jax.nn.sigmoid(jnp.float32(2 * math.sqrt(2 / math.pi)) * (gate + jnp.float32(0.044715) * gate**3))
    return (gate * share * up).astype(dtype)


def clamped_swiglu_in_xla(gate_up: Array, _live: Array, *, dtype: DTypeLike) -> Array:
    """gate * sigmoid(1.702 gate) * (up + 1) on any platform, of gate up to 7 and up from -7 to 7; as `swiglu_in_xla`.

    The activation of gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", and its published code).
    """
    gate, up = jnp.split(gate_up, 2, axis=-1)
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (gate * jax.nn.sigmoid(jnp.float32(1.702) * gate) * (up + 1)).astype(dtype)


def relu2(x: Array, _coefficients: Array | None) -> Array:
    """max(x, 0)^2 (So et al. 2021)."""
    return jnp.square(jnp.maximum(x, 0.0))


def xielu(x: Array, coefficients: Array | None) -> Array:
    """xIELU (Huang and Schlag 2024) with coefficients [4]: alpha_p and alpha_n before softplus, beta, epsilon."""
    assert coefficients is not None
    alphas, beta, epsilon = jax.nn.softplus(coefficients[:2]), coefficients[2], coefficients[3]
    negative = (jnp.expm1(jnp.minimum(x, epsilon)) - x) * (beta + alphas[1])
    return jnp.where(x > 0, alphas[0] * x * x, negative) + beta * x


# Activations of MLPs without a gate.
UNGATED: Mapping[str, Callable[[Array, Array | None], Array]] = MappingProxyType({"relu2": relu2, "xielu": xielu})


def soft_cap(x: Array, live: Array | None, cap: float, kernels: Kernels) -> Array:
    """cap * tanh(x / cap) of x [M, N] float32, or x if cap is 0; `live` as in Linear."""
    if not cap:
        return x
    live = all_live(x) if live is None else live
    y: Array = kernels.dispatch(x, live, on_cpu=partial(cpu.soft_cap, cap=cap), xla=partial(soft_cap_in_xla, cap=cap))
    return y


def soft_cap_in_xla(x: Array, _live: Array, *, cap: float) -> Array:
    """`soft_cap` on any platform."""
    return jnp.float32(cap) * jnp.tanh(x / jnp.float32(cap))
