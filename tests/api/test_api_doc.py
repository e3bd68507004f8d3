"""docs/api.md is complete: every field is in a table. Every test that it and its like name is there."""

import ast
import re
from pathlib import Path

import pytest

from serve.openai.known_fields import UNSUPPORTED, WITHOUT_EFFECT
from serve.openai.schema import ChatCompletionRequest, CompletionRequest, StreamOptions

ROOT = Path(__file__).resolve().parent
TEXT = (ROOT.parent / "docs" / "api.md").read_text(encoding="utf-8")
TEXTS = [TEXT, *((ROOT.parent / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("faults", "threats"))]
NAMED = sorted(set(re.findall(r"`([\w./]+\.py)(?:::(\w+))?`", "\n".join(TEXTS))))
FIELDS = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *StreamOptions.model_fields}


@pytest.mark.parametrize("field", sorted(FIELDS | set(UNSUPPORTED) | WITHOUT_EFFECT))
def test_every_field_is_told(field: str) -> None:
    assert f"`{field}`" in TEXT


def test_every_row_names_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith(("| `", "| a "))]
    assert len(rows) > 50
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_is_named_is_there(file: str, name: str) -> None:
    path = ROOT / "serve" / file
    if not path.exists() and not name:  # a file of the program
        path = ROOT.parent / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert not name or name in functions
