"""Buckets: every size gets the smallest shape that holds it, and there are no other shapes."""

import pytest

from compiled.programs import Shape
from compiled.shapes import PENALTIES, Buckets, DecodeShape, HeadShape, PrefillShape, bucket, make_buckets
from model.kv_cache import PAGE_SIZE


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 16)), (6, (1, 2, 4, 6))]
)
def test_decode_rows_are_powers_of_two_and_the_limit(max_num_seqs: int, expected: tuple[int, ...]) -> None:
    buckets = make_buckets(max_num_seqs=max_num_seqs, max_model_len=64, max_num_batched_tokens=64)
    assert buckets.decode_rows == expected
    assert buckets.slots == max_num_seqs + 1


@pytest.mark.parametrize(("max_model_len", "pages"), [(1, 1), (64, 1), (65, 2), (2048, 32)])
def test_pages_per_row_hold_the_longest_request(max_model_len: int, pages: int) -> None:
    buckets = make_buckets(max_num_seqs=1, max_model_len=max_model_len, max_num_batched_tokens=64)
    assert buckets.pages_per_row == pages
    assert pages * PAGE_SIZE >= max_model_len


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "expected"),
    [(20, (16,)), (35, (16,)), (36, (16, 32)), (260, (16, 32, 64, 128, 256)), (600, (16, 32, 64, 128, 256, 512))],
)
def test_prefill_chunks_leave_room_for_decode_rows(max_num_batched_tokens: int, expected: tuple[int, ...]) -> None:
    buckets = make_buckets(max_num_seqs=4, max_model_len=64, max_num_batched_tokens=max_num_batched_tokens)
    assert buckets.prefill_chunks == expected


def test_bucket_rounds_up() -> None:
    assert [bucket((1, 2, 4), size) for size in (1, 2, 3, 4)] == [1, 2, 4, 4]


@pytest.mark.parametrize("size", [-1, 0, 5])
def test_bucket_rejects_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"no bucket of \(1, 2, 4\) holds {size}"):
        bucket((1, 2, 4), size)


@pytest.mark.parametrize("segment", [1, 16])
def test_steps_contain_every_shape_in_use(segment: int) -> None:
    buckets = make_buckets(max_num_seqs=6, max_model_len=300, max_num_batched_tokens=256, segment=segment)
    largest = buckets.prefill_chunks[-1]
    used: set[Shape] = {buckets.decode(rows) for rows in range(1, 7)}
    used |= {buckets.prefill(tokens) for tokens in range(1, largest + 1)}
    used |= {buckets.prefill(tokens, 1) for tokens in range(1, largest - segment + 1)}
    assert used == set(buckets.steps())
    assert len(buckets.steps()) == len(used)


def test_several_chunks_are_packed_in_segments() -> None:
    buckets = Buckets(decode_rows=(1,), prefill_chunks=(16, 32, 64, 128, 256), score_rows=8, pages_per_row=3)
    assert buckets.prefill(1, 16) == PrefillShape(4, 16, 3)
    assert buckets.prefill(17, 17, 1) == PrefillShape(16, 16, 3)
    assert buckets.prefill(17, 17, 1).name == "packed_256"
    with pytest.raises(ValueError, match="no bucket"):
        buckets.prefill(241, 1, 1)


def test_segments_of_one_token_have_no_padding() -> None:
    buckets = Buckets(decode_rows=(1,), prefill_chunks=(16, 32), score_rows=8, pages_per_row=3, segment=1)
    assert buckets.prefill(3, 13) == buckets.prefill(16) == PrefillShape(16, 1, 3)
    assert buckets.prefill(3, 13).name == "prefill_16"


def test_shapes_have_names() -> None:
    buckets = Buckets(decode_rows=(1, 2), prefill_chunks=(16,), score_rows=8, pages_per_row=3)
    assert buckets.steps() == (DecodeShape(1, 3), DecodeShape(2, 3), PrefillShape(1, 16, 3))
    assert buckets.heads() == (HeadShape(8, full_vocab=False),)
    names = [step.name for step in buckets.steps()] + [head.name for head in buckets.heads()]
    assert names == ["decode_1", "decode_2", "prefill_16", "score_8"]
    assert PENALTIES.name == "penalties"


def test_heads_include_full_vocab_only_on_request() -> None:
    for full_vocab in (False, True):
        buckets = make_buckets(max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64, full_vocab=full_vocab)
        assert [head.name for head in buckets.heads()] == ["score_64", "full_vocab_8"][: 1 + full_vocab]
