"""The fixed shapes that programs are compiled for, and the buckets they come from. `name` is used in logs and HLO."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from model.kv_cache import PAGE_SIZE


@dataclass(frozen=True, order=True, slots=True)
class StepShape:
    """Shape of a forward step: decode is (R, 1, P), prefill is (1, T, P)."""

    rows: int  # R
    chunk: int  # T
    pages: int  # P, width of the block tables

    @property
    def name(self) -> str:
        return f"decode_{self.rows}" if self.chunk == 1 else f"prefill_{self.chunk}"


@dataclass(frozen=True, order=True, slots=True)
class HeadShape:
    """Shape of a head step, over hidden states in the cache."""

    rows: int  # M
    full_vocab: bool  # returns the log-probs of the full vocabulary, else those of given tokens

    @property
    def name(self) -> str:
        return f"full_vocab_{self.rows}" if self.full_vocab else f"score_{self.rows}"


@dataclass(frozen=True, order=True, slots=True)
class SingleShape:
    """Shape of a step that a server compiles for one shape only."""

    name: str


PENALTIES = SingleShape("penalties")  # sets the penalties of one slot
ZERO_STATE = SingleShape("zero_state")  # creates an empty DeviceState


@dataclass(frozen=True, slots=True)
class Buckets:
    """All sizes that one server compiles, ascending; a size is padded up to the next bucket."""

    decode_rows: tuple[int, ...]
    prefill_chunks: tuple[int, ...]
    score_rows: int
    pages_per_row: int
    full_vocab_rows: int = 0  # prompt rows per call that returns full distributions; 0 = no such program

    @property
    def slots(self) -> int:
        """Z: one slot per row of the largest decode step, and one for padding."""
        return self.decode_rows[-1] + 1

    def decode(self, rows: int) -> StepShape:
        return StepShape(bucket(self.decode_rows, rows), 1, self.pages_per_row)

    def prefill(self, tokens: int) -> StepShape:
        return StepShape(1, bucket(self.prefill_chunks, tokens), self.pages_per_row)

    def steps(self) -> tuple[StepShape, ...]:
        return (*map(self.decode, self.decode_rows), *map(self.prefill, self.prefill_chunks))

    def heads(self) -> tuple[HeadShape, ...]:
        score = HeadShape(self.score_rows, full_vocab=False)
        return (score, HeadShape(self.full_vocab_rows, full_vocab=True)) if self.full_vocab_rows else (score,)


def bucket(sizes: Sequence[int], size: int) -> int:
    """The smallest of the ascending `sizes` that is at least `size`.

    Raises:
        ValueError: `size` is above the largest, or below 1.
    """
    index = bisect_left(sizes, size)
    if size < 1 or index == len(sizes):
        raise ValueError(f"no bucket of {tuple(sizes)} holds {size}")
    return sizes[index]


def make_buckets(
    *, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, full_vocab: bool = False
) -> Buckets:
    """Buckets of a server.

    Args:
        max_num_seqs: requests that run at once; decode rows are the powers of two up to it.
        max_model_len: tokens of a request, which set the width of the block tables.
        max_num_batched_tokens: prompt and decode tokens of one step together; the largest prefill chunk is the
            largest of 16, 32, 64 ... that leaves room for a decode row of every other request.
        full_vocab: whether requests may ask for the full distribution of prompt rows.
    """
    rows = [1]
    while rows[-1] < max_num_seqs:
        rows.append(min(2 * rows[-1], max_num_seqs))
    chunks = [16]
    while chunks[-1] * 2 <= max_num_batched_tokens - max_num_seqs:
        chunks.append(chunks[-1] * 2)
    return Buckets(
        decode_rows=tuple(rows),
        prefill_chunks=tuple(chunks),
        score_rows=64,
        pages_per_row=-(-max_model_len // PAGE_SIZE),
        full_vocab_rows=8 if full_vocab else 0,
    )
