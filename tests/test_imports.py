"""Imports go one way, without cycles, and files and functions stay within their limits."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("model", "compiled", "serve", "logprobd.py")
SOURCES = (*PRODUCT, "tools")
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 60
MAX_PRODUCT_MODULES = 235
KERNELS = "model.kernels"  # one function per kernel: no limit
# (importer, imported): no module in the first package may import the second, directly.
FORBIDDEN = (
    ("model", "compiled"),
    ("model", "serve"),
    ("model", "tools"),
    ("compiled", "serve"),
    ("compiled", "tools"),
    ("serve", "tools"),
    *((package, "tests") for package in ("model", "compiled", "serve")),
    # The engine knows arrays and tokens, neither HTTP nor text nor flags.
    *(
        ("serve.engine", name)
        for name in (
            "serve.api",
            "serve.cli",
            "serve.config",
            "serve.jobs",
            "serve.server",
            "serve.text",
            "jax",
            "rich",
        )
    ),
    ("serve.text", "serve.api"),
    ("serve.tools", "serve.api"),
    ("serve.tools", "serve.server"),
    ("serve.tools", "jax"),
    ("serve.text", "serve.engine"),
    ("serve.text", "jax"),
    # Grammars know tokens, and neither requests nor the engine.
    *(("serve.grammar", name) for name in ("serve.api", "serve.engine", "serve.jobs", "serve.server", "jax")),
    ("serve.config", "jax"),
    ("serve.config", "serve.api"),
    ("serve.config", "serve.server"),
    ("serve.api", "serve.cli"),
    ("serve.api", "serve.ray"),
    ("serve.api", "serve.server"),
    ("serve.api", "jax"),
    ("serve.api", "rich"),
    ("serve.api", "serve.llm"),
    # cli -> llm -> jobs -> engine, text, config; and the half of serve.server that loads models, without HTTP.
    *(("serve.jobs", name) for name in ("serve.api", "serve.server", "serve.cli", "serve.llm", "jax", "starlette")),
    *(("serve.llm", name) for name in ("serve.api", "serve.cli", "serve.ray", "jax", "starlette")),
    *(
        (f"serve.server.{name}", package)
        for name in ("startup", "model_files", "memory_plan", "console", "startup_events")
        for package in ("serve.api", "starlette", "uvicorn")
    ),
    ("serve.cli", "serve.ray"),
    # Scoring and the terminal chat use the engine without HTTP.
    ("serve.cli.chat", "serve.api"),
    ("serve.cli.chat", "starlette"),
    ("serve.cli.chat", "jax"),
    *(
        (f"serve.cli.{name}", other)
        for name in ("batch", "decide", "score")
        for other in ("serve.api", "starlette", "jax")
    ),
    # The soak test is a client.
    ("tools.soak", "serve.engine"),
    ("tools.soak", "jax"),
    # Ray is an optional dependency of serve.ray alone.
    ("model", "ray"),
    ("compiled", "ray"),
    ("serve.engine", "ray"),
    ("serve.api", "ray"),
    ("serve.text", "ray"),
    ("serve.server", "ray"),
    ("serve.cli", "ray"),
)


def source_files(packages: tuple[str, ...], root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module; a package itself is `a.b.__init__`."""
    found = [
        path for name in packages for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(found) if path.exists()}


def imports(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too. `from a import b` gives a.b, which may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = [*package, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(root: Path) -> list[str]:
    """One line for each import that a rule forbids."""
    return [
        f"{module} imports {name}"
        for module, path in source_files(SOURCES, root).items()
        for name in imports(module, path.read_text("utf-8"))
        for importer, imported in FORBIDDEN
        if within(module, importer) and within(name, imported)
    ]


def test_imports_follow_the_rules() -> None:
    assert violations(ROOT) == []


def test_rules_name_existing_modules() -> None:
    for name in {name for rule in FORBIDDEN for name in rule if name.split(".")[0] in SOURCES}:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or list(path.glob("*.py")), name


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("model.layers", "import compiled.step", "compiled.step"),
        ("model.__init__", "from serve import api", "serve.api"),
        ("compiled.step", "def late():\n    from serve.engine.request import Request", "serve.engine.request.Request"),
        ("serve.engine.engine", "from ..api.chat import x", "serve.api.chat.x"),
        ("serve.text.tokenizer", "from jax import Array", "jax.Array"),
    ],
)
def test_violations_finds_an_import(tmp_path: Path, module: str, source: str, found: str) -> None:
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(source, "utf-8")
    assert violations(tmp_path) == [f"{module} imports {found}"]


def test_imports_have_no_cycle() -> None:
    """Imports inside functions count, too."""
    files = source_files(SOURCES)
    graph = TopologicalSorter[str]()
    for module, path in files.items():
        for name in imports(module, path.read_text("utf-8")):
            candidates = (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
            target = next((candidate for candidate in candidates if candidate in files), module)
            if target != module:
                graph.add(module, target)
    try:
        graph.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_product_modules_are_within_the_limit() -> None:
    assert len(source_files(PRODUCT)) <= MAX_PRODUCT_MODULES


def test_files_are_within_the_limit() -> None:
    files = source_files(SOURCES).values()
    lengths = {path: path.read_text("utf-8").count("\n") for path in files if not path.name.startswith("test_")}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_within_the_limit() -> None:
    too_long = [
        f"{module}.{node.name}: {lines} lines"
        for module, path in source_files(SOURCES).items()
        if not within(module, KERNELS)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert too_long == []
