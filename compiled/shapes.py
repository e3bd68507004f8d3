"""The fixed shapes that programs are compiled for, and the buckets they come from."""

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
        """What logs, HLO modules and the notebook call it."""
        return f"decode_{self.rows}" if self.chunk == 1 else f"prefill_{self.chunk}"


@dataclass(frozen=True, order=True, slots=True)
class HeadShape:
    """Shape of a head step, over hidden states that are already in the cache."""

    rows: int  # M
    whole: bool  # gives the log-prob of every token, else the numbers of given ones

    @property
    def name(self) -> str:
        """What logs, HLO modules and the notebook call it."""
        return f"vocabulary_{self.rows}" if self.whole else f"score_{self.rows}"


@dataclass(frozen=True, order=True, slots=True)
class SlotShape:
    """Shape of the step that fills one of Z slots."""

    slots: int  # Z

    @property
    def name(self) -> str:
        """What logs, HLO modules and the notebook call it."""
        return "adjust"


@dataclass(frozen=True, order=True, slots=True)
class StateShape:
    """Shape of the step that makes a fresh DeviceState."""

    pages: int  # N
    slots: int  # Z

    @property
    def name(self) -> str:
        """What logs, HLO modules and the notebook call it."""
        return "zero_state"


@dataclass(frozen=True, slots=True)
class Buckets:
    """All sizes that one server compiles. Ascending tuples; a size is padded up to the next bucket."""

    decode_rows: tuple[int, ...]
    prefill_chunks: tuple[int, ...]
    score_rows: int
    pages_per_row: int
    vocabulary_rows: int = 0  # prompt rows whose whole distribution leaves the device at once; 0 = never

    @property
    def slots(self) -> int:
        """Z: a slot for each row of the largest decode step, and padding's."""
        return self.decode_rows[-1] + 1

    def decode(self, rows: int) -> StepShape:
        """The shape for `rows` live rows."""
        return StepShape(bucket(self.decode_rows, rows), 1, self.pages_per_row)

    def prefill(self, tokens: int) -> StepShape:
        """The shape for a chunk of `tokens`."""
        return StepShape(1, bucket(self.prefill_chunks, tokens), self.pages_per_row)

    def steps(self) -> tuple[StepShape, ...]:
        """Every forward shape."""
        decode = tuple(StepShape(rows, 1, self.pages_per_row) for rows in self.decode_rows)
        return (*decode, *(StepShape(1, chunk, self.pages_per_row) for chunk in self.prefill_chunks))

    def heads(self) -> tuple[HeadShape, ...]:
        """Every head shape: blocks of prompt rows."""
        score = HeadShape(self.score_rows, whole=False)
        return (score, HeadShape(self.vocabulary_rows, whole=True)) if self.vocabulary_rows else (score,)


def bucket(sizes: Sequence[int], size: int) -> int:
    """The smallest of the ascending `sizes` that holds `size`.

    Raises:
        ValueError: none does.
    """
    at = bisect_left(sizes, size)
    if size < 1 or at == len(sizes):
        raise ValueError(f"no bucket of {tuple(sizes)} holds {size}")
    return sizes[at]


def make_buckets(
    *, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, whole_vocabulary: bool = False
) -> Buckets:
    """Buckets of a server.

    Args:
        max_num_seqs: requests that run at once; decode rows go in powers of two up to it.
        max_model_len: tokens of a request; it gives the width of the block tables.
        max_num_batched_tokens: prompt and decode tokens of one step together; the largest prefill chunk is the
            largest of 16, 32, 64 ... that leaves room for a decode row of every other request.
        whole_vocabulary: whether prompt rows may be asked for whole.
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
        vocabulary_rows=8 if whole_vocabulary else 0,
    )
