"""Fields that state a grammar, the answers in it, and the errors of those that cannot be used."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from serve.grammar.compiler import GrammarBusyError, GrammarCompiler
from serve.grammar.spec import GrammarKind, GrammarSpec
from tests.support.http_client import (
    CHAT,
    COMPLETIONS,
    END,
    Server,
    body_of,
    chat_body,
    completion_body,
    error_of,
    serving,
    shared_server,
)

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose model wants to write "!!!...": instead it writes the next byte that is allowed."""
    with shared_server(b"!" * 100) as server:
        yield server


async def text_of(server: Server, path: str, **fields: Any) -> str:
    if path == CHAT:
        choice = (await server.chat(max_tokens=40, **fields))["choices"][0]
        text = choice["message"]["content"]
    else:
        choice = (await server.complete(max_tokens=40, **fields))["choices"][0]
        text = choice["text"]
    assert choice["finish_reason"] in ("stop", "length")
    return str(text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"response_format": FORMAT}, '{"a":-0}'),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, '{"a":-0}'),
        ({"response_format": {"type": "json_object", "schema": {"const": "x"}}}, '"x"'),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a":-0}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, '{"a":-0}'),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "!"}}, '{!"a"!:!-0!}'),
        ({"structured_outputs": {"regex": "[b-d]{3}"}}, "bbb"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [5-9]'}}, "x5"),
        ({"json_schema": {"const": 1}}, "1"),
        ({"json_schema": '{"const": 1}'}, "1"),
        ({"regex": "[b-d]{3}"}, "bbb"),
        ({"ebnf": 'root ::= "x" [5-9]'}, "x5"),
        ({"grammar": "start: /x[5-9]/"}, "x5"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": "!"}, '{!"a"!:!-0!}'),
        ({"guided_json_object": True, "guided_whitespace_pattern": "!"}, '{!"!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!'),
        ({"guided_regex": "[b-d]{3}"}, "bbb"),
        ({"guided_choice": ["yes", "no"]}, "no"),
        ({"guided_grammar": 'root ::= "x" [5-9]', "structured_outputs": {"grammar": 'root ::= "x" [5-9]'}}, "x5"),
    ],
)
@PATHS
async def test_answer_follows_the_grammar(server: Server, path: str, fields: dict[str, Any], text: str) -> None:
    assert await text_of(server, path, **fields) == text


@pytest.mark.parametrize("count", [0, 3, 7])
@PATHS
async def test_grammar_that_starts_in_the_prompt(server: Server, path: str, count: int) -> None:
    prompt = [72, 105]
    post, name = (server.chat, "prompt_token_ids") if path == CHAT else (server.complete, "prompt")
    fields = {"messages": None, "response_format": FORMAT, "return_token_ids": True, "max_tokens": 40}

    async def choice(ids: list[int], **others: Any) -> Any:
        return (await post(**{name: ids}, **fields, **others))["choices"][0]

    whole = await choice(prompt)
    rest = await choice([*prompt, *whole["token_ids"][:count]], grammar_start=len(prompt))
    assert rest["token_ids"] == whole["token_ids"][count:]
    assert rest["finish_reason"] == whole["finish_reason"] == "stop"


async def test_grammar_that_starts_in_the_prompt_of_several(server: Server) -> None:
    error = error_of(
        await server.post(COMPLETIONS, completion_body(prompt=["a", "a"], regex="a*", grammar_start=0)), 400
    )
    assert (error["param"], error["message"]) == ("grammar_start", "`grammar_start` needs a single prompt.")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": None, "json_schema": None}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "description": "y"}}},
        {"structured_outputs": {"json_object": True}},
        {"guided_json_object": True},
    ],
)
@PATHS
async def test_json_object(server: Server, path: str, fields: dict[str, Any]) -> None:
    assert (await text_of(server, path, **fields)).startswith('{"')


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag", **TAG}},
        {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
        {"structural_tag": json.dumps(TAG)},
    ],
)
async def test_structural_tag(fields: dict[str, Any]) -> None:
    with shared_server(b"x<f>" + b"!" * 20) as server:
        text = await text_of(server, CHAT, **fields)
    assert text.startswith('x<f>{"a":-0}</f>!')


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "json_schema": None},
        {"regex": "", "ebnf": "", "grammar": "", "json_schema": "", "structural_tag": "", "guided_json_object": False},
    ],
)
@PATHS
async def test_field_without_grammar(server: Server, path: str, fields: dict[str, Any]) -> None:
    assert await text_of(server, path, **fields) == "!" * 40


@pytest.mark.parametrize("n", [1, 3])
@PATHS
async def test_stream_and_choices(server: Server, path: str, n: int) -> None:
    fields: dict[str, Any] = {"structured_outputs": {"choice": ["yes", "no"]}, "n": n, "max_tokens": 9}
    texts, reasons = [""] * n, list[str]()
    for chunk in await (server.chat_stream if path == CHAT else server.complete_stream)(**fields):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"]["content"] if path == CHAT else choice["text"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert texts == ["no"] * n
    assert reasons == ["stop"] * n
    answer = await (server.chat if path == CHAT else server.complete)(**fields)
    assert [choice["message"]["content"] if path == CHAT else choice["text"] for choice in answer["choices"]] == texts


async def test_many_prompts(server: Server) -> None:
    answer = await server.complete(prompt=["a", "b", [99]], regex="z", max_tokens=4)
    assert [choice["text"] for choice in answer["choices"]] == ["z"] * 3


async def test_chat_entries_have_the_allowed_mass(server: Server) -> None:
    fields: dict[str, Any] = {"regex": "[ab]c", "max_tokens": 9, "logprobs": True}
    plain = await server.chat(**fields | {"regex": None, "max_tokens": 2})
    assert not plain["choices"][0]["logprobs"]["content"][0].keys() & {"allowed_mass", "forced", "processed_logprob"}
    entries = (await server.chat(**fields))["choices"][0]["logprobs"]["content"]
    assert [entry["token_id"] for entry in entries] == [ord("a"), ord("c"), END]
    assert all(0 <= entry["allowed_mass"] < 1 for entry in entries)
    assert [entry.get("forced") for entry in entries] == [None, True, True]
    assert not any("processed_logprob" in entry for entry in entries)
    entries = (await server.chat(**fields, return_processed_logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [entry["processed_logprob"] for entry in entries] == [entry["logprob"] for entry in entries]


async def test_stream_has_the_entries_of_the_answer(server: Server) -> None:
    fields: dict[str, Any] = {"regex": "[ab]c", "max_tokens": 9, "logprobs": True, "return_processed_logprobs": True}
    chunks = await server.chat_stream(**fields)
    logprobs = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    entries = [entry for part in logprobs if part is not None for entry in part["content"]]
    assert entries == (await server.chat(**fields))["choices"][0]["logprobs"]["content"]


async def test_completion_columns_have_the_allowed_mass(server: Server) -> None:
    fields: dict[str, Any] = {"regex": "[ab]c", "max_tokens": 9, "logprobs": 1, "prompt": "Hi", "echo": True}
    columns = (await server.complete(**fields, return_processed_logprobs=True))["choices"][0]["logprobs"]
    assert columns["tokens"][:4] == ["H", "i", "a", "c"]
    assert columns["forced"] == [None, None, False, True, True]
    assert columns["processed_logprobs"][2:] == columns["token_logprobs"][2:]
    assert columns["processed_logprobs"][:2] == columns["allowed_mass"][:2] == [None, None]
    assert all(0 <= mass < 1 for mass in columns["allowed_mass"][2:])
    plain = (await server.complete(**fields | {"regex": None}))["choices"][0]["logprobs"]
    assert not plain.keys() & {"processed_logprobs", "allowed_mass", "forced"}


async def test_processed_logprobs_without_a_grammar(server: Server) -> None:
    answer = await server.chat(logprobs=True, return_processed_logprobs=True, max_tokens=2)
    for entry in answer["choices"][0]["logprobs"]["content"]:
        assert entry["processed_logprob"] == entry["logprob"]
        assert "allowed_mass" not in entry


JSON_SCHEMA = "response_format.json_schema"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {}}, "response_format.type", "must be one of 'text', 'json_object', 'json_schema', "),
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be one of"),
        ({"response_format": {"type": "json_schema"}}, JSON_SCHEMA, "must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, JSON_SCHEMA, "must be an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [], "name": "x"}}},
            f"{JSON_SCHEMA}.schema",
            "must be an object or a string",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
            f"{JSON_SCHEMA}.strict",
            "must be a boolean",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"items": {"not": {}}}}}},
            f"{JSON_SCHEMA}.schema",
            "keyword `not` is not supported at `/items/not`.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "shema": SCHEMA}}},
            f"{JSON_SCHEMA}.shema",
            "is not a field",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": None}}},
            f"{JSON_SCHEMA}.schema",
            "must be an object or a string",
        ),
        ({"response_format": {"type": "json_schema", "shema": SCHEMA}}, "response_format.shema", "is not a field"),
        (
            {"response_format": {"type": "json_schema", "schema": SCHEMA, "max": 1}},
            "response_format.max",
            "is not a field",
        ),
        ({"response_format": FORMAT | {"schema": SCHEMA}}, "response_format.schema", "is not a field"),
        ({"response_format": FORMAT | {"type": "json_object"}}, JSON_SCHEMA, "is not a field"),
        ({"response_format": FORMAT | {"type": "text"}}, JSON_SCHEMA, "is not a field"),
        (
            {"response_format": {"type": "structural_tag", "structures": []}},
            "response_format",
            "`structures` must be a list that is not empty.",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "must have exactly one of `json`, `regex`, `choice`, "),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "must have exactly one of"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "Extra inputs are not permitted"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "must be true"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "must contain at least one text"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "valid string"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "must not be empty"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar", "must not be empty"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "must be an object or a string"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "the schema is not JSON: line 1, column 2:"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "needs a JSON schema",
        ),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed group (character 2)."),
        ({"ebnf": 'root ::= "a" |\n('}, "ebnf", "line 2, column 2: "),
        ({"regex": 3}, "regex", "valid string"),
        ({"guided_choice": []}, "guided_choice", "must contain at least one text"),
        ({"guided_whitespace_pattern": "!"}, "guided_whitespace_pattern", "needs `guided_json` or"),
        (
            {"guided_whitespace_pattern": "!", "response_format": {"type": "json_object"}},
            "guided_whitespace_pattern",
            "needs `guided_json` or",
        ),
        (
            {"guided_whitespace_pattern": "!", "guided_regex": "a"},
            "guided_whitespace_pattern",
            "needs `guided_json` or",
        ),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf", "`ebnf` cannot be combined with `regex`."),
        ({"regex": "a", "response_format": FORMAT}, "regex", "cannot be combined with `response_format`"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "cannot be combined with a grammar"),
        ({"grammar_start": 0}, "grammar_start", "needs a grammar"),
        ({"grammar_start": 1_000, "regex": "a"}, "grammar_start", "is 1000, but the prompt has"),
        ({"grammar_start": 0, "regex": "!*"}, "grammar_start", "the grammar does not allow token "),
        ({"return_processed_logprobs": True}, "return_processed_logprobs", "needs `logprobs`"),
    ],
)
@PATHS
async def test_error(server: Server, path: str, fields: dict[str, Any], param: str, message: str) -> None:
    error = error_of(await server.post(path, body_of(path, **fields)), 400)
    assert error["param"] == param
    assert f"`{param}`" in error["message"]
    assert message in error["message"]


async def test_error_of_a_large_schema(server: Server) -> None:
    schema = {"description": "x" * 10_000_000}
    error = error_of(await server.post(CHAT, chat_body(json_schema=schema)), 400)
    assert (error["param"], error["message"]) == (
        "json_schema",
        "`json_schema`: the grammar has more than 1048576 characters.",
    )


@PATHS
async def test_error_of_a_full_queue(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def compile_grammar(*_: Any) -> None:
        raise GrammarBusyError

    monkeypatch.setattr("serve.grammar.compiler.GrammarCompiler.compile", compile_grammar)
    response = await server.post(path, body_of(path, regex="a"))
    assert error_of(response, 503)["code"] == "too_many_grammars"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
async def test_grammar_that_fails_at_run_time_is_an_error(server: Server, stream: bool) -> None:
    body = completion_body(regex="a", max_tokens=9, min_tokens=3, stream=stream)
    response = await server.post(COMPLETIONS, body)
    if stream:
        *_, error, done = [line for line in response.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        found = json.loads(error.removeprefix("data: "))["error"]
    else:
        found = error_of(response, 400)
    assert found["code"] == "grammar_error"
    assert "grammar" in found["message"]


async def test_server_that_stops_ends_the_threads_of_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = list[GrammarCompiler]()

    class Known(GrammarCompiler):
        def start(self) -> None:
            compilers.append(self)

    monkeypatch.setattr("serve.api.app.GrammarCompiler", Known)
    others = {*threading.enumerate()}
    with shared_server(b"!" * 9) as server:
        async with server.app.router.lifespan_context(server.app):
            assert await text_of(server, CHAT, regex="a") == "a"
        threads = [thread for thread in {*threading.enumerate()} - others if thread.name.startswith("mask")]
    assert threads
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="after shutdown"):
        await compilers[0].compile(GrammarSpec(GrammarKind.REGEX, "b"))


@pytest.mark.parametrize("fast", [False, True])
async def test_fast_forward_is_a_flag(fast: bool) -> None:
    async with serving(b"x", grammar_fast_forward=fast) as server:
        answer = await server.chat(structured_outputs={"choice": ["\0\1y", "\0\1z"]}, logprobs=True)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert entries[0].get("forced", False) == fast  # the token of both bytes, which may also be spelled by two
