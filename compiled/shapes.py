"""StepShape: the fixed shapes that programs are compiled for, and the buckets they come from."""

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
    samples: bool  # chooses a token for each row, else scores the given one

    @property
    def name(self) -> str:
        """What logs, HLO modules and the notebook call it."""
        return f"sample_{self.rows}" if self.samples else f"score_{self.rows}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """All sizes that one server compiles. Ascending tuples; a size is padded up to the next bucket."""

    decode_rows: tuple[int, ...]
    prefill_chunks: tuple[int, ...]
    score_rows: int
    pages_per_row: int

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
        """Every head shape: the first token after a prefill, and blocks of prompt rows."""
        return (HeadShape(1, samples=True), HeadShape(self.score_rows, samples=False))


def bucket(sizes: Sequence[int], size: int) -> int:
    """The smallest of the ascending `sizes` that holds `size`.

    Raises:
        ValueError: none does.
    """
    at = bisect_left(sizes, size)
    if size < 1 or at == len(sizes):
        raise ValueError(f"no bucket of {tuple(sizes)} holds {size}")
    return sizes[at]


def make_buckets(*, max_num_seqs: int, max_model_len: int) -> Buckets:
    """Buckets of a server: decode rows in powers of two up to `max_num_seqs`, three prefill chunks."""
    rows = [1]
    while rows[-1] < max_num_seqs:
        rows.append(min(2 * rows[-1], max_num_seqs))
    return Buckets(
        decode_rows=tuple(rows),
        prefill_chunks=(16, 64, 256),
        score_rows=64,
        pages_per_row=-(-max_model_len // PAGE_SIZE),
    )
