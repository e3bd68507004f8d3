"""What the page keeps: saved runs, reloads, links in used tabs, marks of stale results."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.integration.browser.inspector import Inspector
from tests.support.http_client import MODEL
from tests.support.listening import listening

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(script=b"The model says this.") as (url, _):
        yield url


@pytest.fixture
def page(inspector: Inspector, url: str) -> Inspector:
    inspector.open(url, MODEL)
    return inspector


def test_results_survive_a_reload(page: Inspector) -> None:
    pane = page.pane()
    pane.run("Hello")
    pane.cells.nth(2).click()
    page.alternatives.first.click()
    branches = pane.root.get_by_role("navigation")
    expect(branches.get_by_role("button")).to_have_count(3)  # two runs, and one that deletes the branch
    pane.wait()
    exported, status = pane.exported(), pane.status.inner_text()
    page.page.reload()
    expect(branches.get_by_role("button", pressed=True)).to_have_text("2: from token 2")
    assert (pane.exported(), pane.status.inner_text()) == (exported, status)
    stale = pane.root.get_by_text("Stale")
    expect(stale).to_be_hidden()
    pane.prompt.fill("Hello!")
    expect(stale).to_be_visible()
    page.page.reload()
    expect(stale).to_be_visible()
    pane.prompt.fill("Hello")
    expect(stale).to_be_hidden()
    branches.get_by_role("button", name="Delete 2: from token 2").click()
    expect(branches).to_be_hidden()
    page.page.get_by_role("button", name="Undo").click()
    expect(branches.get_by_role("button")).to_have_count(3)
    assert pane.exported() == exported


def test_saved_runs(page: Inspector, tmp_path: Path) -> None:
    pane, saved = page.pane(), page.page.get_by_role("region", name="Saved runs")
    page.page.get_by_role("button", name="Saved runs").click()
    page.set(max_tokens=5)
    pane.run("First prompt")
    first = pane.exported()
    pane.run("Second prompt", "Score only")
    names = saved.get_by_label("Name")
    expect(names).to_have_count(2)
    names.nth(1).fill("kept")
    names.nth(1).blur()
    page.page.reload()
    expect(pane.cells).to_have_count(len("Second prompt"))
    page.page.get_by_role("button", name="Saved runs").click()
    expect(names).to_have_count(2)
    assert [name.input_value() for name in names.all()] == ["Second prompt", "kept"]
    page.screenshot("saved")
    saved.get_by_role("button", name="Open", exact=True).nth(1).click()
    expect(pane.prompt).to_have_value("First prompt")
    assert pane.exported() == first
    pane.run(button="Continue")
    expect(names.first).to_have_value("kept")  # it is the newest again, under its own name
    saved.get_by_role("button", name="Delete Second prompt").click()
    expect(names).to_have_count(1)
    page.page.get_by_role("button", name="Undo").click()
    expect(names).to_have_count(2)
    # An exported file is a run again.
    file, broken = tmp_path / "tokens.json", tmp_path / "broken.json"
    exported = pane.download("Export JSON")
    file.write_text(exported, "utf-8")
    broken.write_text('{"format": "other"}', "utf-8")
    pane.run("Third")
    chooser = saved.get_by_label("open exported JSON")
    chooser.set_input_files(broken)
    expect(page.page.locator("#notice")).to_contain_text("broken.json cannot be opened: it was not exported")
    chooser.set_input_files(file)
    expect(pane.prompt).to_have_value("First prompt")
    assert pane.download("Export JSON") == exported
    expect(names).to_have_count(4)


def test_link_in_a_used_tab_replaces_everything(page: Inspector, context: BrowserContext, url: str) -> None:
    page.pane().prompt.fill("Shared")
    page.page.get_by_role("button", name="Share link").click()
    expect(page.page.locator("#notice")).to_contain_text("no results")
    link = page.page.url
    page.pane().run(button="Score only")
    page.page.goto(link)
    page.page.reload()  # the link's own page keeps its result
    expect(page.pane().cells).to_have_count(len("Shared"))
    other = Inspector(context.new_page())
    other.open(url, MODEL)
    other.set(max_tokens=3, top_p=0.5)
    other.page.get_by_role("button", name="Compare").click()
    other.pane().run("used before")
    other.pane().cells.nth(2).click()
    other.pane(1).prompt.fill("")
    other.pane(1).button("Run").click()
    expect(other.pane(1).error).to_have_text("Enter a prompt first.")
    other.page.goto(link)
    expect(other.pane().prompt).to_have_value("Shared")
    expect(other.page.locator(".pane")).to_have_count(1)
    expect(other.pane().root.locator(".result")).to_be_hidden()
    expect(other.details).to_be_hidden()
    expect(other.page.locator("#settings [name=top_p]")).to_have_value("")
    assert other.complaints == []
