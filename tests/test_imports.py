"""Imports go one way: tools -> serve -> compiled -> model, and inside serve api -> engine."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("model", "compiled", "serve", "tools")
# Nothing under the first name imports anything under the second.
FORBIDDEN = (
    ("model", "compiled"),
    ("model", "serve"),
    ("model", "tools"),
    ("compiled", "serve"),
    ("compiled", "tools"),
    ("serve", "tools"),
    ("serve.engine", "serve.api"),
    ("serve.engine", "serve.text"),
    ("serve.engine", "rich"),
    ("serve.text", "serve.api"),
    ("serve.text", "serve.engine"),
    ("serve.text", "jax"),
    ("serve.config", "jax"),
    ("serve.config", "serve.api"),
    ("serve.config", "serve.server"),
    ("serve.api", "serve.cli"),
    ("serve.api", "serve.ray"),
    ("serve.api", "serve.server"),
    ("serve.api", "jax"),
    ("serve.api", "rich"),
    ("serve.cli", "serve.ray"),
    # Scoring and the terminal chat use the engine without HTTP.
    ("serve.cli.chat", "serve.api"),
    ("serve.cli.chat", "starlette"),
    ("serve.cli.chat", "jax"),
    ("serve.cli.score", "serve.api"),
    ("serve.cli.score", "jax"),
    # The soak test is a client.
    ("tools.soak", "serve.engine"),
    ("tools.soak", "jax"),
    # Ray is an extra: everything else works without it.
    ("model", "ray"),
    ("compiled", "ray"),
    ("serve.engine", "ray"),
    ("serve.api", "ray"),
    ("serve.text", "ray"),
    ("serve.server", "ray"),
    ("serve.cli", "ray"),
)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module in the rooms; a package's own name ends in ".__init__"."""
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            yield ".".join(path.relative_to(root).with_suffix("").parts), path


def imports(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too. `from a import b` gives a.b, which may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = [*package, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def violations(root: Path) -> list[str]:
    """One line for each import that a rule forbids."""
    return [
        f"{module} imports {name}"
        for module, path in modules(root)
        for name in imports(module, path.read_text("utf-8"))
        for importer, imported in FORBIDDEN
        if within(module, importer) and within(name, imported)
    ]


def test_no_import_goes_back() -> None:
    assert violations(ROOT) == []


def test_every_name_in_the_rules_is_a_folder_here() -> None:
    ours = {name for rule in FORBIDDEN for name in rule if name.split(".")[0] in ROOMS}
    for name in ours:
        assert list((ROOT / name.replace(".", "/")).glob("*.py")), name


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("model.layers", "import compiled.step", "compiled.step"),
        ("model.weights.weight_table", "import numpy, serve as s", "serve"),
        ("model.__init__", "from serve import api", "serve.api"),
        ("compiled.step", "def late():\n    from serve.engine.request import Request", "serve.engine.request.Request"),
        ("serve.engine.engine", "from serve import api", "serve.api"),
        ("serve.engine.engine", "from ..api.chat import x", "serve.api.chat.x"),
        ("serve.engine.__init__", "from .. import api", "serve.api"),
        ("serve.text.tokenizer", "from serve.engine import core", "serve.engine.core"),
        ("serve.text.tokenizer", "if True:\n    import serve.api.chat", "serve.api.chat"),
        ("serve.api.chat", "import jax.numpy as jnp", "jax.numpy"),
        ("serve.text.tokenizer", "from jax import Array", "jax.Array"),
        ("serve.cli.chat.session", "from serve.api.chat import x", "serve.api.chat.x"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, source: str, found: str) -> None:
    write(tmp_path, module, source)
    assert violations(tmp_path) == [f"{module} imports {found}"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("serve.api.chat", "from serve.engine.request import Request"),
        ("serve.api.chat", "from . import errors\nimport jaxtyping"),
        ("serve.engine.engine", "import openai\nimport jax"),
        ("serve.text.tokenizer", "from model.weights import loader"),
        ("serve.ray.app", "import serve.api.chat, compiled.runner"),
        ("compiled.runner", "from model.transformer import Transformer"),
        ("model.layers", '"""import serve"""\n# import serve'),
        ("examples.chat", "import jax, serve.api"),
    ],
)
def test_other_imports_are_allowed(tmp_path: Path, module: str, source: str) -> None:
    write(tmp_path, module, source)
    assert violations(tmp_path) == []


def write(root: Path, module: str, source: str) -> None:
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(source, "utf-8")
