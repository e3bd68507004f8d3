"""`python -m tools.docs.api_tables`: write the tables of docs/api.md from the request schemas, OpenAPI and the source.

A table stands between `<!-- begin NAME -->` and `<!-- end -->`. Names, types, ranges, paths, summaries, statuses and
codes are generated; the columns named in `_WRITTEN` are written by hand in the page and kept.
"""

import ast
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from serve.api.openapi import openapi
from serve.api.requests import OutputFields, RequestFields
from serve.api.unsupported_fields import UNSUPPORTED_BY_SERVER, WITHOUT_EFFECT

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"

type Rows = Mapping[str, Sequence[str]]  # key -> the generated cells of a row

_HUGE = 2**31 - 1  # larger bounds are those of the integer type
_BEGIN, _END = "<!-- begin {} -->\n\n", "\n<!-- end -->"
# Table -> headings of the generated columns, and of those written by hand.
_WRITTEN: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "endpoints": (("endpoint", "summary"), ()),
    "common fields": (("field", "type"), ("default", "meaning")),
    "chat fields": (("field", "type"), ("default", "meaning")),
    "completion fields": (("field", "type"), ("default", "meaning")),
    "responses fields": (("field", "type"), ("default", "meaning")),
    "messages fields": (("field", "type"), ("default", "meaning")),
    "fields of both decision endpoints": (("field", "type"), ("default", "meaning")),
    "decision fields": (("field", "type"), ("default", "meaning")),
    "system one fields": (("field", "type"), ("default", "meaning")),
    "score fields": (("field", "type"), ("default", "meaning")),
    "generative scoring fields": (("field", "type"), ("default", "meaning")),
    "unsupported fields": (("defined by", "fields (values that are accepted because they change nothing)"), ()),
    "errors": (("code", "status"), ("when",)),
}
# Codes that serve.api composes, and what it does not send.
_COMPOSED = {
    *((400, f"{kind}_{bound}") for kind in ("integer", "decimal") for bound in ("above_max_value", "below_min_value")),
    (400, "unknown_parameter"),
    (404, "not_found"),
    (405, "method_not_allowed"),
}
_NOT_SENT = {(499, "client_gone")}


def rewritten(page: str) -> str:
    """Return the page with its tables as the code defines them.

    Raises:
        ValueError: a table's markers are missing, or a cell that is written by hand is empty.
    """
    for name, rows in _tables().items():
        before, marker, rest = page.partition(_BEGIN.format(name))
        table, end, after = rest.partition(_END)
        if not (marker and end):
            raise ValueError(f"no table {name!r}")
        page = "".join((before, marker, _table(name, rows, _written(table)), end, after))
    return page


def _tables() -> dict[str, Rows]:
    document = openapi(secured=False)
    schemas = document["components"]["schemas"]
    chat, completion = (_fields(schemas[f"{name}Request"]) for name in ("ChatCompletion", "Completion"))
    decisions, system_one = (_own(schemas[f"{name}Request"]) for name in ("Decisions", "SystemOne"))
    return {
        "endpoints": {
            f"`{method.upper()} {path}`": (operation["summary"],)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        },
        "common fields": {name: cells for name, cells in chat.items() if completion.get(name) == cells},
        "chat fields": {name: cells for name, cells in chat.items() if completion.get(name) != cells},
        "completion fields": {name: cells for name, cells in completion.items() if chat.get(name) != cells},
        "responses fields": _own(schemas["ResponsesRequest"], OutputFields),
        "messages fields": _own(schemas["MessagesRequest"], OutputFields),
        "fields of both decision endpoints": {
            name: cells for name, cells in decisions.items() if system_one.get(name) == cells
        },
        "decision fields": {name: cells for name, cells in decisions.items() if system_one.get(name) != cells},
        "system one fields": {name: cells for name, cells in system_one.items() if decisions.get(name) != cells},
        "score fields": _own(schemas["ScoreRequest"]),
        "generative scoring fields": _own(schemas["GenerativeScoringRequest"]),
        "unsupported fields": {
            server: (", ".join(_with_values(name, values) for name, values in fields.items()),)
            for server, fields in UNSUPPORTED_BY_SERVER.items()
        }
        | {"any value is accepted and has no effect": (", ".join(f"`{name}`" for name in sorted(WITHOUT_EFFECT)),)},
        "errors": _codes(),
    }


def _own(schema: Mapping[str, Any], shared: type[BaseModel] = RequestFields) -> Rows:
    """The fields that are not those of `shared`."""
    own = {name: field for name, field in schema["properties"].items() if name not in shared.model_fields}
    return _fields({"properties": own})


def _with_values(name: str, values: Sequence[Any]) -> str:
    """A field and in parentheses the values that are accepted."""
    return f"`{name}`" + (f" ({', '.join(f'`{json.dumps(value)}`' for value in values)})" if values else "")


def _written(table: str) -> dict[str, list[str]]:
    """Key -> the last cells of each row of a table, of which as many as are written by hand are kept."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in table.strip().splitlines()[2:]]
    return {cells[0]: cells for cells in rows}


def _table(name: str, rows: Rows, present: Mapping[str, list[str]]) -> str:
    generated, written = _WRITTEN[name]
    heads = [*generated, *written]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for key, cells in rows.items():
        kept = present.get(key, [])[len(generated) :] if written else []
        if len(kept) != len(written) or (written and not kept[-1]):
            raise ValueError(f"{name}: {key} has no {written[-1]!r}; write its row as: | {key} | | ... |")
        lines.append("| " + " | ".join([key, *cells, *kept]) + " |")
    return "".join(f"{line}\n" for line in lines)


def _fields(schema: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    return {f"`{name}`": (_type(field),) for name, field in schema["properties"].items()}


def _type(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = dict.fromkeys(_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
        return " or ".join(kinds)
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind: str = schema.get("type", "object")
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    return kind + _range(schema)


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    bounds = [(">=", low), (">", above), ("<=", high), ("<", below)]
    shown = [f"{sign} {bound}" for sign, bound in bounds if bound is not None and abs(bound) < _HUGE]
    if low is not None and high is not None and len(shown) == 2:
        return f", {low} to {high}"
    return "".join(f", {bound}" for bound in shown)


def _codes() -> dict[str, Sequence[str]]:
    """Every error code that the source of serve/ names, with its status; ordered by both."""
    found = set(_COMPOSED)
    for path in sorted((ROOT / "serve").rglob("*.py")):
        found |= {*_codes_in(ast.parse(path.read_text("utf-8")))}
    return {f"`{code}`": (str(status),) for status, code in sorted(found - _NOT_SENT)}


def _codes_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        name, values = call.func.id, [node.value if isinstance(node, ast.Constant) else None for node in call.args]
        code = next(
            (node.value.value for node in call.keywords if node.arg == "code" and isinstance(node.value, ast.Constant)),
            None,
        )
        if name == "APIError" and isinstance(status := values[0], int):
            code = code or (values[3] if len(values) > 3 else None)
        elif name == "invalid":
            status, code = 400, code or (values[2] if len(values) > 2 else "invalid_value")
        else:
            continue
        if isinstance(code, str):
            yield status, code


def main() -> int:
    """Rewrite the page and return the exit code."""
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
