"""The guides of docs/guides run, and print what they say that they print."""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from model.kernels import cpu
from serve.cli.score.config import parse_args as parse_score_args
from serve.config.flags import parse_args
from tests.support.server_process import ROOT, ServerProcess
from tools.guides.__main__ import FOLDER, GUIDES, GuideError, Ran, blocks_of, is_alike, programs_of, run_guide

pytestmark = pytest.mark.slow

# Begun in this order, the longest first.
ORDER = ("lm-eval", "scoring", "hlo", "deploying", "uncertainty", "teacher")
TEXTS = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.md"))}


@pytest.fixture(scope="module")
def runs(
    server: ServerProcess, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ran]]]:
    """All guides that a test asks for, two at a time: most of them wait for the server most of their time."""

    def run(name: str) -> Ran:
        return run_guide(GUIDES[name], server, folders[name], programs_of(name))

    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    folders = {name: tmp_path_factory.mktemp(name) for name in ORDER if name in asked}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name) for name in folders}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ORDER[::-1])
def test_a_guide_prints_what_it_says(name: str, runs: dict[str, Future[Ran]]) -> None:
    if name == "hlo" and cpu.load() is None:
        pytest.skip("without kernels there are other operations to read")
    ran = runs[name].result()
    assert ran.blocks
    assert not ran.differences, "\n".join(ran.differences)


def test_all_guides_are_run_and_in_the_index() -> None:
    assert set(ORDER) == set(GUIDES)
    assert re.findall(r"^- \[.+\]\((.+)\.md\):", TEXTS["README"], re.MULTILINE) == [
        "scoring",
        "lm-eval",
        "uncertainty",
        "teacher",
        "hlo",
        "deploying",
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[name])
    assert [link for link in links if not (FOLDER / link).exists()] == []
    paths = re.findall(r"\b(?:deploy|docs|examples|tests|compiled)/[\w./-]*\w", TEXTS[name])
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_flags_are_the_servers(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", TEXTS[name])
    served = re.findall(r"(?:-m serve|^docker run .* logprobd) (--.*)$", text, re.MULTILINE)
    served += re.findall(r'^make serve ARGS="(.*)"$', text, re.MULTILINE)
    for words in served:
        parse_args(words.split(), {})
    for words in re.findall(r"-m serve score (.*)$", text, re.MULTILINE):
        parse_score_args(words.split())
    known = " ".join(path.read_text("utf-8") for path in (ROOT / "serve" / "cli").glob("*/config.py"))
    known += (ROOT / "serve" / "config" / "config.py").read_text("utf-8")
    for flag in re.findall(r"`--([\w-]+)", text):
        name_of = flag.removeprefix("no-").replace("-", "_")
        # lm-eval's have underscores.
        assert "_" in flag or re.search(rf"\b{name_of}: ", known) or flag in _OTHERS, flag


_OTHERS = {"build-arg", "model", "target", "tasks", "write"}  # of docker, lm-eval, make and the runner


# The runner itself, with a guide that needs no server.

GUIDE = """# A guide
```python
x = 41 + 1
print("x is", x)
print(f"{x / 7:.3f}")
```
```text
x is 42
6.000
```
What was defined stays; the server is at its address.
```python
print(f"{x} http://127.0.0.1:8000/v1")
```
```text
42 http://127.0.0.1:8000/v1
```
```sh
echo one two > here.txt
cat here.txt; ls docs/guides/README.md
```
```text
one two
docs/guides/README.md
```
```
not run
```
```python
assert open("here.txt").read() == "one two\\n"
```
"""


class Anywhere:
    """As much of a server as a guide needs that does not ask it."""

    url = "http://127.0.0.1:1234"
    process = type("Process", (), {"args": ["python", "--compilation-cache-dir", "/nowhere"]})


def run_text(text: str, folder: Path) -> Ran:
    """Runs a guide that is not in docs/guides."""
    path = folder / "guide.md"
    path.write_text(text, "utf-8")
    (folder / "run").mkdir()
    return run_guide(path, Anywhere(), folder / "run")  # type: ignore[arg-type]


def test_a_right_guide_passes(tmp_path: Path) -> None:
    ran = run_text(GUIDE, tmp_path)
    assert ran.differences == []
    assert ran.rewritten() == GUIDE
    assert not (ROOT / "here.txt").exists()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("x is 42", "x is 43"),
        ("x is 42", "y is 42"),
        ("6.000", "6.002"),
        ("one two\ndocs", "docs"),
        ("6.000\n", "6.000\nand more\n"),
        ("```text\n42 http://127.0.0.1:8000/v1\n```\n", ""),
    ],
)
def test_a_wrong_output_is_found_and_written_anew(tmp_path: Path, right: str, wrong: str) -> None:
    assert right in GUIDE
    ran = run_text(GUIDE.replace(right, wrong), tmp_path)
    assert len(ran.differences) == 1
    assert ran.differences[0].startswith("--- guide.md, block of line ")
    assert re.sub(r"\n+", "\n", ran.rewritten()) == GUIDE


def test_a_block_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(GuideError, match=r"guide.md, block of line 3.*line 2(.|\n)*x \+ nothing(.|\n)*NameError"):
        run_text(GUIDE.replace('print("x is", x)', "x + nothing"), tmp_path)


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuideError, match=r"block of line 19 ended with 3:\n(.|\n)*no luck"):
        run_text(GUIDE.replace("cat here.txt;", "echo no luck >&2; exit 3;"), tmp_path)


def test_an_output_of_nothing_is_refused() -> None:
    with pytest.raises(GuideError, match="line 3"):
        blocks_of("A guide\n```text\nlost\n```\n")
    assert [block.language for block in blocks_of(GUIDE)] == ["python", "python", "sh", "python"]


@pytest.mark.parametrize(
    ("expected", "output", "alike"),
    [
        ("rank 7", "rank 8", False),
        ("rank 40006", "rank 40003", True),  # where logits lie that close
        ("-1.2345", "-1.2346", True),
        ("-1.2345", "-1.2355", False),
        ("-12.3456", "-12.3475", True),  # a sum of many
        ("1.23", "1.230", False),
        ("a  1.23", "a 1.22", True),
        ("1.5 x", "1.5 y", False),
        ("first\n...\nlast", "first\n1\n2\nlast", True),
        ("first\n...\nlast", "first\nlast", True),
        ("first\n...\nlast", "first\n1\n2", False),
        ("first\n...", "first\n1", True),
        ("it took ... s", "it took 3.21 s", True),
        ("it took ... s", "it takes 3.21 s", False),
        ("", "more", False),
        ("True", "", False),
    ],
)
def test_what_is_alike(expected: str, output: str, alike: bool) -> None:
    assert is_alike(expected, output) is alike
