"""The input of a decision: OpenAI's items as the messages of a chat."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from serve.config.values import suggestion
from serve.text.chat import MAX_ITEMS, PromptError, check_messages

_MAX_JSON_DEPTH = 64
_MAX_PART_DEPTH, _MAX_PART_VALUES, _MAX_PART_BYTES = 32, 10_000, 256 * 1024  # of input_json
_ROLES = ("user", "assistant", "system", "developer")
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_STATUSES = ("in_progress", "completed", "incomplete")
_PHASES = ("commentary", "final_answer")
_PART_FIELDS = {
    "input_text": ("text", "prompt_cache_breakpoint"),
    "input_json": ("data",),
    "output_text": ("text",),
    "refusal": ("refusal",),
}
_OUTPUTS = {"function_call_output": "function_call", "custom_tool_call_output": "custom_tool_call"}
_MAX_STEPS, _MAX_STEP = 64, 100  # of the path in an error: steps, and characters of each
# Private-use characters around the control tokens of user text, as in transformers; user text loses them.
CONTROL_START, CONTROL_END = "\U000f0000", "\U000f0001"


def parse_input(value: Any, param: str = "input") -> tuple[dict[str, Any], ...]:
    """Messages of a chat from a string or a list of OpenAI's items. Raise PromptError, which names item and part."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PromptError(param, f"`{param}` must be a string or a list of items.", "invalid_type")
    if not 1 <= len(value) <= MAX_ITEMS:
        message = f"`{param}` must hold 1 to {MAX_ITEMS} items."
        raise PromptError(param, message, "array_above_max_length" if value else "empty_array")
    messages = list[dict[str, Any]]()
    calls = dict[str, str]()  # call_id -> type of the call
    for i, item in enumerate(value):
        path = f"{param}[{i}]"
        if not isinstance(item, Mapping):
            raise PromptError(path, f"`{path}` must be an object.", "invalid_type")
        kind = str(item.get("type", "message"))
        if kind in _CALLS:
            messages.append(_call(item, path, calls))
        elif kind in _OUTPUTS:
            messages.append(_output(item, path, calls))
        elif kind == "message":
            messages.append(_message(item, path))
        else:
            names = ", ".join(("message", *_CALLS, *_OUTPUTS))
            raise PromptError(f"{path}.type", f"`{path}.type` must be one of {names}.")
    if not any(not is_blank(message.get("content")) or message.get("tool_calls") for message in messages):
        raise PromptError(param, "The input is blank.")
    return tuple(check_messages(messages, param=param))


def is_blank(value: Any) -> bool:
    """True for None, an empty object or list, and a text of which a prompt shows nothing but spaces."""
    if isinstance(value, str):
        return not value.replace(CONTROL_START, "").replace(CONTROL_END, "").strip()
    return value is None or (isinstance(value, Mapping | list) and not value)


def content_text(value: Any, param: str, *, kinds: tuple[str, ...] = ("input_text", "input_json")) -> str:
    """Text of a string or of a list of parts, which are joined by line breaks. Raise PromptError for other parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PromptError(param, f"`{param}` must be a string or a list of parts.", "invalid_type")
    if len(value) > MAX_ITEMS:
        raise PromptError(param, f"`{param}` has more than {MAX_ITEMS} parts.", "array_above_max_length")
    return "\n".join(_part_text(part, f"{param}[{i}]", kinds) for i, part in enumerate(value))


def check_json(value: Any, param: str, depth: int = 0) -> None:
    """Raise PromptError for a value that is not JSON, such as NaN, or nested too deep."""
    if depth > _MAX_JSON_DEPTH:
        raise PromptError(param.partition("[")[0], f"`{param}` is nested more than {_MAX_JSON_DEPTH} levels deep.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PromptError(param, f"`{param}`: the key {key!r} is not a string.", "invalid_type")
            check_json(item, f"{param}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_json(item, f"{param}[{i}]", depth + 1)
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise PromptError(param, f"`{param}` is not a finite number.")
    elif value is not None and not isinstance(value, str | int | float):
        raise PromptError(param, f"`{param}` is not a JSON value.", "invalid_type")


def check_unique_keys(data: bytes) -> None:
    """Raise PromptError for a repeated key in an object of valid JSON: parsers keep the last one silently."""
    repeated: dict[int, tuple[dict[str, Any], str]] = {}  # by id of the object; keeps it alive

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            repeated[id(values)] = values, key
        return values

    def read_number(_: str) -> None:  # in Python: the interpreter can switch threads in a long list of numbers
        return None

    document = json.loads(data.decode(), object_pairs_hook=read_object, parse_int=read_number, parse_float=read_number)
    if repeated:
        path, key = _path_to(document, repeated)
        raise PromptError(path, f"The key {key[:_MAX_STEP]!r} occurs more than once (`{path}`).")


def _path_to(document: Any, repeated: Mapping[int, tuple[Any, str]]) -> tuple[str, str]:
    """The path of the first repeated key, and the key. An object that its own key hid has an ancestor in `repeated`."""
    nodes: list[tuple[Any, Any, str]] = [(document, None, "")]  # value, parent's node, step to the value
    while id(nodes[-1][0]) not in repeated:
        node = nodes.pop()
        items = node[0].items() if isinstance(node[0], dict) else enumerate(node[0])
        inner = [
            (value, node, f".{step[:_MAX_STEP]}" if isinstance(step, str) else f"[{step}]")
            for step, value in items
            if isinstance(value, dict | list)
        ]
        nodes += reversed(inner)
    node = nodes[-1]
    key = repeated[id(node[0])][1]
    steps = [f".{key[:_MAX_STEP]}"]
    while node[1] is not None:
        steps.append(node[2])
        node = node[1]
    return "".join(reversed(steps[-_MAX_STEPS:])).removeprefix("."), key


def _part_text(part: Any, path: str, kinds: tuple[str, ...]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "input_image":
        message = f"`{path}`: images are not supported; this model reads text."
        raise PromptError(path, message, "unsupported_parameter")
    if not isinstance(part, Mapping) or kind not in kinds:
        raise PromptError(f"{path}.type", f"`{path}.type` must be one of {', '.join(kinds)}.")
    _check_fields(part, path, ("type", *_PART_FIELDS[kind]))
    if part.get("prompt_cache_breakpoint") not in (None, {"mode": "explicit"}):
        field = f"{path}.prompt_cache_breakpoint"
        raise PromptError(field, f'`{field}` must be {{"mode": "explicit"}}.')
    if kind == "input_json":
        data = part.get("data")
        if not isinstance(data, dict) and not (isinstance(data, list) and all(isinstance(x, dict) for x in data)):
            raise PromptError(f"{path}.data", f"`{path}.data` must be an object or a list of objects.", "invalid_type")
        _check_data(data, f"{path}.data")
        return json.dumps(data, ensure_ascii=False)
    key = "refusal" if kind == "refusal" else "text"
    if not isinstance(part.get(key), str):
        raise PromptError(f"{path}.{key}", f"`{path}.{key}` must be a string.", "invalid_type")
    return str(part[key])


def _check_data(data: Any, path: str) -> None:
    """Check the limits of input_json."""
    check_json(data, path)
    level, values, depth = [data], 0, 0
    while level:
        values, depth = values + len(level), depth + any(isinstance(value, Mapping | list) for value in level)
        lists = ([*value.values()] if isinstance(value, Mapping) else value for value in level)
        level = [item for value in lists if isinstance(value, list) for item in value]
    size = len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass"))
    for count, limit, unit in (
        (depth, _MAX_PART_DEPTH, "nested levels"),
        (values, _MAX_PART_VALUES, "values"),
        (size, _MAX_PART_BYTES, "bytes of compact JSON"),
    ):
        if count > limit:
            raise PromptError(path, f"`{path}` has {count} {unit}, more than the maximum of {limit}.")


def _check_fields(item: Mapping[str, Any], path: str, allowed: tuple[str, ...]) -> None:
    for key in item:
        if key not in allowed:
            message = f"`{path}`: unknown field `{key}`{suggestion(str(key), allowed)}."
            raise PromptError(f"{path}.{key}", message, "unknown_parameter")


def _check_one_of(item: Mapping[str, Any], key: str, path: str, values: tuple[str, ...]) -> None:
    if item.get(key) is not None and item[key] not in values:
        raise PromptError(f"{path}.{key}", f"`{path}.{key}` must be one of {', '.join(values)}.")


def _message(item: Mapping[str, Any], path: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise PromptError(f"{path}.role", f"`{path}.role` must be one of {', '.join(_ROLES)}.")
    _check_fields(item, path, ("type", "role", "content", *(("phase",) if role == "assistant" else ())))
    _check_one_of(item, "phase", path, _PHASES)
    parts = {"user": ("input_text", "input_json"), "assistant": ("output_text", "refusal")}
    content = content_text(item.get("content"), f"{path}.content", kinds=parts.get(str(role), ("input_text",)))
    return {"role": role, "content": content}


def _call(item: Mapping[str, Any], path: str, calls: dict[str, str]) -> dict[str, Any]:
    kind = str(item["type"])
    _check_call(item, path, ("name", _CALLS[kind], "namespace"))
    call_id, name, arguments = (_string(item, key, path) for key in ("call_id", "name", _CALLS[kind]))
    calls[call_id] = kind
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def _output(item: Mapping[str, Any], path: str, calls: Mapping[str, str]) -> dict[str, Any]:
    _check_call(item, path, ("output",))
    kind, call_id = str(item["type"]), _string(item, "call_id", path)
    if calls.get(call_id) != _OUTPUTS[kind]:
        message = f"`{path}.call_id`: no item of type {_OUTPUTS[kind]} before this one has the call_id {call_id!r}."
        raise PromptError(f"{path}.call_id", message)
    content = content_text(item.get("output"), f"{path}.output", kinds=("input_text",))
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _check_call(item: Mapping[str, Any], path: str, fields: tuple[str, ...]) -> None:
    _check_fields(item, path, ("type", "call_id", "id", "status", *fields))
    _check_one_of(item, "status", path, _STATUSES)
    for key in ("id", "namespace"):
        if item.get(key) is not None:
            _string(item, key, path)


def _string(item: Mapping[str, Any], key: str, path: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise PromptError(f"{path}.{key}", f"`{path}.{key}` must be a string.", "invalid_type")
    return value


def chat_messages(messages: Iterable[dict[str, Any]], *, renders_calls: bool) -> list[dict[str, Any]]:
    """Messages of which no two neighbours have the same role, since many templates demand that roles alternate.

    Their contents are joined by a blank line. Unless the template `renders_calls`, calls and their results become text.
    """
    merged = list[dict[str, Any]]()
    for message in messages if renders_calls else map(_as_text, messages):
        last: dict[str, Any] = merged[-1] if merged else {"role": None}
        if message["role"] != last["role"] or message["role"] == "tool":
            merged.append(dict(message))
            continue
        last["content"] = "\n\n".join(filter(None, (last["content"], message["content"])))
        if calls := [*last.get("tool_calls", ()), *message.get("tool_calls", ())]:
            last["tool_calls"] = calls
    return merged


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of {message['tool_call_id']}: {message['content']}"}
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())]
    ids = [call["id"] for call in message.get("tool_calls", ())]
    lines = [message["content"], *(f"Call {call_id}: {call}" for call_id, call in zip(ids, calls, strict=True))]
    return {"role": message["role"], "content": "\n".join(filter(None, lines))}
