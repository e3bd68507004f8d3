"""What `score` reads: lines of files, texts of lines, windows of texts."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cli.batch import source
from serve.cli.batch.source import BatchError, Line, open_source
from serve.cli.score.texts import Context, LineError, Text, TextReader, make_context
from serve.jobs.score import EncodedText, TextEncoder
from serve.text.chat import ChatFormat
from tests.support.http_client import TEMPLATE, VOCAB_SIZE, byte_tokenizer

COLUMNS = TextReader.fields(None)


def lines_of(path: Path) -> list[Line]:
    with open_source(path, COLUMNS) as opened:
        return list(opened.lines)


def numbered(path: Path) -> list[tuple[int, bytes]]:
    return [(line.number, line.data) for line in lines_of(path)]


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pyarrow.compress(data, codec="zstd", asbytes=True) if suffix == ".zst" else data


def test_lines_count_blanks_and_strip_ends_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \n two \nthree")
    assert numbered(path) == [(1, b"one"), (4, b" two "), (5, b"three")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_compressed_file_has_the_same_lines(tmp_path: Path, kind: str, suffix: str) -> None:
    data = b"".join(b'"line %d"\n' % i for i in range(5000))
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(packed(data, suffix))
    with open_source(path, COLUMNS) as opened:
        assert opened.is_text is (kind == ".txt")
        assert opened.total == path.stat().st_size
        lines = list(opened.lines)
    assert [line.data for line in lines] == data.splitlines()
    assert lines[-1].position == opened.total
    assert 0 < lines[0].position <= opened.total


def test_checksum_covers_all_lines_so_far(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    sums = {}
    for name, data in {
        "as it was": b"a\nb\nc",
        "more": b"a\nb\nc\nd",
        "other": b"a\nB\nc",
        "blank": b"a\n\nb\nc",
    }.items():
        path.write_bytes(data)
        sums[name] = [line.checksum for line in lines_of(path)]
    assert sums["more"][:3] == sums["as it was"]
    assert sums["other"][0] == sums["as it was"][0]
    assert sums["other"][2] != sums["as it was"][2] != sums["blank"][2]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    monkeypatch.setattr(source, "_MAX_LINE", 10)
    monkeypatch.setattr(source, "_CHUNK", 4)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 10 + b"\n" + b"y" * 25 + end + (b"after" if end else b""))
    first, second, *rest = lines_of(path)
    assert first.data == b"x" * 10
    assert second.error == "is longer than 10 bytes"
    assert [line.data for line in rest] == ([b"after"] if end else [])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(b'"a"\n' * 9999, mtime=0)[:-9]),
        ("a.jsonl.gz", b"no gzip"),
        ("a.txt.zst", b"no zstd"),
        ("a.parquet", b"no parquet"),
    ],
)
def test_damaged_file_raises_one_error(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BatchError, match=name):
        lines_of(path)


def test_open_source_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="is not a file"):
        lines_of(tmp_path)


def test_parquet_rows_are_lines_of_known_columns(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"text {i}", "huge": "x", "messages": None} for i in range(200)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=150)
    lines = lines_of(path)
    assert [line.number for line in lines] == list(range(1, 201))
    assert orjson.loads(lines[170].data) == {"id": 170, "text": "text 170", "messages": None}
    assert lines[-1].position == 200


def test_parquet_column_of_bytes_is_the_error_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"bytes"]}), path)
    [line] = lines_of(path)
    assert "not text" in (line.error or "")


def read(value: Any, template: str = TEMPLATE, **options: Any) -> Text:
    reader = TextReader(TextEncoder(ChatFormat(byte_tokenizer(chat_template=template)), VOCAB_SIZE), **options)
    return reader.read(Line(1, orjson.dumps(value), 0, 0), is_text=False)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "text", "start"),
    [
        ("bare", b"bare", None),
        ({"text": "one", "messages": [USER]}, b"one", None),
        ({"text": None, "messages": [USER]}, b"user:a;", None),
        ({"messages": [USER, ANSWER]}, b"user:a;assistant:b;", 7),
        ({"messages": [ANSWER]}, b"assistant:b;", None),
        ({"messages": [ANSWER, USER]}, b"assistant:b;user:a;", None),
        ({"prompt": "a", "completion": "bc"}, b"abc", 1),
        ({"prompt": [USER], "completion": [ANSWER]}, b"user:a;assistant:b;", 7),
        ({"prompt": [97], "completion": [98]}, b"ab", 1),
        ({"prompt": "a", "completion": "b", "messages": [USER]}, b"ab", 1),
        ({"token_ids": [97, 98]}, b"ab", None),
        ({"text": [97, 98]}, b"ab", None),
        ({"text": [USER]}, b"user:a;", None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, b"user:x;", None),
    ],
    ids=str,
)
def test_read_encodes_the_first_field_present(row: Any, text: bytes, start: int | None) -> None:
    encoded = read(row).encoded
    assert bytes(encoded.token_ids) == text
    assert encoded.completion_start == start


def test_read_with_text_field_ignores_other_fields() -> None:
    row = {"body": "here", "text": "not here", "id": "x"}
    assert read(row, text_field="body") == Text(EncodedText(list(b"here")), "x")
    with pytest.raises(LineError, match="has no body"):
        read({"text": "x", "prompt": "a", "completion": "b"}, text_field="body")


def test_read_renders_empty_tools_as_none() -> None:
    template = "{% if tools is not none %}tools {% endif %}{{ messages[0].content }}"
    rows: tuple[dict[str, Any], ...] = ({"tools": []}, {"tools": None}, {})
    for row in rows:
        assert bytes(read({"messages": [USER], **row}, template).encoded.token_ids) == b"a"


def test_read_renders_another_template_with_tools() -> None:
    row = {"messages": [USER], "tools": [{"name": "hammer"}]}
    template = "{% for tool in tools %}{{ tool.name }}{% endfor %}{{ messages[0].content }}"
    assert bytes(read(row, template).encoded.token_ids) == b"hammera"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "neither a JSON object nor a string"),
        ({}, "has no text, prompt and completion, messages or token_ids"),
        ({"prompt": "a"}, "has no text"),
        ({"text": ""}, "`text` gives no tokens"),
        ({"text": 3}, "`text` must be a string, a list of token ids or a list of messages"),
        ({"token_ids": []}, "`token_ids` gives no tokens"),
        ({"token_ids": [1, True]}, r"`token_ids\[1\]` is not a token id"),
        ({"token_ids": [VOCAB_SIZE]}, r"`token_ids\[0\]`: 260 is not in the vocabulary of 260 tokens"),
        ({"prompt": "a", "completion": ""}, "The completion gives no tokens"),
        ({"prompt": [97], "completion": []}, "The completion gives no tokens"),
        ({"prompt": "", "completion": "b"}, "The prompt gives no tokens"),
        ({"prompt": "a", "completion": [98]}, "must both be"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]` is not a message with a role"),
        ({"messages": [USER, "a"]}, r"messages\[1\]` is not a message"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content` is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "image is not supported: vision and audio parts",
        ),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "It is refused"),
    ],
    ids=str,
)
def test_read_names_the_error_of_a_broken_row(row: Any, message: str) -> None:
    with pytest.raises(LineError, match=message):
        read(row)


def test_read_refuses_a_lone_surrogate() -> None:
    reader = TextReader(TextEncoder(ChatFormat(byte_tokenizer()), VOCAB_SIZE))
    with pytest.raises(LineError, match="is not JSON"):
        reader.read(Line(1, b'"\\ud800"', 0, 0), is_text=False)


class Merging:
    """A tokenizer that has a token of its own for "ab"."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del add_special_tokens
        return list(text.encode().replace(b"ab", b"\x01"))


def test_token_across_prompt_and_completion_belongs_to_the_completion() -> None:
    chats = ChatFormat(Merging())  # type: ignore[arg-type]  # encode() is all that is used
    reader = TextReader(TextEncoder(chats, VOCAB_SIZE))
    text = reader.read(Line(1, b'{"prompt": "xa", "completion": "bc"}', 0, 0), is_text=False)
    assert text.encoded == EncodedText([ord("x"), 1, ord("c")], 1)


@given(tokens=st.integers(1, 60), size=st.integers(2, 20), data=st.data())
def test_windows_score_each_token_once_with_context(tokens: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size - 1))
    windows = Context(size, "window", stride).windows(tokens)
    scored = [position for window in windows for position in range(window.first, window.end)]
    assert scored == list(range(1, tokens))
    for window in windows:
        assert 0 <= window.begin < window.first
        assert window.end - window.begin <= size
    for window in windows[1:]:
        assert window.end - window.begin == size  # as much context as there is room for
        assert window.first - window.begin >= size - stride


def ends(windows: Sequence[Any]) -> list[int]:
    return [window.end for window in windows]


def test_windows_of_a_longer_text_depend_on_long() -> None:
    assert ends(make_context(10, "error", None).windows(10)) == [10]
    with pytest.raises(LineError, match="has 11 tokens, above the context of 10: use --long window"):
        make_context(10, "error", None).windows(11)
    assert ends(make_context(10, "truncate", None).windows(11)) == [10]
    assert ends(make_context(10, "window", None).windows(16)) == [10, 15, 16]
    with pytest.raises(BatchError, match="--stride 10"):
        make_context(10, "window", 10)
