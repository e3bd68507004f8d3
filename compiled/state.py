"""Inputs and outputs of the steps, and the state that stays on the device. Leaves are jax or numpy arrays."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from model.kv_cache import PagedCache
from model.token_logprobs import NO_ID, Array, TokenLogprobs

MAX_REQUESTED_IDS = 128  # B: ids per row whose log-probs a request may ask for, besides its top k
PAGE_COPIES = 16  # C: pages that one call copies, or whose experts it returns
FROM_SLOT = -1  # token of a decode row: the last one chosen in its slot, which the host may not have read yet


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SlotState:
    """State of every running request. Z slots; the last one belongs to no request: padding writes there."""

    tokens: Array  # [Z] int32 last chosen token
    bias: Array  # [Z, V] float32 added to the logits before sampling
    counts: Array  # [Z, V] int32 how often each token was chosen
    seen: Array  # [Z, V] bool whether the token is in the prompt


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DeviceState:
    """State passed from step to step; donated to every step that writes, so it has exactly one owner."""

    cache: PagedCache
    slots: SlotState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepInput:
    """Prompt tokens to prefill. Rows may be of one request, and use pages that earlier rows fill in the same step.

    Padding has position -1 and stands at the end of a row or in the last rows.
    """

    tokens: Array  # [R, T] int32
    positions: Array  # [R, T] int32
    tables: Array  # [R, P] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PageCopies:
    """Pages to copy, in order. Padding is last and has the null page."""

    sources: Array  # [C] int32
    targets: Array  # [C] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DecodeInput:
    """One token of every row. Padding has position -1 and the last slot."""

    tokens: Array  # [R] int32, or FROM_SLOT
    positions: Array  # [R] int32
    tables: Array  # [R, P] int32
    slots: Array  # [R] int32 the row's slot in SlotState
    requested_ids: Array  # [R, B] int32, padded with NO_ID


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ScoreInput:
    """Prompt tokens to score."""

    cache_indices: Array  # [M] int32 `cache_index` of the hidden state before the token, 0 for padding
    targets: Array  # [M] int32 the token
    requested_ids: Array  # [M, B] int32 as in DecodeInput


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """Sampling parameters of each row."""

    temperature: Array  # [R] float32, 0 = greedy
    top_k: Array  # [R] int32, 0 = off
    top_p: Array  # [R] float32, 1 = off
    min_p: Array  # [R] float32, 0 = off
    seed: Array  # [R, 2] uint32
    step: Array  # [R] uint32 tokens chosen before this one
    penalized: Array  # [R] bool whether the slot's bias and counts, and the penalties below, apply
    presence_penalty: Array  # [R] float32 subtracted from logits of tokens chosen before, 0 = off
    frequency_penalty: Array  # [R] float32 subtracted for each time a token was chosen, 0 = off
    repetition_penalty: Array  # [R] float32 divides logits > 0, multiplies others, of tokens seen or chosen, 1 = off
    processed: Array  # [R] bool whether log-probs are of the distribution sampled from, not of the raw one
    return_processed: Array  # [R] bool whether those of the distribution sampled from are returned, too
    mask: Array  # [R, W] uint32, W = ceil(V / 32): bit i of word w is set if token 32 w + i is allowed


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SlotPenalties:
    """Initial bias, counts and seen tokens of a request's slot."""

    bias: Array  # [V] float32
    counts: Array  # [V] int32
    seen: Array  # [V] bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepOutput:
    """Chosen tokens and their log-probs; the only arrays that leave the device."""

    tokens: Array  # [R] int32
    logprobs: TokenLogprobs
    processed: TokenLogprobs  # of the distribution sampled from; undefined for rows that do not ask for them
    allowed_logmass: Array  # [R] float32 log of the raw probability of the tokens that the mask allows, 0 if all are
    experts: Array = None  # [R, L, k] of the token before each, as in PagedCache; None for a model without experts


def mask_words(vocab_size: int) -> int:
    """W: number of 32-bit words with one bit per token."""
    return -(-vocab_size // 32)


def greedy_sampling(rows: int, vocab_size: int) -> SamplingArrays:
    """Sampling arrays (numpy) of `rows` greedy rows that may choose any token, to be modified."""
    return SamplingArrays(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros((rows, 2), np.uint32),
        step=np.zeros(rows, np.uint32),
        penalized=np.zeros(rows, np.bool_),
        presence_penalty=np.zeros(rows, np.float32),
        frequency_penalty=np.zeros(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        processed=np.zeros(rows, np.bool_),
        return_processed=np.zeros(rows, np.bool_),
        mask=np.full((rows, mask_words(vocab_size)), 0xFFFFFFFF, np.uint32),
    )


def no_requested_ids(rows: int) -> Any:
    """requested_ids [rows, B] (numpy) of rows without requested ids, to be modified."""
    return np.full((rows, MAX_REQUESTED_IDS), NO_ID, np.int32)
