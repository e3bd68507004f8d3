"""Grammars to masks, and the errors of those that cannot be used."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from compiled.state import mask_words
from model.weights.source import default_model_path
from serve.engine.grammar import Grammar, Matcher
from serve.engine.request import SamplingParams
from serve.engine.token_mask import TokenMask
from serve.grammar.compiler import MAX_CHARACTERS, GrammarBusyError, GrammarCompiler
from serve.grammar.json_schema import GrammarError
from serve.grammar.json_text import escaped_lark
from serve.grammar.sandbox import GrammarLimitError, SandboxError
from serve.grammar.spec import GrammarKind, GrammarSpec
from serve.server.model_files import local_tokenizer
from serve.text.tokenizer import Tokenizer

VOCAB_SIZE = 49_152 + 40  # a model may pad its vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return local_tokenizer(default_model_path())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    yield compiler
    compiler.close()


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value))


def allowed(matcher: Matcher) -> set[int]:
    words = np.zeros(mask_words(VOCAB_SIZE), np.uint32)
    matcher.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """True if the grammar allows each token of the text, and then its end."""
    matcher = grammar.matcher()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in allowed(matcher) or matcher.error:
            return False
        matcher.advance(token)
    return tokenizer.eos_token_ids <= allowed(matcher) and matcher.error is None


def error_of(compiler: GrammarCompiler, spec: GrammarSpec) -> str:
    with pytest.raises(GrammarError) as raised:
        compiler.compile_blocking(spec)
    return str(raised.value)


@pytest.mark.parametrize(
    ("spec", "valid", "invalid"),
    [
        (schema({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}), '{"a": true}', "{}"),
        (schema({"type": "object"}), '{"x":\n  [1, {}]}', "[]"),
        (schema(True), "null", "nul"),
        (schema({"enum": ["é", 1]}), '"é"', "2"),
        (GrammarSpec(GrammarKind.REGEX, r"^a/b\d{2}$"), "a/b12", "a/b123"),
        (GrammarSpec(GrammarKind.REGEX, "yes|no"), "no", "yes|no"),
        (GrammarSpec(GrammarKind.CHOICE, '["yes", "yes\\n\\"no\\""]'), 'yes\n"no"', "yes\n"),
        (GrammarSpec(GrammarKind.GRAMMAR, 'start: "a" n\nn: /[0-9]+/'), "a17", "17"),
        (GrammarSpec(GrammarKind.GRAMMAR, 'root ::= "a" n+\nn ::= [0-9]'), "a17", "17"),
    ],
)
def test_grammar_allows_its_texts_only(
    compiler: GrammarCompiler, tokenizer: Tokenizer, spec: GrammarSpec, valid: str, invalid: str
) -> None:
    grammar = compiler.compile_blocking(spec)
    assert accepts(grammar, tokenizer, valid)
    assert not accepts(grammar, tokenizer, invalid)


def test_any_tokens_may_spell_a_text_that_is_fixed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile_blocking(GrammarSpec(GrammarKind.CHOICE, '["hello"]')).matcher()
    texts = {tokenizer.token_text(index) for index in allowed(matcher)}
    assert texts == {"h", "he", "hel", "hell", "hello"}


@pytest.mark.parametrize("encodes", [True, False])
def test_fast_forward_forces_the_tokenizers_own_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer, encodes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = properties(first_name={"enum": ["xy", "z"]}) | {"required": ["first_name"]}
    spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(record), whitespace="")

    def forced(compiler: GrammarCompiler) -> list[int]:
        mask = TokenMask(SamplingParams(99, grammar=compiler.compile_blocking(spec)), VOCAB_SIZE)
        mask.update([], 99)
        return mask.forced

    expected = tokenizer.encode_plain('{"first_name":"')
    if not encodes:  # as a tokenizer that adds a space before a text
        encode = tokenizer.encode_plain
        monkeypatch.setattr(tokenizer, "encode_plain", lambda text: encode(f" {text}"))
    assert forced(compiler) == []
    fast = GrammarCompiler(tokenizer, VOCAB_SIZE, fast_forward=True)
    tokens = forced(fast)
    fast.close()
    assert len(tokens) > 2
    assert b'{"first_name":"'.startswith(b"".join(map(tokenizer.token_bytes, tokens)))
    if encodes:
        assert tokens == expected[: len(tokens)]


def test_special_tokens_are_not_part_of_a_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile_blocking(GrammarSpec(GrammarKind.REGEX, r"[\s\S]*")).matcher()
    ids = allowed(matcher)
    assert ids & tokenizer.special_ids == tokenizer.eos_token_ids
    assert max(ids) < tokenizer.vocab_size


def test_matcher_reports_the_end_of_the_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    start, end = (compiler.compile_blocking(GrammarSpec(GrammarKind.CHOICE, '["yes"]')).matcher() for _ in range(2))
    [token] = tokenizer.encode("yes", add_special_tokens=False)
    end.advance(token)
    assert (start.is_finished, end.is_finished) == (False, True)
    assert allowed(end) == tokenizer.eos_token_ids
    assert end.error is None


def test_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile_blocking(GrammarSpec(GrammarKind.CHOICE, '["yes"]')).matcher()
    matcher.advance(100)
    assert matcher.error == "the grammar allows no token"


def test_grammar_that_becomes_too_complex_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, r"(.*a.{80}b|.*b.{90}a)*")
    grammar = compiler.compile_blocking(spec)
    matcher = grammar.matcher()
    [token] = tokenizer.encode("a", add_special_tokens=False)
    while matcher.error is None:
        allowed(matcher)
        matcher.advance(token)
    assert matcher.error == "the grammar is too complex"
    renewed = compiler.compile_blocking(spec)  # outputs in the old one share its state
    assert renewed is not grammar
    assert token in allowed(renewed.matcher())


def test_grammar_with_many_tokens_is_compiled_again(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, "[a-c]*")
    grammar = compiler.compile_blocking(spec)
    matcher = grammar.matcher()
    [token] = tokenizer.encode("a", add_special_tokens=False)
    for _ in range(1_999):
        matcher.advance(token)
    assert compiler.compile_blocking(spec) is grammar
    matcher.advance(token)
    monkeypatch.setattr(compiler._sandbox, "source", None)  # the sandbox need not check it again
    assert compiler.compile_blocking(spec) is not grammar
    assert matcher.error is None


def test_matchers_are_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile_blocking(GrammarSpec(GrammarKind.CHOICE, '["yes", "no"]'))
    one, two = grammar.matcher(), grammar.matcher()
    one.advance(tokenizer.encode("yes", add_special_tokens=False)[0])
    assert one.is_finished
    assert not two.is_finished
    assert accepts(grammar, tokenizer, "no")


def tag(value: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.STRUCTURAL_TAG, json.dumps(value))


def tag_format(**fields: Any) -> GrammarSpec:
    return tag({"type": "structural_tag", "format": fields})


BOOLEAN = {"type": "json_schema", "json_schema": {"type": "boolean"}}
TAG = {"type": "tag", "begin": "<a>", "content": BOOLEAN, "end": "</a>"}
NULL_TAG = {"type": "tag", "begin": "<b>", "content": {"type": "const_string", "value": "null"}, "end": ["</b>", ";"]}
ANY_TEXT = {"type": "any_text"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG, NULL_TAG]}
OLD_FORM = {"structures": [{"begin": "<f=x>", "schema": {"type": "boolean"}, "end": "</f>"}], "triggers": ["<f="]}


@pytest.mark.parametrize(
    ("spec", "valid", "invalid"),
    [
        (tag(OLD_FORM), ["", "text", "a <f=x>true</f> b <f=x>false</f>"], ["<f=y>", "<f=x>null</f>", "<f=x>true"]),
        (tag_format(**TRIGGERED), ["", "x", "x<a>true</a>y<b>null;"], ["<c>", "x<a>1</a>"]),
        (tag_format(**TRIGGERED, at_least_one=True), ["<a>true</a>y"], ["", "x"]),
        (tag_format(**TRIGGERED, stop_after_first=True), ["x", "x<a>true</a>"], ["<a>true</a>y"]),
        (tag_format(**BOOLEAN, style="json", excludes=[]), ["true"], ["x"]),
        (tag_format(**TAG), ["<a>true</a>"], ["x<a>true</a>", "<a>true</a>x"]),
        (tag_format(**{**TAG, "content": ANY_TEXT}), ["<a>x < y</a>"], ["<a>x", "<a></a></a>"]),
        (tag_format(**ANY_TEXT), ["", "a\n<b>"], []),
        (tag_format(**ANY_TEXT, excludes=["<b>", "/"]), ["", "a\n<b"], ["<b>", "a/b"]),
        (tag_format(type="regex", pattern="[a-c]+", excludes=["ab"]), ["ba"], ["ab", "cab", ""]),
        (tag_format(**{**TAG, "content": {**ANY_TEXT, "excludes": ["x"]}}), ["<a>y</a>"], ["<a>x</a>"]),
        (tag_format(**TRIGGERED, excludes=["!"]), ["x", "x<a>true</a>y"], ["!", "x!<a>true</a>", "<a>true</a>!"]),
        (
            tag_format(type="sequence", elements=[{"type": "const_string", "value": "x"}, BOOLEAN, ANY_TEXT]),
            ["xtrue", "xfalse!"],
            ["x", "xyz"],
        ),
        (tag_format(type="or", elements=[BOOLEAN, {"type": "regex", "pattern": "[0-9]+"}]), ["true", "17"], ["x", ""]),
        (
            tag_format(type="tags_with_separator", tags=[TAG, NULL_TAG], separator=", "),
            ["", "<a>true</a>", "<a>true</a>, <b>null</b>, <a>false</a>"],
            ["<a>true</a>,", "<a>true</a><b>null</b>"],
        ),
        (
            tag_format(type="tags_with_separator", tags=[TAG], separator="", at_least_one=True, stop_after_first=True),
            ["<a>true</a>"],
            ["", "<a>true</a><a>true</a>"],
        ),
    ],
)
def test_structural_tag(
    compiler: GrammarCompiler, tokenizer: Tokenizer, spec: GrammarSpec, valid: list[str], invalid: list[str]
) -> None:
    grammar = compiler.compile_blocking(spec)
    assert [text for text in valid if not accepts(grammar, tokenizer, text)] == []
    assert [text for text in invalid if accepts(grammar, tokenizer, text)] == []


def test_special_token_in_a_structural_tag(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    special = {"type": "tag", "begin": "call <jupyter_code>", "content": ANY_TEXT, "end": "<jupyter_output>."}
    matcher = compiler.compile_blocking(tag_format(**special)).matcher()
    for token in tokenizer.encode("call <jupyter_code>x<jupyter_output>.", add_special_tokens=False):
        assert token in allowed(matcher)
        matcher.advance(token)
    assert matcher.is_finished


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the structural tag must be an object"),
        ({}, "`structures` must be a list that is not empty"),
        ({"structures": [{}]}, "`structures[0]` must be an object with `begin`, `schema` and `end`"),
        (OLD_FORM | {"triggers": []}, "`triggers` must be a list that is not empty"),
        (OLD_FORM | {"triggers": ["x"]}, "`tags[0].begin` starts with none of the triggers"),
        (OLD_FORM | {"structures": [{"schema": {}}]}, "`tags[0].begin` must be a string"),
        ({"format": {"type": "qwen_xml_parameter"}}, "`format.type` must be one of `any_text`, `const_string`, "),
        (
            {"format": {"type": "sequence", "elements": [ANY_TEXT, ANY_TEXT]}},
            "`format.elements[0]`: format `any_text` can only be the last part, or the only one of a tag",
        ),
        (OLD_FORM | {"at_least_one": True}, "`at_least_one` is not supported"),
        (OLD_FORM | {"structures": [{"schema": {}, "begin": "<f=", "ends": ""}]}, "`structures[0].ends` is not"),
        ({"format": ANY_TEXT, "triggers": ["<"]}, "`triggers` is not supported"),
        ({"format": {**BOOLEAN, "style": "xml"}}, "`format.style` must be one of `json`, `python`, "),
        ({"format": {**BOOLEAN, "style": []}}, "`format.style` must be one of `json`, `python`, "),
        ({"format": {**TRIGGERED, "at_least_one": 1}}, "`format.at_least_one` must be a boolean"),
        ({"format": {**TRIGGERED, "tags": [{**TAG, "stop": 1}]}}, "`format.tags[0].stop` is not supported"),
        ({"format": {**ANY_TEXT, "excludes": [""]}}, "`format.excludes` must be a list of strings that are not empty"),
        ({"format": {**TAG, "excludes": ["x"]}}, "`format.excludes` is not supported"),
        ({"format": {"type": "json_schema"}}, "`format.json_schema` must be an object or a boolean"),
        (
            {"format": {**TAG, "content": {"type": "json_schema", "json_schema": {"items": {"not": {}}}}}},
            "`format.content.json_schema`: keyword `not` is not supported at `/items/not`",
        ),
        ({"format": {"type": "regex", "pattern": "("}}, "unclosed group"),
    ],
)
def test_error_of_a_structural_tag_has_a_path(compiler: GrammarCompiler, value: Any, message: str) -> None:
    assert error_of(compiler, tag(value)).startswith(message)


@pytest.mark.parametrize(
    ("grammar", "valid", "invalid"),
    [
        ("start: A+\nA: /[^a]/", ['b"\\\n', "é\x01"], ["ab", ""]),
        ('start: "say \\"hi\\"\\n" W  // "x"\nW: /\\w+\\s[\\S]./', ['say "hi"\na "b'], ['say "hi"\na "\n', "say"]),
        ("start: /a(?s:.)b./", ["a\nbc"], ["a\nb\n"]),
        ('start: /"[^"]*"/ "z"i', ['"q\\"Z'], ['"q"y']),
        ('start: (N WS)* S\n%import common.NUMBER -> N\n%import common.WS\nS: "a".."c"', ["1.5 2\nb"], ["1d", "1"]),
        (r"start: /[\]\"\[a-]{2}\x22\u{5c}\//", [']""\\/', 'a-"\\/'], ['b""\\/']),
        ("%llguidance {}\nstart: X~2..3\nX: /(?i)x/", ["xX"], ["x"]),
    ],
)
def test_escaped_lark_allows_the_same_texts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, valid: list[str], invalid: list[str]
) -> None:
    whole = compiler.compile_blocking(GrammarSpec(GrammarKind.GRAMMAR, grammar))
    inner = compiler.compile_blocking(tag_format(type="grammar", grammar=escaped_lark(grammar)))
    for text in (*valid, *invalid):
        if not set(text) - set(map(chr, range(32, 127))):  # the tokenizer lacks others
            assert accepts(whole, tokenizer, text) == (text in valid)
        assert accepts(inner, tokenizer, json.dumps(text, ensure_ascii=False)[1:-1]) == (text in valid)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('start: "a"\n  b: /[a[b]]/', "line 2, column 6: nested classes"),
        ("start: %json {}", "line 1, column 8: `%json` is not supported"),
        ("start: A & B", "line 1, column 10: `&` is not supported"),
        ("start: ~A", "line 1, column 8: `~` is not supported"),
        ("start: <a>", "line 1, column 8: `<` is not supported"),
        (r"start: /\pL/", "line 1, column 8: properties of Unicode are not supported"),
        ("start: /a/x", "line 1, column 8: the flag x is not supported"),
        ("start: /(?x)a/", "line 1, column 8: the flag x is not supported"),
        (r'start: "\n"i', "line 1, column 8: characters that JSON escapes"),
        ("start: /[z-a]/", "line 1, column 8: '/[z-a]/' is not supported"),
        ("%import common.SQL", "line 1, column 1: `common.SQL` is not supported"),
    ],
)
def test_error_of_lark_that_cannot_be_escaped(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError) as raised:
        escaped_lark(grammar)
    assert str(raised.value).startswith(message)


def properties(**schemas: Any) -> Any:
    return {"type": "object", "properties": schemas, "additionalProperties": False}


@pytest.mark.parametrize(
    ("style", "schema_of_arguments", "message"),
    [
        ("python", properties(**{"from": {}}), "the name 'from' cannot be written"),
        ("python", {"anyOf": [{}]}, "keyword `anyOf` is not supported at `/anyOf`"),
        ("python", {"type": "object"}, "an object without `properties` is not supported"),
        ("python", properties(a={"not": {}}), "keyword `not` is not supported"),
        ("python", {"type": "object", "properties": 1}, "the schema is not valid"),
        ("qwen_xml", properties(a={"type": "string", "format": "date"}), "keyword `format` is not supported at `/prop"),
        ("qwen_xml", properties(a={"type": "string", "pattern": "^a|b$"}), "keyword `pattern` must match the whole"),
        ("qwen_xml", properties(a={"type": "string", "enum": ["</parameter>"]}), "a value contains '</parameter>'"),
        ("gemma4", properties(a={"oneOf": [{}]}), "a schema without `type` is not supported at `/properties/a`"),
        ("gemma4", properties(a={"enum": [[]]}), "a value of `enum` or `const` is not supported at `/properties/a`"),
        ("gemma4", properties(a={"$ref": "#/properties/a"}), "the reference is not supported at `/properties/a/$ref`"),
        ("gemma4", properties(a=False), "the schema allows nothing at `/properties/a`"),
    ],
)
def test_error_of_a_style(compiler: GrammarCompiler, style: str, schema_of_arguments: Any, message: str) -> None:
    spec = tag_format(type="json_schema", json_schema=schema_of_arguments, style=style)
    assert f"`format.json_schema`: {message}" in error_of(compiler, spec)


@pytest.mark.parametrize(
    ("whitespace", "valid", "invalid"),
    [
        (None, '{\n    "a": 1\n}', '{\n\n"a":1}'),
        ("", '{"a":1}', '{"a": 1}'),
        (r" {0,2}", '{"a":  1}', '{"a":   1}'),
    ],
)
def test_whitespace(
    compiler: GrammarCompiler, tokenizer: Tokenizer, whitespace: str | None, valid: str, invalid: str
) -> None:
    grammar = compiler.compile_blocking(
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "object", "properties": {"a": {}}}', whitespace)
    )
    assert accepts(grammar, tokenizer, valid)
    assert not accepts(grammar, tokenizer, invalid)


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"properties": {"not": {"properties": {"b~/": {"not": {}}}}}},
            "keyword `not` is not supported at `/properties/not/properties/b~0~1/not`",
        ),
        (
            {"$defs": {"x": {"not": {}}, "y": {"items": [{"uniqueItems": True}]}}, "anyOf": [{"$ref": "#/$defs/y"}]},
            "keyword `uniqueItems` is not supported at `/$defs/y/items/0/uniqueItems`",
        ),
        (
            {"properties": {"a": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}},
            "`oneOf` is supported only if its alternatives exclude each other; use `anyOf` at `/properties/a/oneOf`",
        ),
        (
            {"properties": {"a": {"format": "uuid"}, "b": {"type": "string", "format": "idn-email"}}},
            "format `idn-email` is not supported at `/properties/b/format`",
        ),
        (
            {"items": {"type": "string", "pattern": "(?=a)b"}},
            "look-around, including look-ahead and look-behind, is not supported (character 1) at `/items/pattern`",
        ),
        ({"items": {"$ref": "#/$defs/a"}}, "Pointer '/$defs/a' does not exist at `/items/$ref`"),
        (
            {"items": {"$ref": "https://example.org/a"}},
            "references to other documents are not supported at `/items/$ref`",
        ),
        ({"additionalProperties": {"type": "text"}}, "type `text` does not exist at `/additionalProperties/type`"),
        ({"$defs": {"node": NODE}, **NODE}, "the schema contains itself without end at `/properties/next/$ref`"),
        ({"$ref": "#"}, "the schema contains itself without end at `/$ref`"),
        ({"type": "string", "x-guidance": {"lenient": True}}, "`x-guidance` must be an object without `lenient`"),
        ([], "the schema must be an object or a boolean"),
        (False, "Unsatisfiable schema: anyOf is empty"),
    ],
)
def test_error_of_a_schema_names_keyword_and_path(compiler: GrammarCompiler, value: Any, message: str) -> None:
    assert error_of(compiler, schema(value)).startswith(message)


def test_closed_schema_has_no_other_properties(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    inner = {"type": "object", "properties": {"x": {"type": "null"}}}
    value = {"type": "object", "properties": {"a": inner, "b": inner | {"additionalProperties": True}}}
    grammar = compiler.compile_blocking(GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value), closed=True))
    assert accepts(grammar, tokenizer, '{"a": {"x": null}, "b": {"y": 1}}')
    assert not accepts(grammar, tokenizer, '{"a": {"y": null}}')
    assert not accepts(grammar, tokenizer, '{"c": 1}')


def test_schema_that_may_contain_itself(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    grammar = compiler.compile_blocking(
        schema({"$defs": {"node": node | {"required": ["next"]}}, "$ref": "#/$defs/node"})
    )
    assert accepts(grammar, tokenizer, '{"next": {"next": null}}')


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (GrammarKind.JSON_SCHEMA, '{"type":\n string}', "the schema is not JSON: line 2, column 2: "),
        (GrammarKind.JSON_SCHEMA, '{"minimum": NaN}', "the schema is not JSON: NaN is not a number"),
        (GrammarKind.REGEX, "a(b", "unclosed group (character 2)"),
        (
            GrammarKind.REGEX,
            "(?=a)b",
            "look-around, including look-ahead and look-behind, is not supported (character 1)",
        ),
        (GrammarKind.GRAMMAR, 'start: "a"\n  b: (', "line 2, column 7: "),
        (GrammarKind.GRAMMAR, 'x: "a"\nstart: b', 'line 2, column 8: unknown name: "b"'),
        (GrammarKind.GRAMMAR, 'x: "a"\nstart: /(/', "line 2, column 8: unclosed group (character 1)"),
        (GrammarKind.GRAMMAR, 'root ::= "a"\nb ::= (', "line 2, column 8: "),
        (GrammarKind.GRAMMAR, 'root ::= "a" b', "Rule 'b' not found"),
        (GrammarKind.GRAMMAR, "start: start", "the grammar allows no text"),
    ],
)
def test_error_says_where_it_is(compiler: GrammarCompiler, kind: GrammarKind, text: str, message: str) -> None:
    error = error_of(compiler, GrammarSpec(kind, text))
    assert error.startswith(message)
    assert "\n" not in error


_CHAIN = "\n".join(f'r{i}: "a" r{i + 1} | "b" r{i + 1}' for i in range(20_000))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GrammarSpec(GrammarKind.REGEX, "a" * (MAX_CHARACTERS + 1)), "the grammar has more than 1048576 characters"),
        (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"items":' * 90_000), "the schema is nested more than 64 levels deep"),
        (schema({"items": [[[]]] * 20} | json.loads('{"items":' * 65 + "{}" + "}" * 65)), "the schema is nested more"),
        # Overflows the stack of a process.
        (GrammarSpec(GrammarKind.GRAMMAR, f"start: r0\n{_CHAIN}\nr20000: /c/"), "the grammar is too large or nested"),
        # Takes minutes.
        (
            schema({"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{i * 3}}}"} for i in range(20)]}),
            "the grammar takes more than 0.8 s to compile",
        ),
        (GrammarSpec(GrammarKind.GRAMMAR, "root ::= " + "(" * 50_000), "the grammar is nested too deeply"),
        (
            GrammarSpec(GrammarKind.REGEX, "(" * 50_000 + ")" * 50_000),
            "exceed the maximum number of nested parentheses",
        ),
    ],
)
def test_grammar_beyond_the_limits_is_refused(compiler: GrammarCompiler, spec: GrammarSpec, message: str) -> None:
    assert error_of(compiler, spec).startswith(message)


async def test_compiled_grammars_and_errors_are_cached(compiler: GrammarCompiler) -> None:
    spec = schema({"const": "cached"})
    assert await compiler.compile(spec) is await compiler.compile(schema({"const": "cached"}))
    errors = []
    for _ in range(2):
        with pytest.raises(GrammarError) as raised:
            await compiler.compile(schema({"not": {"const": "cached"}}))
        errors.append(raised.value)
    assert errors[0] is errors[1]


async def test_request_that_ends_does_not_cancel_a_grammar(compiler: GrammarCompiler) -> None:
    spec = schema({"const": "shared"})
    waiting = [asyncio.ensure_future(compiler.compile(spec)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert await waiting[1] is await compiler.compile(spec)


@pytest.mark.parametrize(("keys", "refused"), [([None] * 64, None), (["a"] * 32, "a"), (["a"] * 32 + ["b"] * 32, "c")])
async def test_grammars_beyond_the_queue_are_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, keys: list[str | None], refused: str | None
) -> None:
    release = threading.Event()

    def source(_: GrammarSpec) -> str:
        release.wait()
        raise GrammarLimitError("released")

    monkeypatch.setattr(compiler._sandbox, "source", source)
    waiting = [asyncio.ensure_future(compiler.compile(schema({"const": i}), key)) for i, key in enumerate(keys)]
    await asyncio.sleep(0)
    with pytest.raises(GrammarBusyError):
        await compiler.compile(schema({"const": 64}), refused)
    if len(keys) < 64:
        waiting.append(asyncio.ensure_future(compiler.compile(schema({"const": 64}), "other")))
    release.set()
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert str(error) == "released"
    with pytest.raises(GrammarLimitError):  # its places are free again
        await compiler.compile(schema({"const": 0}), refused)


def test_failure_of_the_sandbox_is_not_cached(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = schema({"const": "failing"})
    with monkeypatch.context() as patch:
        patch.setattr(GrammarSpec, "__reduce__", lambda _: (divmod, (1, 0)), raising=False)  # fails when it is read
        with pytest.raises(SandboxError):
            compiler.compile_blocking(spec)
    compiler.compile_blocking(spec)


def test_error_of_limits_is_not_cached(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = schema({"const": "slow"})

    def source(_: GrammarSpec) -> str:
        raise GrammarLimitError("too slow")

    with monkeypatch.context() as patch:
        patch.setattr(compiler._sandbox, "source", source)
        assert error_of(compiler, spec) == "too slow"
    compiler.compile_blocking(spec)


def test_sandbox_that_was_killed_is_started_again(compiler: GrammarCompiler) -> None:
    compiler.compile_blocking(schema({"const": "before"}))
    process = compiler._sandbox._process
    assert process is not None
    process.kill()
    process.wait()
    compiler.compile_blocking(schema({"const": "after"}))
