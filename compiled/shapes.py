"""The fixed shapes that programs are compiled for, and the buckets they come from. `name` is used in logs and HLO."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from model.kv_cache import PAGE_SIZE


@dataclass(frozen=True, order=True, slots=True)
class DecodeShape:
    """Shape of a decode step: one token of each row."""

    rows: int  # R
    pages: int  # P, width of the block tables

    @property
    def name(self) -> str:
        return f"decode_{self.rows}"


@dataclass(frozen=True, order=True, slots=True)
class PrefillShape:
    """Shape of a prefill step: R rows of T tokens, each with its block table."""

    rows: int  # R
    tokens: int  # T
    pages: int  # P

    @property
    def name(self) -> str:
        return f"{'prefill' if 1 in (self.rows, self.tokens) else 'packed'}_{self.rows * self.tokens}"


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
COPY_PAGES = SingleShape("copy_pages")  # copies pages of the cache
READ_EXPERTS = SingleShape("read_experts")  # returns the experts of cached tokens; of models with experts


@dataclass(frozen=True, slots=True)
class Buckets:
    """All sizes that one server compiles, ascending; a size is padded up to the next bucket.

    Several prompt chunks are packed into the rows of one prefill: a chunk fills rows of `segment` tokens. With segments
    of one token a single chunk is packed, too; otherwise it is one row, which kernels of a GPU or TPU run faster.
    """

    decode_rows: tuple[int, ...]
    prefill_chunks: tuple[int, ...]  # tokens of a prefill, all chunks and padding together
    score_rows: int
    pages_per_row: int
    full_vocab_rows: int = 0  # prompt rows per call that returns full distributions; 0 = no such program
    segment: int = 16  # divides the prefill chunks

    @property
    def slots(self) -> int:
        """Z: one slot per row of the largest decode step, and one for padding."""
        return self.decode_rows[-1] + 1

    def decode(self, rows: int) -> DecodeShape:
        return DecodeShape(bucket(self.decode_rows, rows), self.pages_per_row)

    def prefill(self, *lengths: int) -> PrefillShape:
        """The shape for prompt chunks of these lengths."""
        if len(lengths) == 1 and self.segment > 1:
            return PrefillShape(1, bucket(self.prefill_chunks, lengths[0]), self.pages_per_row)
        rows = bucket(self._packed_tokens, sum(map(self.padded, lengths))) // self.segment
        return PrefillShape(rows, self.segment, self.pages_per_row)

    def padded(self, tokens: int) -> int:
        """Length of a packed chunk: whole segments."""
        return -(-tokens // self.segment) * self.segment

    def steps(self) -> tuple[DecodeShape | PrefillShape, ...]:
        pages = self.pages_per_row
        packed = (PrefillShape(size // self.segment, self.segment, pages) for size in self._packed_tokens)
        single = (PrefillShape(1, size, pages) for size in self.prefill_chunks if self.segment > 1)
        return (*map(self.decode, self.decode_rows), *single, *packed)

    @property
    def _packed_tokens(self) -> tuple[int, ...]:
        """Sizes of packed prefills; beside those of single chunks every second one, the largest included."""
        if self.segment == 1:
            return self.prefill_chunks
        return tuple(size for size in self.prefill_chunks[::-2][::-1] if size > self.segment)

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
    *, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, full_vocab: bool = False, segment: int = 16
) -> Buckets:
    """Buckets of a server.

    Args:
        max_num_seqs: requests that run at once; decode rows are the powers of two up to it.
        max_model_len: tokens of a request, which set the width of the block tables.
        max_num_batched_tokens: prompt and decode tokens of one step together; the largest prefill chunk is the
            largest of 16, 32, 64 ... that leaves room for a decode row of every other request.
        full_vocab: whether requests may ask for the full distribution of prompt rows.
        segment: tokens of a row of a packed prefill.
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
        segment=segment,
    )
