"""What goes into a step, what stays on the device, what comes out. Leaves are device arrays or numpy arrays alike."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from model.kv_cache import PagedCache
from model.token_logprobs import NO_ID, Array, TokenLogprobs

MAX_REQUESTED_IDS = 128  # B: ids whose numbers a row may ask for beside its top-k
FROM_SLOT = -1  # as a decode row's token: the one that its slot chose last, which the host may not have read yet


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SlotState:
    """What the device keeps of every running request. Z slots; the last one is nobody's: padding writes there."""

    tokens: Array  # [Z] int32 chosen last
    bias: Array  # [Z, V] float32 added to the logits before a choice
    counts: Array  # [Z, V] int32 how often the request has chosen each token
    seen: Array  # [Z, V] bool whether the token is in its prompt


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DeviceState:
    """What one step hands to the next; donated to every step that writes, so exactly one owner may hold it."""

    cache: PagedCache
    slots: SlotState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepInput:
    """A chunk of one row's tokens, to be prefilled. Padding has position -1."""

    tokens: Array  # [1, T] int32
    positions: Array  # [1, T] int32
    tables: Array  # [1, P] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DecodeInput:
    """One token of every row. Padding has position -1 and the last slot."""

    tokens: Array  # [R] int32, or FROM_SLOT
    positions: Array  # [R] int32
    tables: Array  # [R, P] int32
    slots: Array  # [R] int32 the row's place in SlotState
    requested_ids: Array  # [R, B] int32 ids to be scored beside the top-k, then NO_ID


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ScoreInput:
    """Tokens of prompts whose numbers are asked for."""

    places: Array  # [M] int32 where the hidden state before the token lies (page * S + offset), 0 for padding
    targets: Array  # [M] int32 the token
    requested_ids: Array  # [M, B] int32 as in DecodeInput


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
    adjusted: Array  # [R] bool whether the slot's bias and counts, and the penalties below, apply
    presence: Array  # [R] float32 taken from the logits of tokens chosen before, 0 = off
    frequency: Array  # [R] float32 the same times how often, 0 = off
    repetition: Array  # [R] float32 divides positive and multiplies negative logits of tokens seen or chosen, 1 = off
    processed: Array  # [R] bool whether the numbers told are those of what is drawn from, not the raw ones
    mask: Array  # [R, W] uint32, W = ceil(V / 32): bit i of word w is set if token 32 w + i may be chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Adjustment:
    """What a request brings into its slot, where its choice is adjusted."""

    bias: Array  # [V] float32
    counts: Array  # [V] int32
    seen: Array  # [V] bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepOutput:
    """Chosen tokens and their numbers; the only arrays that leave the device."""

    tokens: Array  # [R] int32
    logprobs: TokenLogprobs


def mask_words(vocab_size: int) -> int:
    """W: 32-bit words that hold a bit for every token."""
    return -(-vocab_size // 32)


def greedy_sampling(rows: int, vocab_size: int) -> SamplingArrays:
    """Sampling arrays (numpy) of `rows` greedy rows that may choose any token, to be filled in."""
    return SamplingArrays(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros((rows, 2), np.uint32),
        step=np.zeros(rows, np.uint32),
        adjusted=np.zeros(rows, np.bool_),
        presence=np.zeros(rows, np.float32),
        frequency=np.zeros(rows, np.float32),
        repetition=np.ones(rows, np.float32),
        processed=np.zeros(rows, np.bool_),
        mask=np.full((rows, mask_words(vocab_size)), 0xFFFFFFFF, np.uint32),
    )


def no_requested_ids(rows: int) -> Any:
    """requested_ids [rows, B] (numpy) that ask for nothing, to be filled in."""
    return np.full((rows, MAX_REQUESTED_IDS), NO_ID, np.int32)
