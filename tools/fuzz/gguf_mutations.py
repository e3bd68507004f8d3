"""Random mutations of GGUF files: keys, values, tensor rows and bytes."""

import struct
from dataclasses import replace
from random import Random

from tools.fuzz.byte_mutations import edge_value, mutate_bytes
from tools.fuzz.gguf_parts import ARRAY, PACKED, STRING, File, Row, Value, parse, string
from tools.fuzz.gguf_seeds import FACTORS
from tools.fuzz.json_mutations import STRINGS

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
    *(
        f"llama.rope.{name}"
        for name in ("freq_base", "dimension_count", "scale_linear", "scaling.type", "scaling.factor")
    ),
    *(f"llama.rope.scaling.{name}" for name in ("original_context_length", "attn_factor")),
    *(f"llama.{name}" for name in ("attn_logit_softcapping", "final_logit_softcapping", "vocab_size")),
    *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges", "scores")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "unknown", "padding")),
    *(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "add_space_prefix")),
)
_NAMES = (*FACTORS, "output.weight", "")


def mutate(data: bytes, random: Random) -> bytes:
    """Return a file after a few mutations."""
    chance = random.random()
    file = None if chance < 0.15 else parse(data)
    if file is None:
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 2, 4))):
        _mutate(file, random)
    made = file.pack()
    return mutate_bytes(made, random) if chance < 0.3 else made


def _mutate(file: File, random: Random) -> None:
    what = random.randrange(10)
    if what < 6 and file.values:
        _mutate_value(file.values, random)
    elif what < 8:
        file.values.insert(random.randrange(len(file.values) + 1), _random_entry(random.choice(_KEYS).encode(), random))
    elif file.rows and random.random() < 0.9:
        _mutate_row(file.rows, random)
    else:
        file.version = random.choice((0, 1, 2, 3, 4, 3 << 24, 2**32 - 1))


def _mutate_value(values: list[Value], random: Random) -> None:
    index = random.randrange(len(values))
    old = values[index]
    match random.randrange(6):
        case 0:  # change its type
            values[index] = _random_entry(old.key, random)
        case 1:
            del values[index]
        case _ if old.kind == ARRAY:
            values[index] = replace(old, items=_mutate_items(old, random))
        case _:
            values[index] = replace(old, items=(_item(old.kind, random),))


def _random_entry(key: bytes, random: Random) -> Value:
    kind = random.choice((*PACKED, STRING, STRING, ARRAY))
    if kind != ARRAY:
        return Value(key, kind, (_item(kind, random),))
    item = random.choice((4, 5, 6, 7, STRING))
    return Value(key, kind, tuple(_item(item, random) for _ in range(random.choice((0, 1, 2, 14, 300)))), item)


def _mutate_items(old: Value, random: Random) -> tuple[bytes, ...]:
    items = old.items
    index = random.randrange(len(items) + 1)
    match random.randrange(5):
        case 0:
            return items[:index]
        case 1:
            return (*items[:index], _item(old.item_kind, random), *items[index:])
        case 2:
            return tuple(random.sample(items, len(items)))
        case 3:
            return items[:index] * 2
        case _:
            return (*items[:index], _item(old.item_kind, random), *items[index + 1 :])


def _item(kind: int, random: Random) -> bytes:
    if kind == STRING:
        text = random.choice(_TEXTS).encode()
        return string(mutate_bytes(text, random) if random.random() < 0.1 else text)
    if kind not in PACKED:  # an unknown type from an earlier mutation
        return random.randbytes(4)
    pack = "<" + PACKED[kind]
    if pack in ("<f", "<d"):
        return struct.pack(pack, random.choice((*_FLOATS, random.uniform(-10, 10))))
    if pack == "<?" or random.random() < 0.5:
        return struct.pack(pack, random.randrange(2 if pack == "<?" else 65))
    return edge_value(random, pack.upper())


def _mutate_row(rows: list[Row], random: Random) -> None:
    index = random.randrange(len(rows))
    old = rows[index]
    dims = list(old.dims)
    match random.randrange(7):
        case 0:
            rows[index] = replace(old, name=random.choice(_NAMES).encode())
        case 1 | 2:
            axis = random.randrange(4)
            dims[axis : axis + 1] = struct.unpack("<Q", edge_value(random, "<Q"))
            rows[index] = replace(old, dims=tuple(dims))
        case 3:
            rows[index] = replace(old, kind=random.randrange(45))
        case 4:
            rows[index] = replace(old, offset=old.offset + random.choice((1, 4, 32, -32, 2**62)))
        case 5:
            rows.append(replace(old, name=random.choice((*_NAMES, "x")).encode()))
        case _:
            del rows[index]
