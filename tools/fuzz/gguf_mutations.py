"""What becomes of GGUF files by accident: keys, values and rows that are others, or bytes."""

import struct
from dataclasses import replace
from random import Random

from tools.fuzz.gguf_parts import ARRAY, PACKED, STRING, File, Row, Value, string, taken_apart
from tools.fuzz.gguf_seeds import FACTORS
from tools.fuzz.random_bytes import bytes_changed, edge
from tools.fuzz.random_json import STRINGS

_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    *STRINGS,
    *("llama", "gpt2", "gpt-2", "qwen2", "gemma3", "none", "linear", "yarn", "smollm", "llama-bpe", "a b", "Ġ a"),
    *(
        "<0x41>",
        "▁",
        "  ",
        "<t>",
        "a" * 3000,
        "{{ messages[0].content }}",
        "{{ raise_exception('no') }}",
        "{{ dict(a=1, a=2) }}",
    ),
)
_KEYS = (
    *("general.architecture", "general.alignment", "split.count", "split.no", "tokenizer.chat_template"),
    *(f"llama.{name}" for name in ("context_length", "embedding_length", "block_count", "feed_forward_length")),
    *(f"llama.attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")),
    *(f"llama.attention.{name}" for name in ("sliding_window", "sliding_window_pattern", "layer_norm_rms_epsilon")),
    *(f"llama.rope.{name}" for name in ("freq_base", "dimension_count", "scaling.type", "scaling.factor")),
    *(f"llama.rope.scaling.{name}" for name in ("original_context_length", "attn_factor")),
    *(f"llama.{name}" for name in ("attn_logit_softcapping", "final_logit_softcapping", "vocab_size")),
    *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges", "scores")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "unknown", "padding")),
    *(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "add_space_prefix")),
)
_NAMES = (*FACTORS, "output.weight", "")


def mutated(data: bytes, random: Random) -> bytes:
    """A file after some accidents."""
    chance = random.random()
    file = None if chance < 0.15 else taken_apart(data)
    if file is None:
        return bytes_changed(data, random)
    for _ in range(random.choice((1, 1, 2, 4))):
        _change(file, random)
    made = file.packed()
    return bytes_changed(made, random) if chance < 0.3 else made


def _change(file: File, random: Random) -> None:
    what = random.randrange(10)
    if what < 6 and file.values:
        _change_value(file.values, random)
    elif what < 8:
        file.values.insert(random.randrange(len(file.values) + 1), _other(random.choice(_KEYS).encode(), random))
    elif file.rows and random.random() < 0.9:
        _change_row(file.rows, random)
    else:
        file.version = random.choice((0, 1, 2, 3, 4, 3 << 24, 2**32 - 1))


def _change_value(values: list[Value], random: Random) -> None:
    at = random.randrange(len(values))
    old = values[at]
    match random.randrange(6):
        case 0:  # of another kind, which nobody may expect
            values[at] = _other(old.key, random)
        case 1:
            del values[at]
        case _ if old.kind == ARRAY:
            values[at] = replace(old, items=_other_items(old, random))
        case _:
            values[at] = replace(old, items=(_item(old.kind, random),))


def _other(key: bytes, random: Random) -> Value:
    kind = random.choice((*PACKED, STRING, STRING, ARRAY))
    if kind != ARRAY:
        return Value(key, kind, (_item(kind, random),))
    item = random.choice((4, 5, 6, 7, STRING))
    return Value(key, kind, tuple(_item(item, random) for _ in range(random.choice((0, 1, 2, 14, 300)))), item)


def _other_items(old: Value, random: Random) -> tuple[bytes, ...]:
    items = old.items
    at = random.randrange(len(items) + 1)
    match random.randrange(5):
        case 0:
            return items[:at]
        case 1:
            return (*items[:at], _item(old.item_kind, random), *items[at:])
        case 2:
            return tuple(random.sample(items, len(items)))
        case 3:
            return items[:at] * 2
        case _:
            return (*items[:at], _item(old.item_kind, random), *items[at + 1 :])


def _item(kind: int, random: Random) -> bytes:
    if kind == STRING:
        text = random.choice(_TEXTS).encode()
        return string(bytes_changed(text, random) if random.random() < 0.1 else text)
    if kind not in PACKED:  # an accident of its own
        return random.randbytes(4)
    packed = "<" + PACKED[kind]
    if packed in ("<f", "<d"):
        return struct.pack(packed, random.choice((*_FLOATS, random.uniform(-10, 10))))
    if packed == "<?" or random.random() < 0.5:
        return struct.pack(packed, random.randrange(2 if packed == "<?" else 65))
    return edge(random, packed.upper())


def _change_row(rows: list[Row], random: Random) -> None:
    at = random.randrange(len(rows))
    old = rows[at]
    dims = list(old.dims)
    match random.randrange(7):
        case 0:
            rows[at] = replace(old, name=random.choice(_NAMES).encode())
        case 1 | 2:
            axis = random.randrange(4)
            dims[axis : axis + 1] = struct.unpack("<Q", edge(random, "<Q"))
            rows[at] = replace(old, dims=tuple(dims))
        case 3:
            rows[at] = replace(old, kind=random.randrange(45))
        case 4:
            rows[at] = replace(old, offset=old.offset + random.choice((1, 4, 32, -32, 2**62)))
        case 5:
            rows.append(replace(old, name=random.choice((*_NAMES, "x")).encode()))
        case _:
            del rows[at]
