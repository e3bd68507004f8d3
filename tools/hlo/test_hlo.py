"""Counts of hand-written HLO, and the structure of the compiled programs of a tiny model."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import jax.numpy as jnp
import pytest

from compiled.programs import compile_plans
from compiled.runner import make_plans, state_shapes
from compiled.shapes import Buckets
from compiled.state import MAX_REQUESTED_IDS
from model.config_hf import config_from_hf
from model.kernels.dispatch import Kernels, load_kernels
from model.transformer import abstract_weights, bind
from tests.support.tiny import tiny_configs
from tools.hlo import operations
from tools.hlo.operations import Operation, Totals
from tools.hlo.parse import without_metadata

TEXT = """HloModule jit_toy, is_scheduled=true, input_output_alias={ {1}: (2, {}, may-alias) }, entry_computation_layout={}

%adds (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%takes_a_row (table: bf16[100,64], id: s32[1]) -> f32[1,64] {
  %id = s32[1]{0} parameter(1)
  %table = bf16[100,64]{1,0} parameter(0)
  %gather.1 = bf16[1,64]{1,0} gather(%table, %id), offset_dims={1}, slice_sizes={1,64}
  ROOT %convert.1 = f32[1,64]{1,0} convert(%gather.1), metadata={op_name="jit(toy)/gather"}
}

%writes_a_row (cache: f32[50,64], row: f32[1,64], at: s32[]) -> f32[50,64] {
  %cache = f32[50,64]{1,0} parameter(0)
  %row = f32[1,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dynamic-update-slice.1 = f32[50,64]{1,0} dynamic-update-slice(%cache, %row, %at, %zero)
}

%multiplies (x: f32[4,64], w: f32[10,64]) -> f32[4,10] {
  %x.1 = f32[4,64]{1,0} parameter(0)
  %w.1 = f32[10,64]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,10]{1,0} dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (carry: (s32[], f32[4,64], f32[10,64])) -> (s32[], f32[4,64], f32[10,64]) {
  %carry = (s32[], f32[4,64]{1,0}, /*index=2*/f32[10,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[4,64]{1,0} get-tuple-element(%carry), index=1
  %w = f32[10,64]{1,0} get-tuple-element(%carry), index=2
  %copy.1 = f32[4,64]{1,0} copy(%x)
  %fusion.3 = f32[4,10]{1,0} fusion(%x, %w), kind=kLoop, calls=%multiplies, metadata={op_name="jit(toy)/layer_0/attention/while/body/dot_general" stack_frame_id=3}
  ROOT %tuple.1 = (s32[], f32[4,64]{1,0}, f32[10,64]{1,0}) tuple(%i, %copy.1, %w)
}

%condition (carry.1: (s32[], f32[4,64], f32[10,64])) -> pred[] {
  %carry.1 = (s32[], f32[4,64]{1,0}, f32[10,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %three), direction=LT
}

%branch (y: f32[4,16]) -> f32[4,16] {
  %y.1 = f32[4,16]{1,0} parameter(0)
  ROOT %negate.1 = f32[4,16]{1,0} negate(%y.1), metadata={op_name="jit(toy)/sample/cond/branch_0_fun/neg"}
}

%compares (z: f32[4,16], own: f32[4,1]) -> s32[4,16] {
  %z = f32[4,16]{1,0} parameter(0)
  %own = f32[4,16]{1,0} parameter(1)
  %gt = pred[4,16]{1,0} compare(%z, %own), direction=GT, metadata={op_name="jit(toy)/logprobs/rank/gt" stack_frame_id=7}
  ROOT %ahead = s32[4,16]{1,0} convert(%gt)
}

ENTRY %main (table.1: bf16[100,64], id.1: s32[1], cache.1: f32[50,64]) -> (f32[4,16], f32[50,64]) {
  %table.1 = bf16[100,64]{1,0} parameter(0), metadata={op_name="arguments[0]"}
  %id.1 = s32[1]{0} parameter(1)
  %cache.1 = f32[50,64]{1,0} parameter(2)
  %number = s32[] constant(0)
  %fusion.1 = f32[1,64]{1,0} fusion(%table.1, %id.1), kind=kLoop, calls=%takes_a_row, metadata={op_name="jit(toy)/gather"}
  %fusion.2 = f32[50,64]{1,0} fusion(%cache.1, %fusion.1, %number), kind=kLoop, calls=%writes_a_row, metadata={op_name="jit(toy)/layer_0/attention/scatter"}
  %x.2 = f32[4,64]{1,0} broadcast(%number), dimensions={}, metadata={op_name="jit(toy)/layer_0/attention/broadcast"}
  %w.2 = f32[10,64]{1,0} slice(%fusion.2), slice={[0:10], [0:64]}, metadata={op_name="jit(toy)/layer_0/mlp/slice"}
  %tuple.2 = (s32[], f32[4,64]{1,0}, f32[10,64]{1,0}) tuple(%number, %x.2, %w.2)
  %while.1 = (s32[], f32[4,64]{1,0}, f32[10,64]{1,0}) while(%tuple.2), condition=%condition, body=%body, metadata={op_name="jit(toy)/layer_0/attention/while"}
  %x.3 = f32[4,64]{1,0} get-tuple-element(%while.1), index=1
  %packed = u32[1,2,16,32]{3,2,1,0} broadcast(%number), dimensions={}
  %scales = u16[1,0,32]{2,1,0} constant({})
  %q = f32[4,1,6,8]{3,2,1,0} broadcast(%number), dimensions={}
  %pages = bf16[50,2,64,8]{3,2,1,0} broadcast(%number), dimensions={}
  %tables = s32[4,5]{1,0} broadcast(%number), dimensions={}
  %at.1 = s32[4,1]{1,0} broadcast(%number), dimensions={}
  %ffi_call.2 = f32[4,1,48]{2,1,0} custom-call(%q, %pages, %pages, %tables, %at.1), custom_call_target="logprobd_attention", api_version=API_VERSION_TYPED_FFI, metadata={op_name="jit(toy)/layer_0/attention/ffi_call"}, backend_config={window = 0 : i64}
  %heads = f32[4,1,10,8]{3,2,1,0} broadcast(%number), dimensions={}
  %cos = f32[4,1,1,4]{3,2,1,0} broadcast(%number), dimensions={}
  %ffi_call.3 = (f32[4,1,6,8]{3,2,1,0}, bf16[50,2,64,8]{3,2,1,0}, bf16[50,2,64,8]{3,2,1,0}) custom-call(%heads, %cos, %cos, %pages, %pages, %tables, %at.1), custom_call_target="logprobd_rotate", output_to_operand_aliasing={{1}: (3, {}), {2}: (4, {})}, api_version=API_VERSION_TYPED_FFI, metadata={op_name="jit(toy)/layer_0/attention/ffi_call"}, backend_config={}
  %bf = bf16[4,64]{1,0} convert(%x.3), metadata={op_name="jit(toy)/head/convert_element_type"}
  %ffi_call.1 = f32[4,16]{1,0} custom-call(%bf, %packed, %scales, %number), custom_call_target="logprobd_linear", api_version=API_VERSION_TYPED_FFI, metadata={op_name="jit(toy)/head/ffi_call"}, backend_config={format = "BF16"}
  %conditional.1 = f32[4,16]{1,0} conditional(%number, %ffi_call.1, %ffi_call.1), branch_computations={%branch, %branch}, metadata={op_name="jit(toy)/sample/cond"}
  %fusion.4 = s32[4,16]{1,0} fusion(%conditional.1, %ffi_call.1), kind=kLoop, calls=%compares, metadata={op_name="jit(toy)/logprobs/rank/convert_element_type"}
  %reduce.1 = s32[4]{0} reduce(%fusion.4, %number), dimensions={1}, to_apply=%adds
  ROOT %result = (f32[4,16]{1,0}, f32[50,64]{1,0}) tuple(%conditional.1, %fusion.2)
}
"""  # noqa: E501

# Counted by hand; float32 and int32 have 4 bytes, bfloat16 2.
EXPECTED = [
    Operation("fusion.1", "fusion", "f32[1,64]", 64 * 2 + 4 + 64 * 4, 0, "other"),  # one row of the table, not 100
    Operation("fusion.2", "fusion", "f32[50,64]", 2 * 64 * 4 + 4, 0, "attention", 0),  # a row read, a row written
    Operation("x.2", "broadcast", "f32[4,64]", 4 + 4 * 64 * 4, 0, "attention", 0),
    Operation("w.2", "slice", "f32[10,64]", 2 * 10 * 64 * 4, 0, "mlp", 0),
    Operation("while.1", "while", "(s32[], f32[4,64], f32[10,64])", 0, 0, "attention", 0),
    Operation("lt", "compare", "pred[]", 4 + 4 + 1, 0, "attention", 0),
    Operation("copy.1", "copy", "f32[4,64]", 2 * 4 * 64 * 4, 0, "attention", 0),
    Operation("fusion.3", "fusion", "f32[4,10]", (4 * 64 + 10 * 64 + 4 * 10) * 4, 2 * 4 * 10 * 64, "attention", 0),
    Operation("packed", "broadcast", "u32[1,2,16,32]", 4 + 2 * 16 * 32 * 4, 0, "head"),
    Operation("q", "broadcast", "f32[4,1,6,8]", 4 + 4 * 48 * 4, 0, "attention", 0),
    Operation("pages", "broadcast", "bf16[50,2,64,8]", 4 + 50 * 2 * 64 * 8 * 2, 0, "attention", 0),
    Operation("tables", "broadcast", "s32[4,5]", 4 + 4 * 5 * 4, 0, "attention", 0),
    Operation("at.1", "broadcast", "s32[4,1]", 4 + 4 * 4, 0, "attention", 0),
    Operation(  # a page of keys and one of values for each of four rows, not all 50
        "ffi_call.2",
        "custom-call",
        "f32[4,1,48]",
        4 * 48 * 4 + 2 * 4 * (2 * 64 * 8 * 2) + 4 * 5 * 4 + 4 * 4 + 4 * 48 * 4,
        2 * 2 * 4 * 48 * 64,
        "attention",
        0,
    ),
    Operation("heads", "broadcast", "f32[4,1,10,8]", 4 + 4 * 10 * 8 * 4, 0, "attention", 0),
    Operation("cos", "broadcast", "f32[4,1,1,4]", 4 + 4 * 4 * 4, 0, "attention", 0),
    Operation(  # reads heads, angles and addresses; writes queries, and 2 keys and 2 values of 8 a token
        "ffi_call.3",
        "custom-call",
        "(f32[4,1,6,8], bf16[50,2,64,8], bf16[50,2,64,8])",
        4 * 10 * 8 * 4 + 2 * 4 * 4 * 4 + 4 * 5 * 4 + 4 * 4 + 4 * 6 * 8 * 4 + 4 * (2 + 2) * 8 * 2,
        0,
        "attention",
        0,
    ),
    Operation("bf", "convert", "bf16[4,64]", 4 * 64 * (4 + 2), 0, "head"),
    Operation(
        "ffi_call.1", "custom-call", "f32[4,16]", 4 * 64 * 2 + 32 * 64 * 2 + 4 + 4 * 16 * 4, 2 * 4 * 16 * 64, "head"
    ),
    Operation("conditional.1", "conditional", "f32[4,16]", 0, 0, "sample"),
    Operation("negate.1", "negate", "f32[4,16]", 2 * 4 * 16 * 4, 0, "sample"),
    Operation("negate.1", "negate", "f32[4,16]", 2 * 4 * 16 * 4, 0, "sample"),
    Operation("fusion.4", "fusion", "s32[4,16]", 3 * 4 * 16 * 4, 0, "rank"),
    Operation(
        "reduce.1", "reduce", "s32[4]", 4 * 16 * 4 + 4 + 4 * 4, 0, "rank"
    ),  # without a name: scope of its operand
]


def test_operations_equal_a_count_by_hand() -> None:
    assert operations.operations(TEXT) == EXPECTED


def test_product_of_fewer_bits_reads_fewer_bytes() -> None:
    """Q4_0: four words a block instead of 16, and as many flops."""
    text = TEXT.replace("u32[1,2,16,32]", "u32[1,2,4,32]").replace("u16[1,0,32]", "u16[1,2,32]")
    (call,) = (operation for operation in operations.operations(text) if operation.name == "ffi_call.1")
    assert (call.bytes, call.flops) == (4 * 64 * 2 + 2 * 32 * (16 + 2) + 4 + 4 * 16 * 4, 2 * 4 * 16 * 64)


# Output of a TPU's compiler: weights prefetched into on-chip memory S(1), products as convolutions, a kernel; and a
# Triton kernel of NVIDIA's compiler.
AHEAD = """HloModule jit_ahead

ENTRY %main (w: bf16[96,64], x: f32[4,64], q: f32[4,6,128], kv: bf16[50,64,4,128], t: s32[4,5]) -> f32[4,96] {
  %w = bf16[96,64]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[4,64]{1,0:T(4,128)S(1)} parameter(1)
  %q = f32[4,6,128]{2,1,0} parameter(2)
  %kv = bf16[50,64,4,128]{3,2,1,0:T(4,128)(2,1)} parameter(3)
  %t = s32[4,5]{1,0} parameter(4)
  %slice-start = ((bf16[96,64]{1,0:T(8,128)(2,1)}), bf16[24,64]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:24], [0:64]}
  %slice-done = bf16[24,64]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %copy-start = (bf16[96,64]{1,0:S(1)}, bf16[96,64]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[96,64]{1,0:S(1)} copy-done(%copy-start)
  %convolution.1 = f32[4,24]{1,0} convolution(%x, %slice-done), dim_labels=bf_oi->bf, metadata={op_name="jit(ahead)/layer_1/mlp/dot_general"}
  %convolution.2 = f32[4,96]{1,0:S(1)} convolution(%x, %copy-done), dim_labels=bf_oi->bf, metadata={op_name="jit(ahead)/layer_2/mlp/dot_general"}
  %ragged.1 = f32[4,6,128]{2,1,0:S(1)} custom-call(%t, %t, %t, %t, %t, /*index=5*/%q, %kv), custom_call_target="tpu_custom_call", metadata={op_name="jit(ahead)/layer_2/attention/jit(ragged_paged_attention)/ragged_paged_attention_kernel/pallas_call"}
  %triton.1 = f32[4,6,128]{2,1,0:S(1)} custom-call(%q, %t, %t, %kv, %kv), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(ahead)/layer_2/attention/logprobd_attention/pallas_call"}
  %reduce.1 = f32[4,96]{1,0} all-reduce-start(%convolution.2), metadata={op_name="jit(ahead)/layer_2/mlp/psum"}
  ROOT %done.1 = f32[4,96]{1,0} all-reduce-done(%reduce.1)
}
"""  # noqa: E501

_SLICE, _COPY, _PAGES = 24 * 64 * 2, 96 * 64 * 2, 4 * (64 * 4 * 128 * 2)  # a page of each of four rows
_TABLE, _QUERIES = 4 * 5 * 4, 4 * 6 * 128
EXPECTED_AHEAD = [
    Operation("slice-start", "slice-start", "((bf16[96,64]), bf16[24,64], s32[])", _SLICE, 0, "mlp", 1),
    Operation("slice-done", "slice-done", "bf16[24,64]", 0, 0, "mlp", 1),
    Operation("copy-start", "copy-start", "(bf16[96,64], bf16[96,64], u32[])", _COPY, 0, "mlp", 2),
    Operation("copy-done", "copy-done", "bf16[96,64]", 0, 0, "mlp", 2),
    Operation("convolution.1", "convolution", "f32[4,24]", 4 * 24 * 4, 2 * 4 * 24 * 64, "mlp", 1),
    Operation("convolution.2", "convolution", "f32[4,96]", 0, 2 * 4 * 96 * 64, "mlp", 2),
    Operation(
        "ragged.1",
        "custom-call",
        "f32[4,6,128]",
        5 * _TABLE + 4 * _QUERIES + _PAGES,
        2 * 2 * _QUERIES * 64,
        "attention",
        2,
    ),
    Operation(
        "triton.1",
        "custom-call",
        "f32[4,6,128]",
        2 * _TABLE + 4 * _QUERIES + 2 * _PAGES,
        2 * 2 * _QUERIES * 4,  # its third axis is the page's
        "attention",
        2,
    ),
    Operation("reduce.1", "all-reduce-start", "f32[4,96]", 4 * 96 * 4, 0, "mlp", 2),
    Operation("done.1", "all-reduce-done", "f32[4,96]", 0, 0, "mlp", 2),
]


def test_prefetched_bytes_count_once() -> None:
    counted = operations.operations(AHEAD)
    assert counted == EXPECTED_AHEAD
    assert [each.name for each in operations.collectives(counted)] == ["reduce.1"]
    assert list(operations.by_layer(counted)) == [1, 2, None]
    assert operations.by_layer(counted)[1] == Totals(_SLICE + 4 * 24 * 4, 2 * 4 * 24 * 64)
    assert operations.by_layer(counted)[None] == Totals(0, 0)


@pytest.mark.parametrize(("shape", "widest"), [("f32[]", 0), ("(f32[3,7], s32[5])", 7), ("bf16[16,128]", 128)])
def test_widest_axis(shape: str, widest: int) -> None:
    assert operations.widest_axis(shape) == widest


def test_by_scope_totals() -> None:
    totals = operations.by_scope(operations.operations(TEXT))
    assert totals["head"] == Totals(1536 + 4868 + 4100, 8192)  # the packed weight counts for its user
    assert sum(total.bytes for total in totals.values()) == sum(operation.bytes for operation in EXPECTED)
    assert list(totals) == sorted(totals, key=lambda scope: -totals[scope].bytes)


def test_rank_comparison_is_found_by_scope() -> None:
    assert operations.rank_comparison(TEXT) == ["%gt = pred[4,16] compare(%z, %own), direction=GT"]


def test_result_shapes_and_donations() -> None:
    assert operations.result_shapes(TEXT) == ["f32[4,16]", "f32[50,64]"]
    assert operations.donations(TEXT) == {1: 2}


def test_without_metadata() -> None:
    line = '%a = f32[] add(%b, %c), metadata={op_name="vmap({x})" stack_frame_id=1}, backend_config={"a":"b"}'
    assert without_metadata(line) == '%a = f32[] add(%b, %c), backend_config={"a":"b"}'


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("pred[3]", 3),
        ("s4[3]", 2),
        ("bf16[]", 2),
        ("f8e4m3fn[5,2]", 10),
        ("u64[0,7]", 0),
        ("token[]", 0),
        ("(f32[2], (s32[2], u8[1]))", 17),
    ],
)
def test_array_sizes_of_a_shape(shape: str, size: int) -> None:
    text = f"ENTRY %main (x: {shape}) -> {shape} {{\n  %x = {shape} parameter(0)\n  ROOT %y = {shape} copy(%x)\n}}\n"
    assert [operation.bytes for operation in operations.operations(text)] == [2 * size]


def test_text_without_entry_is_refused() -> None:
    for read in (operations.operations, operations.result_shapes, operations.rank_comparison):
        with pytest.raises(ValueError, match="no ENTRY"):
            read("HloModule nothing\n")


# A real program: 2 layers, and sizes that occur on one axis only, V above all.
CONFIG = config_from_hf(tiny_configs()["llama"])
PAGES = 9
V = CONFIG.vocab_size
WRITERS = ("decode_1", "decode_4", "prefill_16", "packed_16", "penalties", "copy_pages")
READERS = ("score_8", "full_vocab_2")
SLOTS = (f"f32[5,{V}]", f"s32[5,{V}]", f"pred[5,{V}]")  # bias, counts, seen of 4 rows and of padding


@pytest.fixture(scope="module")
def xla_texts() -> Mapping[str, str]:
    """HLO of every program of the tiny model, without our kernels."""
    return compile_tiny(Kernels())


@pytest.fixture(scope="module", params=["kernels", "XLA"])
def texts(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """HLO of every program of the tiny model, with our kernels (if available) and without."""
    made: Mapping[str, str] = (
        request.getfixturevalue("xla_texts") if request.param == "XLA" else compile_tiny(load_kernels())
    )
    return made


def compile_tiny(kernels: Kernels) -> Mapping[str, str]:
    """Compile the tiny model from shapes alone."""
    dtype = jnp.dtype(jnp.float32)
    model = bind(CONFIG, dtype, abstract_weights(CONFIG, dtype), kernels)
    buckets = Buckets(
        decode_rows=(1, 4), prefill_chunks=(16,), score_rows=8, pages_per_row=4, full_vocab_rows=2, segment=8
    )
    plans = make_plans(model, buckets, state_shapes(model, buckets, pages=PAGES), k=5)
    return {program.name: operations.hlo_text(program) for program in compile_plans(plans).values()}


def axes(shapes: list[str]) -> set[str]:
    return {axis for shape in shapes for axis in shape.partition("[")[2].rstrip("]").split(",")}


def test_hlo_text_names_no_file(texts: Mapping[str, str]) -> None:
    assert set(texts) == {*WRITERS, *READERS}
    for text in texts.values():
        assert text.startswith("HloModule jit_")
        assert ".py" not in text


@pytest.mark.parametrize(("name", "rows", "forms"), [("decode_1", 1, 2), ("decode_4", 4, 2), ("score_8", 8, 1)])
def test_rank_compares_with_the_full_vocabulary(xla_texts: Mapping[str, str], name: str, rows: int, forms: int) -> None:
    """`forms`: a decode step has a branch for raw log-probs and one for processed ones."""
    parts, width = 2, 128  # parts of the 16 that contain any of V; XLA folded the others
    lines = [line for line in operations.rank_comparison(xla_texts[name]) if f"pred[{rows},{width}]" in line]
    directions = Counter(line.rpartition("direction=")[2] for line in lines)
    # For the row's own token, and in the loop over requested ids.
    assert (directions["GT"], directions["EQ"]) == (2 * parts * forms, 2 * parts * forms)
    assert directions["LT"] >= 2


def test_prefill_computes_no_rank(texts: Mapping[str, str]) -> None:
    assert operations.rank_comparison(texts["prefill_16"]) == []
    assert f"f32[16,{V}]" not in texts["prefill_16"]


@pytest.mark.parametrize("name", ["decode_1", "decode_4", "prefill_16", "score_8"])
def test_programs_return_no_array_of_the_vocabulary(texts: Mapping[str, str], name: str) -> None:
    kept = operations.donations(texts[name])
    leaves = [shape for i, shape in enumerate(operations.result_shapes(texts[name])) if i not in kept]
    assert str(V) not in axes(leaves)


def test_only_full_vocab_logprobs_returns_rows(texts: Mapping[str, str]) -> None:
    assert operations.result_shapes(texts["full_vocab_2"]) == [f"f32[2,{V}]"]


@pytest.mark.parametrize(("name", "rows"), [("decode_4", 4), ("score_8", 8)])
def test_logits_exist_for_the_rows_of_a_step_only(texts: Mapping[str, str], name: str, rows: int) -> None:
    shapes = {operation.shape for operation in operations.operations(texts[name]) if operation.scope == "head"}
    inside = {shape for shape in shapes if str(V) in axes([shape])}
    assert inside == {f"f32[{rows},{V}]"}


@pytest.mark.parametrize("name", WRITERS)
def test_state_is_donated_and_never_copied(texts: Mapping[str, str], name: str) -> None:
    results = operations.result_shapes(texts[name])
    pages = f"f32[{PAGES},{CONFIG.num_kv_heads},64,{CONFIG.head_dim}]"
    hidden = f"f32[{PAGES},64,{CONFIG.hidden_size}]"
    donated = operations.donations(texts[name])
    state = [*[pages] * (2 * CONFIG.num_layers), hidden, "s32[5]", *SLOTS]
    assert [results[i] for i in sorted(donated)] == state
    assert len(set(donated.values())) == len(donated)
    copied = {operation.shape for operation in operations.operations(texts[name]) if operation.opcode == "copy"}
    assert not copied & {pages, hidden, *SLOTS}


@pytest.mark.parametrize("name", ["decode_1", "decode_4"])
def test_penalty_counts_are_updated_in_place(texts: Mapping[str, str], name: str) -> None:
    counted = operations.operations(texts[name])
    writes = [operation for operation in counted if operation.shape in SLOTS]
    assert [operation.shape for operation in writes] == [f"s32[5,{V}]"]
    assert writes[0].bytes < V
    logits = f"f32[{name.removeprefix('decode_')},{V}]"
    assert [operation for operation in counted if operation.opcode == "copy" and operation.shape == logits] == []


@pytest.mark.parametrize(("name", "others"), [("prefill_16", ["s32[]"]), ("penalties", []), ("copy_pages", [])])
def test_prefill_returns_the_state_and_at_most_a_count(texts: Mapping[str, str], name: str, others: list[str]) -> None:
    results, donated = operations.result_shapes(texts[name]), operations.donations(texts[name])
    assert [shape for i, shape in enumerate(results) if i not in donated] == others


@pytest.mark.parametrize(("name", "results"), [("score_8", 6), ("full_vocab_2", 1)])
def test_head_programs_do_not_touch_the_state(texts: Mapping[str, str], name: str, results: int) -> None:
    assert operations.donations(texts[name]) == {}
    assert len(operations.result_shapes(texts[name])) == results


@pytest.mark.parametrize(("name", "rows", "forms"), [("decode_4", 4, 2), ("score_8", 8, 1)])
def test_requested_ids_are_results(texts: Mapping[str, str], name: str, rows: int, forms: int) -> None:
    shapes, ids = operations.result_shapes(texts[name]), f"{rows},{MAX_REQUESTED_IDS}"
    assert list(pairwise(shapes)).count((f"f32[{ids}]", f"s32[{ids}]")) == forms


def test_decode_flops_equal_a_count_by_hand(texts: Mapping[str, str]) -> None:
    totals = operations.by_scope(operations.operations(texts["decode_4"]))
    D, F, rows = CONFIG.hidden_size, CONFIG.intermediate_size, 4
    assert totals["mlp"].flops == 2 * rows * 3 * D * F * CONFIG.num_layers
    assert totals["head"].flops == 2 * rows * D * V
    assert totals["logprobs"].flops == 0
