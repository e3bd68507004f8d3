"""TokenLogprobs: the log-probs, ranks and alternatives of a run of tokens, from the kernels to the API."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

type Array = Any  # jax.Array on a device, numpy.ndarray on the host

NO_ID = int(np.iinfo(np.int32).max)  # pads a row of requested ids


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Columns with one row per token: its log-prob and rank, those of the top K and of requested ids.

    Taken from the raw distribution (temperature 1, nothing masked) unless a decode row asks for the one that its token
    was drawn from (`SamplingArrays.processed`).
    """

    logprob: Array  # [R] float32, natural log
    rank: Array  # [R] int32, 1 = most likely, unique: ties go to the lower id
    top_ids: Array  # [R, K] int32, best first, ties by ascending id
    top_logprobs: Array  # [R, K] float32
    requested_logprobs: Array = None  # [R, B] float32; undefined for NO_ID
    requested_ranks: Array = None  # [R, B] int32
