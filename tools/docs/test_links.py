"""Links, anchors and paths of the documentation exist, and the README stays short."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server_process import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"\b(?:api|compiled|deploy|docs|examples|model|serve|tests|text|tools)/[\w./-]*\w")


def _anchors(page: Path) -> set[str]:
    """Ids of the headings of a page, as mkdocs and GitHub form them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def _dead_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", _CODE.sub("", text)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and anchor not in _anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page_links_to_existing_files_and_headings(page: Path) -> None:
    assert [*_dead_links(page, page.read_text("utf-8"))] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_page_names_existing_files(page: Path) -> None:
    paths = set(_PATH.findall(page.read_text("utf-8")))
    places = (ROOT, ROOT / "serve")
    assert sorted(path for path in paths if not any((place / path).exists() for place in places)) == []


@pytest.mark.parametrize(
    ("link", "dead"),
    [
        ("docs/api.md", False),
        ("docs/api.md#errors", False),
        ("#install", False),
        ("docs/missing.md", True),
        ("docs/api.md#no-such-heading", True),
        ("#no-such-heading", True),
    ],
)
def test_dead_links_reports_missing_files_and_headings(link: str, dead: bool) -> None:
    assert [*_dead_links(ROOT / "README.md", f"[text]({link})")] == ([link] if dead else [])


def test_readme_has_at_most_1000_words() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1000


def test_docs_link_to_no_file_outside_of_the_site() -> None:
    """mkdocs publishes docs/ alone; files of the repository are named, not linked."""
    links = {page: re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")) for page in DOCS.rglob("*.md")}
    assert [
        (page.name, link)
        for page, targets in links.items()
        for link in targets
        if not (page.parent / link).resolve().is_relative_to(DOCS)
    ] == []
