"""What goes into a step, what stays on the device, what comes out. Leaves are device arrays or numpy arrays alike."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from model.kv_cache import PagedCache

type Array = Any  # jax.Array inside a program, numpy.ndarray outside

MAX_BANNED = 16  # B: ids that a row may be forbidden to choose


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DeviceState:
    """What one step hands to the next; donated to every forward step, so exactly one owner may hold it."""

    cache: PagedCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepInput:
    """One forward step. Padding has position -1."""

    tokens: Array  # [R, T] int32
    positions: Array  # [R, T] int32
    tables: Array  # [R, P] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """How each row chooses its token."""

    temperature: Array  # [R] float32, 0 = greedy
    top_k: Array  # [R] int32, 0 = off
    top_p: Array  # [R] float32, 1 = off
    min_p: Array  # [R] float32, 0 = off
    seed: Array  # [R, 2] uint32
    step: Array  # [R] uint32 tokens the row has chosen before this one
    banned: Array  # [R, B] int32 ids that may not be chosen; V or above = none


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The product: numbers of one token per row, from the raw model distribution (temperature 1, nothing masked)."""

    logprob: Array  # [R] float32, natural log
    rank: Array  # [R] int32, 1 = most likely, unique: ties go to the lower id
    top_ids: Array  # [R, K] int32, best first
    top_logprobs: Array  # [R, K] float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepOutput:
    """Chosen tokens and their numbers; the only arrays that leave the device."""

    tokens: Array  # [R] int32
    logprobs: TokenLogprobs


def greedy_sampling(rows: int) -> SamplingArrays:
    """Sampling arrays (numpy) of `rows` greedy rows, to be filled in."""
    return SamplingArrays(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros((rows, 2), np.uint32),
        step=np.zeros(rows, np.uint32),
        banned=np.full((rows, MAX_BANNED), np.iinfo(np.int32).max, np.int32),
    )
