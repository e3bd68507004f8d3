"""The guides of docs/guides run and print the outputs that they show."""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from model.kernels import cpu
from serve.cli.decide.config import parse_args as parse_decide_args
from serve.cli.score.config import parse_args as parse_score_args
from serve.config.flags import parse_args
from tests.support.server_process import ROOT, ServerProcess
from tools.guides.__main__ import FOLDER, GUIDES, GuideError, GuideRun, is_alike, run_guide

# In the order in which they start, the longest first.
ORDER = ("lm-eval", "decisions", "scoring", "hlo", "deploying", "uncertainty", "extraction", "teacher", "own-model")
# Of docker, make portability, lm-eval and the runner; other flags of lm-eval have underscores.
OTHER_FLAGS = {"build-arg", "target", "tasks", "write"}
TEXTS = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.md"))}


@pytest.fixture(scope="module")
def runs(
    server: ServerProcess,
    compilation_cache: Path,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[GuideRun]]]:
    """Runs of the selected guides, two at a time: they mostly wait for the server."""

    def run(name: str) -> GuideRun:
        return run_guide(GUIDES[name], server.url, compilation_cache, folders[name])

    selected = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    folders = {name: tmp_path_factory.mktemp(name) for name in ORDER if name in selected}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name) for name in folders}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDER[::-1])
def test_guide_prints_its_outputs(name: str, runs: dict[str, Future[GuideRun]]) -> None:
    if name in ("hlo", "own-model") and cpu.load_library() is None:
        pytest.skip("the guide shows what the CPU kernels do")
    run = runs[name].result()
    assert run.outputs
    assert [*run.differences()] == []


def test_guides_are_in_the_index() -> None:
    assert set(ORDER) == set(GUIDES)
    index = re.findall(r"^\| \[.+\]\((.+)\.md\) \|", TEXTS["README"], re.MULTILINE)
    assert index == [
        *("own-model", "scoring", "lm-eval", "decisions", "uncertainty", "extraction", "teacher", "hlo", "deploying")
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_guide_commands_have_valid_flags(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", TEXTS[name])
    served = re.findall(r"(?:logprobd serve|^docker run .* logprobd:\S+) (--.*)$", text, re.MULTILINE)
    served += re.findall(r'^make serve ARGS="(.*)"$', text, re.MULTILINE)
    for words in served:
        parse_args(words.split(), {})
    for words in re.findall(r"(?:-m serve|logprobd) score (.*)$", text, re.MULTILINE):
        parse_score_args(words.split())
    for words in re.findall(r"(?:-m serve|logprobd) decide (.*)$", text, re.MULTILINE):
        parse_decide_args(words.split())
    sources = [*(ROOT / "serve" / "config").glob("*config.py"), *(ROOT / "serve" / "cli").glob("*/config.py")]
    names = {*re.findall(r"^    (\w+): ", "".join(path.read_text("utf-8") for path in sources), re.MULTILINE)}
    flags = {flag.removeprefix("no-") for flag in re.findall(r"`--([\w-]+)", TEXTS[name])} - OTHER_FLAGS
    assert sorted(flag for flag in flags if "_" not in flag and flag.replace("-", "_") not in names) == []


# A guide that needs no server, to test the runner.
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
The namespace is kept, and the server's address replaced.
```python
import os

print(f"{x} http://127.0.0.1:8000/v1", os.environ.get("OPENAI_API_KEY"))
```
```text
42 http://127.0.0.1:8000/v1 None
```
```sh
echo one two > file.txt
cat file.txt; ls docs/guides/README.md
```
```text
one two
docs/guides/README.md
```
```
not run
```
```python
assert open("file.txt").read() == "one two\\n"
```
"""


def run_text(text: str, folder: Path) -> GuideRun:
    path = folder / "guide.md"
    path.write_text(text, "utf-8")
    (folder / "run").mkdir()
    return run_guide(path, "http://127.0.0.1:1234", folder / "cache", folder / "run")


def test_run_guide_without_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key of the developer")
    run = run_text(GUIDE, tmp_path)
    assert [*run.differences()] == []
    assert run.rewritten() == GUIDE


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("x is 42", "y is 42"),
        ("6.000", "6.002"),
        ("6.000\n", "6.000\nand more\n"),
        ("```text\none two\ndocs/guides/README.md\n```\n", ""),
    ],
)
def test_run_guide_reports_and_rewrites_a_wrong_output(tmp_path: Path, right: str, wrong: str) -> None:
    assert right in GUIDE
    run = run_text(GUIDE.replace(right, wrong), tmp_path)
    assert len([*run.differences()]) == 1
    assert run.rewritten() == GUIDE


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ('print("x is", x)', "x + nothing", r"guide.md, block of line 3.*line 2(.|\n)*x \+ nothing(.|\n)*NameError"),
        ("cat file.txt;", "echo no luck >&2; exit 3;", r"block of line 21 ended with 3:\n(.|\n)*no luck"),
    ],
)
def test_run_guide_names_the_block_that_fails(tmp_path: Path, right: str, wrong: str, error: str) -> None:
    with pytest.raises(GuideError, match=error):
        run_text(GUIDE.replace(right, wrong), tmp_path)


@pytest.mark.parametrize(
    ("expected", "output", "alike"),
    [
        ("rank 7", "rank 8", False),
        ("rank 40006", "rank 40003", True),
        ("-1.2345", "-1.2346", True),
        ("-1.2345", "-1.2355", False),
        ("-12.3456", "-12.3475", True),
        ("1.23", "1.230", False),
        ("a  1.23", "a 1.22", True),
        ("1.5 x", "1.5 y", False),
        ("first\n...\nlast", "first\n1\n2\nlast", True),
        ("first\n...\nlast", "first\n1\n2", False),
        ("first\n...", "first\n1", True),
        ("it took ... s", "it took 3.21 s", True),
        ("it took ... s", "it takes 3.21 s", False),
        ("", "more", False),
        ("True", "", False),
    ],
)
def test_is_alike(expected: str, output: str, alike: bool) -> None:
    assert is_alike(expected, output) is alike
