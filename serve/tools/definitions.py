"""Tools as requests define them: fields, checks, and which of them an answer may or must call."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.text.chat import PromptError

MAX_TOOLS = 512
_MAX_LARK = 16  # tools; each of their grammars is also compiled alone
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class _Field(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class FunctionField(_Field):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of an object; no arguments without one
    strict: bool | None = None  # arguments are valid for `parameters`, also if the model may choose


class ToolGrammar(_Field):
    syntax: Literal["lark", "regex"]
    definition: str


class CustomFormat(_Field):
    type: Literal["text", "grammar"]
    grammar: ToolGrammar | None = None


class CustomField(_Field):
    name: _Name
    description: str | None = None
    format: CustomFormat | None = None


class ToolField(_Field):
    """An element of `tools`."""

    type: Literal["function", "custom"]
    function: FunctionField | None = None
    custom: CustomField | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: Mapping[str, Any]  # JSON schema
    template_form: Mapping[str, Any]  # as templates expect it
    param: str  # of the schema in the request
    strict: bool = False
    is_custom: bool = False  # called with a text, its argument `input`
    lark: str | None = None  # grammar of this text


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """The tools of a request, and which of them may or must be called."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]  # empty: none
    is_required: bool = False
    is_single: bool = False  # at most one call

    @property
    def by_name(self) -> dict[str, Tool]:
        return {tool.name: tool for tool in self.tools}

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """Parameters of the tools that may be called, by name."""
        return {tool.name: tool.parameters for tool in self.callable}


def tool_request(
    fields: Sequence[ToolField] | None, choice: Any, *, parallel: bool, param: str = "tools"
) -> ToolRequest | None:
    """The tools of a request; None without any. Raise PromptError for an invalid field."""
    if fields is None:
        if choice not in (None, "none", "auto"):
            raise PromptError("tool_choice", "`tool_choice` needs `tools`.")
        return None
    if not fields:
        raise PromptError(param, f"`{param}` must contain at least one tool.", "empty_array")
    if len(fields) > MAX_TOOLS:
        raise PromptError(param, f"`{param}` has more than {MAX_TOOLS} tools.", "array_above_max_length")
    tools: dict[str, Tool] = {}
    for i, field in enumerate(fields):
        tool = _tool(field, f"{param}[{i}]")
        if tool.name in tools:
            path = f"{param}[{i}].{field.type}.name"
            raise PromptError(path, f"`{path}`: another tool has the name {tool.name!r}.")
        tools[tool.name] = tool
    if sum(tool.lark is not None for tool in tools.values()) > _MAX_LARK:
        message = f"`{param}` has more than {_MAX_LARK} tools with a Lark grammar."
        raise PromptError(param, message, "array_above_max_length")
    return _with_choice(tools, choice, is_single=not parallel)


def _tool(field: ToolField, path: str) -> Tool:
    definition = field.function if field.type == "function" else field.custom
    if definition is None:
        message = f"`{path}.{field.type}` is missing."
        raise PromptError(f"{path}.{field.type}", message, "missing_required_parameter")
    if isinstance(definition, CustomField):
        return _custom(definition, f"{path}.custom")
    parameters, where = definition.parameters, f"{path}.function.parameters"
    if parameters and parameters.get("type", "object") != "object":
        raise PromptError(where, f"`{where}` must be the schema of an object.", "invalid_function_parameters")
    form = definition.model_dump(exclude_unset=True, exclude={"strict"})
    form = {name: value for name, value in form.items() if value is not None}
    form.setdefault("description", "")
    form.setdefault("parameters", {"type": "object", "properties": {}})
    return Tool(
        definition.name,
        parameters or _NO_ARGUMENTS,
        {"type": "function", "function": form},
        where,
        strict=bool(definition.strict),
    )


def _custom(definition: CustomField, path: str) -> Tool:
    """A custom tool as a function with one text argument."""
    text: dict[str, Any] = {"type": "string"}
    description, where, lark = definition.description or "", path, None
    rule = definition.format.grammar if definition.format else None
    if definition.format and definition.format.type == "grammar":
        if rule is None:
            where = f"{path}.format.grammar"
            raise PromptError(where, f"`{where}` is missing.", "missing_required_parameter")
        where = f"{path}.format"
        if rule.syntax == "lark":
            where, lark = f"{path}.format.grammar.definition", rule.definition
            description = f"{description}\n\nThe input follows this Lark grammar:\n{lark}".strip()
        else:
            text["pattern"] = f"^(?:{rule.definition})$"
    parameters = {"type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False}
    form = {"name": definition.name, "description": description, "parameters": parameters}
    return Tool(
        definition.name,
        parameters,
        {"type": "function", "function": form},
        where,
        strict=rule is not None,
        is_custom=True,
        lark=lark,
    )


def _with_choice(tools: Mapping[str, Tool], choice: Any, *, is_single: bool) -> ToolRequest:
    every = tuple(tools.values())
    match choice:
        case None | "auto":
            return ToolRequest(every, every, is_single=is_single)
        case "none":
            return ToolRequest(every, ())
        case "required":
            return ToolRequest(every, every, is_required=True, is_single=is_single)
        case {"type": "function" | "custom"}:
            return ToolRequest(every, (_named(choice, tools, "tool_choice"),), is_required=True, is_single=True)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [_, *_] as items},
        }:
            path = "tool_choice.allowed_tools.tools"
            allowed = {_named(item, tools, f"{path}[{i}]").name for i, item in enumerate(items)}
            chosen = tuple(tool for tool in every if tool.name in allowed)
            return ToolRequest(every, chosen, is_required=mode == "required", is_single=is_single)
    message = (
        "`tool_choice` must be none, auto, required, or an object that names a tool "
        '(`{"type": "function", "function": {"name": ...}}`) or allowed tools.'
    )
    raise PromptError("tool_choice", message)


def _named(choice: Any, tools: Mapping[str, Tool], path: str) -> Tool:
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    inner = choice.get(kind) if kind in ("function", "custom") else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise PromptError(path, f"`{path}` names no tool.")
    where = f"{path}.{kind}.name"
    if name not in tools or tools[name].is_custom != (kind == "custom"):
        raise PromptError(where, f"`{where}`: {name[:64]!r} is not among `tools`.")
    return tools[name]


def custom_input(arguments: str) -> str:
    """The text with which a custom tool is called. Arguments that are cut off or in another form stay as they are."""
    try:
        value = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments
