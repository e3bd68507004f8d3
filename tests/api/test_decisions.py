"""POST /v1/decisions and /v1/systemone, with a model whose log-probs can be computed by hand."""

import asyncio
import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from serve.api.decisions.responses import DecisionsAnswer, SystemOneAnswer, ValidationErrors
from serve.api.keys import ApiKeys
from serve.api.middleware import AnswerRecord
from serve.config.api_keys import ApiKey
from tests.support.fake_runner import hidden_after
from tests.support.http_client import (
    MODEL,
    Gate,
    Server,
    alter_events,
    answered,
    error_of,
    parse_unique,
    serving,
    submitted,
)

SERVER_OPTIONS: dict[str, Any] = {"script": None}
DECISIONS, SYSTEM_ONE = "/v1/decisions", "/v1/systemone"
LABELS = {"true": "y", "false": "n"}  # the tokenizer has no token "Yes"
PREDICATE: dict[str, Any] = {"type": "predicate", "name": "greets", "instructions": "Does it greet?", "labels": LABELS}
CHOICE: dict[str, Any] = {
    "type": "choice",
    "name": "tone",
    "instructions": "Which tone?",
    "choices": [{"value": "calm"}, {"value": True, "description": "pushy"}, {"value": "true"}],
}
SCORE: dict[str, Any] = {
    "type": "score",
    "name": "urgency",
    "instructions": "How urgent?",
    "levels": [{"label": "low"}, {"label": "high", "description": "today"}],
}
NOUL: dict[str, Any] = {"type": "noul", "instructions": "Does it greet?", "labels": LABELS}
TONE: dict[str, Any] = {"type": "choice", "instructions": "Which tone?", "criteria": {"calm": None, "pushy": "loud"}}
URGENCY: dict[str, Any] = {"type": "score", "instructions": "How urgent?", "criteria": ["low", {"when": "today"}]}


def openai(*questions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"input": "Hi!", "questions": [*questions]} | fields


def typesafe(fields: dict[str, Any] | None = None, **questions: Any) -> dict[str, Any]:
    return {"state": {"text": "Hi!"}, "questions": questions or {"greets": NOUL}} | (fields or {})


async def decide(server: Server, body: dict[str, Any], path: str = DECISIONS) -> Any:
    answer = answered(await server.post(path, body))
    (DecisionsAnswer if path == DECISIONS else SystemOneAnswer).model_validate_json(json.dumps(answer))
    return answer


async def refused(server: Server, body: Any) -> tuple[str | None, str | None, str]:
    error = error_of(await server.post(DECISIONS, body), 400)
    return error["param"], error["code"], error["message"]


async def refused_by_system_one(server: Server, body: Any) -> Any:
    """The detail of the error."""
    response = await server.post(SYSTEM_ONE, body)
    assert response.status_code == 422, response.text
    [detail] = ValidationErrors.model_validate_json(response.content).model_dump()["detail"]
    assert detail["loc"][0] == "body"
    return detail


def logprobs(prompt: list[int], labels: str) -> list[float]:
    hidden = hidden_after(prompt)
    return [-((label + hidden) % 7) / 8 for label in labels.encode()]


def softmax(values: list[float], temperature: float = 1) -> list[float]:
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


async def test_answers_of_openai(server: Server) -> None:
    body = openai(PREDICATE, CHOICE, SCORE, return_token_ids=True)
    answer = await decide(server, body)
    predicate, choice, score = answer["answers"]
    prompts = [entry["evidence"]["prompt_token_ids"][0] for entry in answer["answers"]]
    assert all(bytes(prompt).startswith(b"user:Hi!\n\n") for prompt in prompts)

    values = logprobs(prompts[0], "yn")
    assert predicate["probability"] == pytest.approx(softmax(values)[0])
    assert (predicate["type"], predicate["name"]) == ("predicate", "greets")
    evidence = predicate["evidence"]
    assert (evidence["logprobs"], evidence["labels"]) == (values, [["y"], ["n"]])
    assert evidence["label_token_ids"] == [[ord("y")], [ord("n")]]
    assert evidence["label_mass"] == pytest.approx(sum(map(math.exp, values)))
    assert (evidence["scoring"], evidence["temperature"]) == ("labels", 1.0)

    expected = softmax(logprobs(prompts[1], "ABC"))
    assert [option["probability"] for option in choice["probabilities"]] == pytest.approx(expected)
    assert [option["value"] for option in choice["probabilities"]] == ["calm", True, "true"]
    assert choice["choice"] == ["calm", True, "true"][expected.index(max(expected))]
    assert choice["confidence"] == pytest.approx(max(0, (max(expected) - 1 / 3) / (2 / 3)))
    assert "max(p)" in choice["evidence"]["confidence_formula"]

    expected = softmax(logprobs(prompts[2], "AB"))
    assert score["probabilities"] == [
        {"value": 0, "label": "low", "probability": pytest.approx(expected[0])},
        {"value": 1, "label": "high", "probability": pytest.approx(expected[1])},
    ]
    assert score["score"] == pytest.approx(expected[1])
    assert score["evidence"]["score_formula"]
    tokens, cached = sum(map(len, prompts)), sum(entry["evidence"]["cached_tokens"] for entry in answer["answers"])
    assert answer["model"] == MODEL
    assert answer["usage"] == {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": tokens - cached},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }


async def test_answers_of_typesafe(server: Server) -> None:
    body = typesafe({"return_token_ids": True}, **{"a.b": NOUL, "tone": TONE, "urgency": URGENCY})
    answer = await decide(server, body, SYSTEM_ONE)
    answers = answer["answers"]
    assert [*answers] == ["a.b", "tone", "urgency"]
    prompts = [entry["evidence"]["prompt_token_ids"][0] for entry in answers.values()]
    assert all(bytes(prompt).startswith(b'user:{"text": "Hi!"}\n\n') for prompt in prompts)
    assert answers["a.b"]["noul"] == pytest.approx(softmax(logprobs(prompts[0], "yn"))[0])
    expected = softmax(logprobs(prompts[1], "AB"))
    assert answers["tone"]["probabilities"] == pytest.approx(dict(zip(("calm", "pushy"), expected, strict=True)))
    assert answers["tone"]["choice"] == ("calm" if expected[0] >= expected[1] else "pushy")
    expected = softmax(logprobs(prompts[2], "AB"))
    assert answers["urgency"]["probabilities"] == pytest.approx({"0": expected[0], "1": expected[1]})
    assert answers["urgency"]["legend"] == {"0": "low", "1": {"when": "today"}}
    assert answer["usage"]["input_tokens"] == sum(map(len, prompts))


async def test_both_forms_give_the_same_numbers(server: Server) -> None:
    one = await decide(server, typesafe({"state": "Hi!"}, greets=NOUL, tone=TONE), SYSTEM_ONE)
    choices = [{"value": "calm"}, {"value": "pushy", "description": "loud"}]
    other = await decide(server, openai(PREDICATE, CHOICE | {"choices": choices}))
    assert one["answers"]["greets"]["noul"] == other["answers"][0]["probability"]
    assert list(one["answers"]["tone"]["probabilities"].values()) == [
        option["probability"] for option in other["answers"][1]["probabilities"]
    ]


ITEMS: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be strict."},
    {"role": "system", "content": [{"type": "input_text", "text": "Rule."}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}], "phase": "commentary"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a": 1}', "status": "completed"},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "found"}]},
    {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls", "namespace": None},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": "files"},
    {
        "role": "user",
        "content": [{"type": "input_json", "data": {"k": [1, None]}}, {"type": "input_text", "text": "z"}],
    },
]


async def test_every_item_of_the_input_is_in_the_prompt(server: Server) -> None:
    answer = await decide(server, openai(PREDICATE, input=ITEMS, return_token_ids=True))
    text = bytes(answer["answers"][0]["evidence"]["prompt_token_ids"][0]).decode()
    for part in ("Be strict.", "Rule.", "Hi", "Yes?", "No.", "look", '{"a": 1}', "found", "run", "ls", "files"):
        assert part in text
    assert '{"k": [1, null]}' in text
    assert text.index("z") < text.index("Does it greet?")
    assert text.endswith(">")  # the generation prompt


async def test_instructions_in_parts(server: Server) -> None:
    parts = [{"type": "input_text", "text": "Is it"}, {"type": "input_json", "data": {"k": 1}}]
    answer = await decide(server, openai(PREDICATE | {"instructions": parts}, return_token_ids=True))
    assert b'Is it\n{"k": 1}' in bytes(answer["answers"][0]["evidence"]["prompt_token_ids"][0])


@pytest.mark.parametrize("temperature", [0.5, 2])
async def test_temperature(server: Server, temperature: float) -> None:
    answer = await decide(server, openai(CHOICE, temperature=temperature))
    evidence, options = answer["answers"][0]["evidence"], answer["answers"][0]["probabilities"]
    assert [option["probability"] for option in options] == pytest.approx(softmax(evidence["logprobs"], temperature))
    assert evidence["temperature"] == temperature


async def test_scoring_by_sequences_and_permutations(server: Server) -> None:
    for scoring, fields, names in (
        ("sequences", {"normalize": "byte"}, {"normalize", "normalized", "encoded_apart", "counts_end_of_turn"}),
        ("sequences", {"normalize": "pmi"}, {"prior_logprobs"}),
        ("permutations", {"permutations": 2}, {"orders", "spread", "labels"}),
        ("permutations", {}, {"orders"}),
    ):
        answer = await decide(server, openai(CHOICE, scoring=scoring, **fields))
        evidence = answer["answers"][0]["evidence"]
        assert evidence["scoring"] == scoring
        assert names <= evidence.keys()
        assert sum(option["probability"] for option in answer["answers"][0]["probabilities"]) == pytest.approx(1)
    assert len(evidence["orders"]) == 6  # of 3 options


async def test_default_of_scoring_is_a_flag() -> None:
    async with serving(None, decision_scoring="sequences") as server:
        answer = await decide(server, openai(CHOICE))
        assert answer["answers"][0]["evidence"]["scoring"] == "sequences"
        answer = await decide(server, openai(CHOICE, scoring="labels"))
        assert answer["answers"][0]["evidence"]["scoring"] == "labels"


async def test_limits_of_questions_options_and_levels(server: Server) -> None:
    question = {"type": "predicate", "instructions": "?", "labels": LABELS}
    answer = await decide(server, openai(*[question] * 400))
    assert [entry["name"] for entry in answer["answers"]] == [None] * 400
    assert (await refused(server, openai(*[question] * 401)))[:2] == ("questions", "array_above_max_length")
    levels = [{"label": str(i)} for i in range(11)]
    assert len((await decide(server, openai(SCORE | {"levels": levels[:10]})))["answers"][0]["probabilities"]) == 10
    param, code, message = await refused(server, openai(SCORE | {"levels": levels}))
    assert (param, code) == ("questions[0]", "array_above_max_length")
    assert "'urgency'" in message
    choices = [{"value": f"{i}"} for i in range(256)]
    param, code, _ = await refused(server, openai(CHOICE | {"choices": choices}))
    assert (param, code) == ("questions[0]", "array_above_max_length")
    questions = {f"q{i}": NOUL for i in range(401)}
    detail = await refused_by_system_one(server, typesafe(**questions))
    assert (detail["loc"], detail["type"]) == (["body", "questions"], "array_above_max_length")


async def test_255_options_as_sequences() -> None:
    async with serving(None, max_model_len=4096, pages=80) as server:
        choices = [{"value": f"{i:03}"} for i in range(255)]
        answer = await decide(server, openai(CHOICE | {"choices": choices}, scoring="sequences"))
        probabilities = [option["probability"] for option in answer["answers"][0]["probabilities"]]
        assert len(probabilities) == 255
        assert sum(probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"questions": [PREDICATE]}, "input", "missing"),
        ({"input": "Hi"}, "questions", "missing"),
        (openai(), "questions", "1 to 400"),
        (openai(PREDICATE, input=" \n"), "input", "blank"),
        (openai(PREDICATE, input=[]), "input", "1 to"),
        (openai(PREDICATE, input=[{"role": "user", "content": ""}]), "input", "blank"),
        (openai(PREDICATE, input=[{"role": "tool", "content": "a"}]), "input[0].role", "user"),
        (openai(PREDICATE, input=[ITEMS[6]]), "input[0].call_id", "c1"),
        (openai(PREDICATE, PREDICATE), "questions[1].name", "'greets'"),
        (openai(CHOICE | {"choices": [{"value": "a"}, {"value": "a"}]}), "questions[0]", '"a"'),
        (openai(CHOICE | {"choices": [{"value": "a"}]}), "questions[0].choices", "'tone'"),
        (openai(CHOICE | {"choices": [{"value": 1}, {"value": "a"}]}), "questions[0].choices[0].value", "'tone'"),
        (openai({"type": "predicate", "name": "p"}), "questions[0].instructions", "'p'"),
        (openai({"id": "a", "type": "yes_no", "question": "Is it?"}), "questions[0]", "SGLang"),
        (openai(PREDICATE | {"instruction": "?"}), "questions[0].instruction", "instructions"),
        (openai(CHOICE | {"choices": [{"value": "a", "label": 1}] * 2}), "questions[0].choices[0].label", "`label"),
        (openai({"type": "box", "instructions": "?"}), "questions[0].type", "predicate"),
        (openai({"type": "predicate", "name": "p", "instructions": "?"}), "questions[0]", "'Yes'"),
        (openai(PREDICATE | {"labels": {"true": "yes", "false": "n"}}), "questions[0]", "'yes'"),
        (openai(PREDICATE | {"labels": {"true": "n", "false": "n"}}), "questions[0]", "'n'"),
        (openai(SCORE, PREDICATE | {"instructions": "x" * 600}), "questions[1]", "'greets'"),
        (openai(CHOICE, scoring="letters"), "scoring", "labels"),
        (openai(CHOICE, normalize="byte"), "normalize", "scoring` sequences"),
        (openai(CHOICE, permutations=2), "permutations", "scoring` permutations"),
        (openai(PREDICATE, scoring="sequences"), "questions[0].labels", "labels or permutations"),
        (openai(CHOICE, temperature=0), "temperature", "0.001"),
        (openai(CHOICE, stream=True), "stream", "not a field"),
        (openai(CHOICE, chat_template_kwargs={}), "chat_template_kwargs", "not a field"),
        (openai(CHOICE, instructions="Be strict"), "instructions", "not supported"),
        (openai(CHOICE, safety_identifier="x" * 129), "safety_identifier", "128"),
        (openai(CHOICE, prompt_cache_options={"mode": "never"}), "prompt_cache_options.mode", "implicit"),
        (openai(CHOICE, prompt_cache_options={"ttl": "1h"}), "prompt_cache_options.ttl", "30m"),
        (openai(CHOICE, prompt_cache_options={"size": 1}), "prompt_cache_options.size", "not permitted"),
    ],
)
async def test_error_names_field_question_and_option(
    server: Server, body: dict[str, Any], param: str, part: str
) -> None:
    found, _, message = await refused(server, body)
    assert found == param
    assert part in message


@pytest.mark.parametrize("where", ["input", "output", "instructions"])
async def test_error_images_name_the_part(server: Server, where: str) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "data:image/png;base64,"}]
    bodies = {
        "input": (openai(PREDICATE, input=[{"role": "user", "content": parts}]), "input[0].content[1]"),
        "output": (openai(PREDICATE, input=[ITEMS[5], ITEMS[6] | {"output": parts}]), "input[1].output[1]"),
        "instructions": (openai(PREDICATE | {"instructions": parts}), "questions[0].instructions[1]"),
    }
    body, param = bodies[where]
    found, code, message = await refused(server, body)
    assert (found, code) == (param, "unsupported_parameter")
    assert "image" in message


@pytest.mark.parametrize(
    ("body", "location", "part"),
    [
        ({"questions": {"a": NOUL}}, ["state"], "missing"),
        (typesafe({"state": None}), ["state"], "missing"),
        (typesafe({"state": "  "}), ["state"], "blank"),
        (typesafe({"state": {}}), ["state"], "blank"),
        (typesafe({"state": False}), ["state"], "string, an object or a list"),
        (typesafe(a=URGENCY | {"criteria": ["x", None]}), ["questions", "a", "criteria", 1], "'a'"),
        ({"state": "a"}, ["questions"], "missing"),
        (typesafe({"questions": {}}), ["questions"], "1 to 400"),
        (typesafe({"questions": [NOUL]}), ["questions"], "object"),
        (typesafe(**{"a.b": {"type": "noul"}}), ["questions", "a.b", "instructions"], "'a.b'"),
        (typesafe(**{"a[0]": TONE | {"criteria": {}}}), ["questions", "a[0]", "criteria"], "'a[0]'"),
        (typesafe(a=URGENCY | {"criteria": []}), ["questions", "a", "criteria"], "'a'"),
        (typesafe(a=URGENCY | {"criteria": ["x", 5]}), ["questions", "a", "criteria", 1], "'a'"),
        (typesafe(a=TONE | {"criteria": {"x": 5}}), ["questions", "a", "criteria", "x"], "'a'"),
        (typesafe(a=TONE | {"extra": 5}), ["questions", "a", "extra"], "extra"),
        (typesafe(a={"type": "box"}), ["questions", "a", "type"], "noul"),
        (typesafe(a=URGENCY | {"criteria": ["x"] * 2}), ["questions", "a"], '"x"'),
        (typesafe(a=NOUL | {"instructions": "x" * 600}), ["questions", "a"], "'a'"),
        (typesafe(a={"type": "noul", "instructions": "?"}), ["questions", "a"], "'Yes'"),
        (typesafe({"temperature": 0}), ["temperature"], "0.001"),
        (typesafe({"temperature": "1"}), ["temperature"], "number"),
        (typesafe({"assets": {"x": {"type": "image"}}}), ["assets"], "not supported"),
        (typesafe({"joint": True}), ["joint"], "not supported"),
        (typesafe({"scoring": "permutations"}, a=TONE | {"criteria": dict.fromkeys("abcdef")}), None, "permutations"),
    ],
)
async def test_error_of_system_one_is_a_list(
    server: Server, body: dict[str, Any], location: list[str | int] | None, part: str
) -> None:
    detail = await refused_by_system_one(server, body)
    assert part in detail["msg"]
    assert location is None or detail["loc"] == ["body", *location]


@pytest.mark.parametrize(
    ("body", "location", "param"),
    [
        ('{"state": "a", "questions": {"a.b": {}, "a.b": {}}}', ["questions", "a.b"], "questions.a.b"),
        ('{"state": "a", "questions": {"a": {}, "\\u0061": {}}}', ["questions", "a"], "questions.a"),
        (
            '{"questions": {"b": {"criteria": {"x": null, "y": null, "x": "z"}}}}',
            ["questions", "b", "criteria", "x"],
            "questions.b.criteria.x",
        ),
        ('{"state": [1, {"k": -1.5e300, "k": 2}]}', ["state", 1, "k"], "state[1].k"),
        ('{"state": "a", "state": "b"}', ["state"], "state"),
        ('{"state": {"a": {"x": 1, "x": 2}, "a": 3}}', ["state", "a"], "state.a"),  # the inner object is lost
        ('{"state": {"' + "k" * 5000 + '": 1, "' + "k" * 5000 + '": 2}}', ["state", "k" * 100], "state." + "k" * 100),
        ('{"state": ' + '{"s":' * 900 + '{"x":1,"x":2}' + "}" * 900 + "}", ["state", *"s" * 63], "s.s"),
    ],
    ids=("name", "escaped", "option", "state", "field", "hidden", "long", "deep"),
)
async def test_error_of_system_one_for_a_repeated_key(
    server: Server, body: str, location: list[str | int], param: str
) -> None:
    detail = await refused_by_system_one(server, body.encode())
    assert detail["loc"] == ["body", *location]
    assert f"The key {str(location[-1])[:100]!r}" in detail["msg"] or len(location) == 64
    assert param in detail["msg"]


async def test_equal_keys_of_different_objects(server: Server) -> None:
    nested = {"text": [-1.5, {"text": "a"}, {"text": "a"}, {"tex": 1, "text": 10**300}]}
    await decide(server, typesafe({"state": {"text": nested}}, text=NOUL, calm=TONE), SYSTEM_ONE)


async def test_system_one_serves_one_option(server: Server) -> None:
    answer = await decide(
        server, typesafe(a=TONE | {"criteria": {"x": None}}, b=URGENCY | {"criteria": ["y"]}), SYSTEM_ONE
    )
    assert answer["answers"]["a"] | {"evidence": None} == {
        "type": "choice",
        "choice": "x",
        "confidence": 1.0,
        "probabilities": {"x": 1.0},
        "evidence": None,
    }
    assert answer["answers"]["b"]["probabilities"] == {"0": 1.0}


@pytest.mark.parametrize("body", [b'{"state": NaN}', b'{"state": "a", "questions": {"a": {"criteria": [Infinity]}}}'])
async def test_error_nan_in_json(server: Server, body: bytes) -> None:
    for path in (DECISIONS, SYSTEM_ONE):
        assert error_of(await server.post(path, body), 400)["code"] == "invalid_json"


async def test_nan_as_a_string_is_text(server: Server) -> None:
    answer = await decide(server, typesafe({"state": {"x": "NaN"}, "return_token_ids": True}), SYSTEM_ONE)
    assert b'{"x": "NaN"}' in bytes(answer["answers"]["greets"]["evidence"]["prompt_token_ids"][0])


async def test_error_multipart_names_assets(server: Server) -> None:
    response = await server.post(SYSTEM_ONE, b"--x--", **{"content-type": "multipart/form-data; boundary=x"})
    error = error_of(response, 400)
    assert error["code"] == "invalid_content_type"
    assert "Assets" in error["message"]


async def test_other_errors_of_system_one_have_openais_envelope(server: Server) -> None:
    response = await server.post(SYSTEM_ONE, typesafe({"model": "jev-latest"}))
    assert error_of(response, 404)["code"] == "model_not_found"
    assert response.headers["x-typesafe-request-id"] == response.headers["x-request-id"]
    response = await server.post(SYSTEM_ONE, typesafe(), **{"x-request-id": "r1"})
    assert (response.status_code, response.headers["x-typesafe-request-id"]) == (200, "r1")
    assert "x-typesafe-request-id" not in (await server.post(DECISIONS, openai(CHOICE))).headers


async def test_request_id_of_typesafe_on_an_error_without_a_key() -> None:
    async with serving(None, api_key=("a",)) as server:
        response = await server.post(SYSTEM_ONE, typesafe())
        assert error_of(response, 401)
        assert response.headers["x-typesafe-request-id"]


async def test_cached_state_counts_in_usage(fresh_server: Server) -> None:
    text = "x" * 130  # two pages with what precedes it
    first = await decide(fresh_server, openai(PREDICATE, input=text))
    assert first["usage"]["input_tokens_details"]["cached_tokens"] == 0
    second = await decide(fresh_server, openai(CHOICE, input=text))
    details, cached = second["usage"]["input_tokens_details"], second["answers"][0]["evidence"]["cached_tokens"]
    assert 128 <= cached < len("user:") + 130 + len("\n\nWhich")  # where the prompts differ
    assert details == {"cached_tokens": cached, "cache_write_tokens": second["usage"]["input_tokens"] - cached}


async def test_cache_key_and_salt_partition_the_cache(fresh_server: Server) -> None:
    requests = submitted(fresh_server)

    async def salt(**fields: Any) -> str:
        await decide(fresh_server, openai(CHOICE, **fields))
        return requests[-1].cache_salt

    assert await salt() == ""
    assert await salt(cache_salt="s") == "s"
    assert await salt(prompt_cache_key="a/b") == "/a/b"
    assert await salt(prompt_cache_key="k", cache_salt="s") == "s/k"
    assert await salt(prompt_cache_options={"mode": "implicit", "ttl": "30m"}) == ""
    explicit = {"mode": "explicit"}
    salts = [await salt(prompt_cache_options=explicit) for _ in range(2)]
    assert len({*salts, ""}) == 3
    part = {"type": "input_text", "text": "Hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
    items = [{"role": "user", "content": [part]}]
    assert await salt(prompt_cache_options=explicit, input=items) == ""
    await decide(fresh_server, typesafe({"cache_salt": "s"}), SYSTEM_ONE)
    assert requests[-1].cache_salt == "s"


async def test_tokens_are_charged() -> None:
    keys = ApiKeys([ApiKey(name="alice", key="a", tokens_per_minute=200)], clock=lambda: 0.0)
    async with serving(None, api_keys=keys, api_key=("a",)) as server:
        response = await server.post(DECISIONS, openai(PREDICATE), **{"X-Api-Key": "a"})
        tokens = response.json()["usage"]["input_tokens"]
        assert response.headers["x-ratelimit-remaining-tokens"] == str(200 - tokens)
        response = await server.post(DECISIONS, openai(PREDICATE, CHOICE), **{"X-Api-Key": "a"})
        assert error_of(response, 429)


async def test_access_record_has_the_engines_work() -> None:
    records: list[AnswerRecord] = []
    async with serving(None, on_answer=records.append) as server:
        answer = await decide(server, openai(PREDICATE, CHOICE))
        await refused_by_system_one(server, {})
    work = records[0].work
    assert work is not None
    assert (records[0].handler, work.prompt_tokens) == (DECISIONS, answer["usage"]["input_tokens"])
    assert (records[1].handler, records[1].status, records[1].error) == (SYSTEM_ONE, 422, "missing_required_parameter")


async def test_disconnect_frees_the_engine(fresh_server: Server) -> None:
    gate = Gate("prefill")
    fresh_server.runner.before_call = gate
    task = asyncio.create_task(decide(fresh_server, openai(*[CHOICE | {"name": f"q{i}"} for i in range(200)])))
    await gate.reached()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.open()
    while fresh_server.engine.num_requests:
        await asyncio.sleep(0)
    await fresh_server.assert_idle()


@pytest.mark.parametrize("path", [DECISIONS, SYSTEM_ONE])
async def test_nan_is_an_error(fresh_server: Server, path: str) -> None:
    def spoil(event: Any) -> Any:
        event.prompt_logprobs.top_logprobs[-1, 1] = math.nan
        return event

    alter_events(fresh_server, spoil)
    body = openai(PREDICATE) if path == DECISIONS else typesafe()
    assert error_of(await fresh_server.post(path, body), 500)["code"] == "engine_error"


async def test_error_too_many_prompts(server: Server) -> None:
    choice = CHOICE | {"choices": [{"value": f"{i}"} for i in range(60)]}
    questions = [choice | {"name": f"q{i}"} for i in range(300)]
    param, code, message = await refused(server, openai(*questions, scoring="sequences"))
    assert (param, code) == ("questions", "array_above_max_length")
    assert "18000" in message
    async with serving(None, max_body_bytes=4096) as small:
        param, code, message = await refused(small, openai(choice, scoring="permutations", permutations=120))
        assert (param, code) == ("permutations", "array_above_max_length")


async def test_answer_above_the_memory_of_unsent_answers() -> None:
    async with serving(None, max_unsent_bytes=600_000) as server:
        questions = [PREDICATE | {"name": f"q{i}"} for i in range(400)]
        assert (await refused(server, openai(*questions, return_token_ids=True)))[:2] == (None, "answer_too_large")
        assert len((await decide(server, openai(*questions[:50])))["answers"]) == 50


async def test_large_answers_stay_below_their_estimate(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("serve.api.scoring._reserve", lambda _, size: sizes.append(size))
    names = [f"Option number {i} of {'x' * 20}" for i in range(5)]
    for body, path in (
        (openai(*[PREDICATE | {"name": f"q{i}"} for i in range(50)]), DECISIONS),
        (openai(CHOICE, return_token_ids=True), DECISIONS),
        (
            openai(CHOICE | {"choices": [{"value": name} for name in names]}, scoring="sequences", normalize="pmi"),
            DECISIONS,
        ),
        (openai(CHOICE, scoring="permutations", return_token_ids=True), DECISIONS),
        (
            typesafe(a=TONE | {"criteria": dict.fromkeys(names)}, b=URGENCY | {"criteria": [{"k": n} for n in names]}),
            SYSTEM_ONE,
        ),
    ):
        response = await server.post(path, body)
        assert response.status_code == 200, response.text
        assert len(response.content) <= sizes[-1]


async def test_compressed_body_and_answer(server: Server) -> None:
    questions = [PREDICATE | {"name": f"q{i}"} for i in range(100)]
    response = await server.post(DECISIONS, openai(*questions), **{"accept-encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"
    assert len(parse_unique(response.text)["answers"]) == 100


ODD: list[Any] = [None, True, 0, -1.5, 1 << 70, "", "x", [], {}, [[]], [{}], {"type": "x"}, {"type": []}]


def replaced(value: Any) -> Iterator[Any]:
    """Copies of a JSON value in which one inner value is another, or a field is missing or unknown."""
    yield from ODD
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        for other in replaced(child):
            yield {**value, key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]
    if isinstance(value, dict):
        yield from ({name: child for name, child in value.items() if name != key} for key in value)
        yield {**value, "unknown": 1}


@pytest.mark.parametrize("path", [DECISIONS, SYSTEM_ONE])
async def test_every_replaced_value_is_answered_or_refused(server: Server, path: str) -> None:
    questions = [PREDICATE, CHOICE, SCORE | {"levels": SCORE["levels"] + [{"label": "z", "labels": ["z", "Z"]}]}]
    body = openai(*questions, input=ITEMS, prompt_cache_options={"mode": "explicit"}, scoring="labels", temperature=1)
    if path == SYSTEM_ONE:
        body = typesafe({"temperature": 1}, greets=NOUL, tone=TONE | {"labels": {"calm": "c"}}, urgency=URGENCY)
    refusals = 0
    for other in islice(replaced(body), 0, None, 3):  # `tools.fuzz` has more
        response = await server.post(path, other)
        assert response.status_code in (200, 400, 404, 422), (other, response.text)
        if response.status_code != 200:
            refusals += 1
            answer = response.json()
            message = answer["error"]["message"] if "error" in answer else answer["detail"][0]["msg"]
            assert message.endswith("."), (other, message)
    assert refusals > 50


async def test_model_without_a_chat_template() -> None:
    async with serving(None, chat_template=None) as server:
        answer = await decide(server, openai(CHOICE, scoring="sequences", return_token_ids=True))
        assert answer["answers"][0]["evidence"]["counts_end_of_turn"] is False
        text = bytes(answer["answers"][0]["evidence"]["prompt_token_ids"][0]).decode()
        assert text.startswith("Hi!\n\nWhich tone?")
        assert text.endswith("\n\nAnswer:")


async def test_error_empty_prompt() -> None:
    """A chat template that ignores its messages."""
    async with serving(None, chat_template="{# nothing #}") as server:
        param, _, message = await refused(server, openai(CHOICE))
        assert param == "questions[0]"
        assert "no tokens" in message
