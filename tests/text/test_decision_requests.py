"""Requests for decisions: bad ones are refused by an error that names the field and the question."""

from collections.abc import Iterator
from typing import Any

import pytest

from serve.text.chat import PromptError
from serve.text.decisions.questions import decision_request
from tests.text.test_decisions import CALL, RESULT, choice


def bad_requests() -> Iterator[Any]:
    noul = {"type": "noul", "instructions": "Good?"}
    two = [{"value": "a"}, {"value": "b"}]
    openai = {"type": "choice", "instructions": "Which?", "choices": two}

    def state(**question: Any) -> dict[str, Any]:
        return {"state": "x", "questions": {"q": question}}

    def listed(*questions: Any, **more: Any) -> dict[str, Any]:
        return {"input": "x", "questions": [*questions], **more}

    deep: Any = "x"
    for _ in range(70):
        deep = [deep]
    yield {"questions": {"q": noul}}, "state", "is missing"
    yield {"state": " \n", "questions": {"q": noul}}, "state", "blank"
    yield {"state": None, "questions": {"q": noul}}, "state", "blank"
    blank: Any
    for blank in ({}, [], "\U000f0000 \U000f0001"):
        yield {"state": blank, "questions": {"q": noul}}, "state", "blank"
    for scalar in (5, 0.5, True):
        yield {"state": scalar, "questions": {"q": noul}}, "state", "a string, an object or a list"
    yield {"state": "x", "questions": {"q": noul}, "normalize": "sum"}, "normalize", "an option of all requests"
    yield {"state": "x", "question": {"q": noul}}, "question", "did you mean 'questions'"
    yield {"state": "x", "input": "x", "questions": []}, "state", "cannot both"
    yield {"state": {"a": float("nan")}, "questions": {"q": noul}}, "state.a", "finite"
    yield {"state": deep, "questions": {"q": noul}}, "state", "nested"
    yield {"state": {"a": {1}}, "questions": {"q": noul}}, "state.a", "not a JSON value"
    yield {"state": {1: "a"}, "questions": {"q": noul}}, "state", "not a string"
    yield {"state": "x", "questions": {}}, "questions", "1 to 400"
    yield {"state": "x", "questions": []}, "questions", "must be an object"
    yield {"state": "x", "questions": dict.fromkeys(map(str, range(401)), noul)}, "questions", "not 401"
    yield {"state": "x", "questions": {"q": "?"}}, "questions.q", "must be an object"
    yield state(type="noul"), "questions.q.instructions", "neither instructions nor criteria"
    yield state(type="noul", instructions="", criteria={"true": None}), "questions.q.instructions", "neither"
    for blank in ({}, [], " \n", "\U000f0000"):
        criteria: dict[str, Any] = {"true": blank, "false": None}
        yield state(type="noul", instructions=blank, criteria=criteria), "questions.q.instructions", "neither"
        if isinstance(blank, str):
            yield listed({"type": "predicate", "instructions": blank}), "questions[0].instructions", "is blank"
    yield state(type="score", criteria=["a", None]), "questions.q.criteria[1]", "string, an object"
    yield state(type="noul", instructions=7), "questions.q.instructions", "string, an object or a list"
    yield state(type="noul", criteria={"yes": "x"}), "questions.q.criteria", "`true` and `false`"
    yield state(type="box"), "questions.q.type", "one of noul, choice, score"
    yield state(type="choice"), "questions.q.criteria", "at least one item"
    yield state(type="choice", criteria={"a": 7}), "questions.q.criteria.a", "string, an object"
    yield (
        state(type="choice", criteria=dict.fromkeys(map(str, range(256)))),
        "questions.q",
        "256 options, more than the maximum of 255",
    )
    yield state(type="score", criteria=["x"] * 2), "questions.q", '"x" occurs twice'
    yield state(type="score", criteria=list("abcdefghijk")), "questions.q", "11 levels"
    yield state(type="noul", instruction="x"), "questions.q.instruction", "did you mean 'instructions'"
    yield state(**choice(2, extra="E")), "questions.q.labels.extra", "not an option"
    yield state(**choice(2, **{"option 0": []}) | {"labels": []}), "questions.q.labels", "must be an object"
    yield state(**choice(2, **{"option 0": " "})), "questions.q.labels.option 0", "not blank"
    yield state(type="score", criteria=["a", "b"], labels=["x"]), "questions.q.labels", "list of 2"
    yield listed(), "questions", "not 0"
    yield listed(noul), "questions[0].type", "one of predicate, choice, score"
    yield listed({**openai, "name": "n"}, {**openai, "name": "n"}), "questions[1].name", "the same name"
    yield listed({**openai, "name": 7}), "questions[0].name", "a string"
    yield listed({**openai, "choices": [*two, {"value": "a"}]}), "questions[0]", '"a" occurs twice'
    yield listed({**openai, "choices": two[:1]}), "questions[0].choices", "at least 2"
    yield listed({**openai, "choices": [7, 8]}), "questions[0].choices[0]", "an object with `value`"
    yield listed({**openai, "choices": [{"value": 1}, *two]}), "questions[0].choices[0].value", "string or a boolean"
    yield listed({**openai, "choices": [{"value": ""}, *two]}), "questions[0].choices[0].value", "empty"
    yield listed({**openai, "choices": [{**two[0], "rank": 1}, *two]}), "questions[0].choices[0].rank", "unknown"
    yield listed({"type": "predicate"}), "questions[0].instructions", "is missing"
    yield listed({"id": "a", "question": "?"}), "questions[0]", "SGLang"
    image = [{"type": "input_image", "image_url": "data:"}]
    yield listed({**openai, "instructions": image}), "questions[0].instructions[0]", "images are not supported"
    yield listed(openai, input=[{"role": "user", "content": image}]), "input[0].content[0]", "images are not"
    yield listed(openai, input=[{"role": "tool", "content": "x"}]), "input[0].role", "one of user"
    yield listed(openai, input=[{"type": "reasoning"}]), "input[0].type", "function_call_output"
    yield listed(openai, input=[RESULT]), "input[0].call_id", "no item of type function_call"
    yield listed(openai, input=[CALL, {**RESULT, "type": "custom_tool_call_output"}]), "input[1].call_id", "custom_tool"
    yield listed(openai, input=[{**CALL, "arguments": {}}]), "input[0].arguments", "must be a string"
    yield (
        listed(openai, input=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        "input[0].content[0].type",
        "input_text",
    )
    yield (
        listed(openai, input=[{"role": "user", "content": [{"type": "input_json", "data": 1}]}]),
        "input[0].content[0].data",
        "object",
    )
    user, text = {"role": "user", "content": "x"}, {"type": "input_text", "text": "x"}
    for item, field in (
        ({**user, "name": "n"}, "name"),
        ({**user, "phase": "commentary"}, "phase"),
        ({**CALL, "output": "x"}, "output"),
        ({**CALL, "type": "custom_tool_call", "input": "x"}, "arguments"),
    ):
        yield listed(openai, input=[item]), f"input[0].{field}", "unknown field"
    yield listed(openai, input=[CALL, {**RESULT, "name": "n"}]), "input[1].name", "unknown field"
    yield listed(openai, input=[{**CALL, "status": "done"}]), "input[0].status", "in_progress, completed, incomplete"
    yield listed(openai, input=[{**CALL, "namespace": 7}]), "input[0].namespace", "a string"
    yield listed(openai, input=[{"role": "assistant", "content": "x", "phase": "last"}]), "input[0].phase", "commentary"
    part = "input[0].content[0]"
    yield listed(openai, input=[{"role": "user", "content": [{**text, "data": {}}]}]), f"{part}.data", "unknown field"
    yield (
        listed(
            openai, input=[{"role": "user", "content": [{**text, "prompt_cache_breakpoint": {"mode": "implicit"}}]}]
        ),
        f"{part}.prompt_cache_breakpoint",
        "explicit",
    )
    for data, message in (
        (nested(33), "33 nested levels, more than the maximum of 32"),
        ({"a": [0] * 9_999}, "10001 values, more than the maximum of 10000"),
        ({"a": "é" * 131_069}, "262146 bytes of compact JSON, more than the maximum of 262144"),
    ):
        yield listed(openai, input=json_input(data)), f"{part}.data", message
    yield listed(openai, input=[]), "input", "1 to 10000"
    yield listed(openai, input="  "), "input", "blank"


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def json_input(data: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "input_json", "data": data}]}]


@pytest.mark.parametrize("data", [nested(32), {"a": [0] * 9_998}, {"a": "é" * 131_068}], ids=["deep", "many", "long"])
def test_json_of_the_largest_size(data: Any) -> None:
    predicate = {"type": "predicate", "instructions": "Good?"}
    assert decision_request({"input": json_input(data), "questions": [predicate]}).messages


def test_optional_fields_of_items() -> None:
    cached = {"type": "input_text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}
    items = [
        {"type": "message", "role": "user", "content": [cached]},
        {"role": "assistant", "content": "y", "phase": None},
        {**CALL, "id": "i", "namespace": "n", "status": "in_progress"},
        {**RESULT, "id": None, "status": "completed"},
    ]
    request = decision_request({"input": items, "questions": [{"type": "predicate", "instructions": "Good?"}]})
    assert request.messages is not None
    assert len(request.messages) == 4


@pytest.mark.parametrize(("body", "param", "message"), [*bad_requests()])
def test_bad_requests_name_the_field(body: Any, param: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        decision_request(body)
    assert caught.value.param == param
