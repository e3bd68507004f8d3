"""Accessibility, themes, narrow screens and texts of ten thousand tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.integration.browser.inspector import Inspector
from tests.support.http_client import MODEL
from tests.support.listening import listening

pytestmark = pytest.mark.slow

LONG = 10_000


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(script=b"The model says this.", max_model_len=LONG + 100, pages=2 + (LONG + 100) // 64) as (url, _):
        yield url


@pytest.fixture
def page(inspector: Inspector, url: str) -> Inspector:
    inspector.open(url, MODEL)
    return inspector


def audit(page: Page) -> list[Any]:
    """Return axe-core's violations."""
    program = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    page.evaluate(program.read_text("utf-8") + "\n0")
    found: list[Any] = page.evaluate("axe.run().then(results => results.violations)")
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_audit_passes(page: Inspector, scheme: Any) -> None:
    page.page.emulate_media(color_scheme=scheme)
    assert audit(page.page) == []
    page.page.get_by_role("button", name="Compare").click()
    for i in range(2):
        page.pane(i).run("A few words, <begin> 😊")
    page.pane().cells.nth(8).hover()
    expect(page.details).to_be_visible()
    assert audit(page.page) == []
    page.screenshot(scheme)
    page.set_grammar("regular expression", "(yes|no)[.]")
    page.page.locator("[name=colors]").select_option("allowed mass")
    page.pane().run()
    page.pane().cells.last.hover()
    expect(page.details).to_contain_text("allowed mass")
    assert audit(page.page) == []
    page.screenshot(f"grammar-{scheme}")


def decide(page: Inspector) -> Locator:
    """A decision with an answer, an error and the tokens of its prompt, made by keyboard."""
    keys, form = page.page.keyboard, page.page.locator("#decide")
    page.page.get_by_role("tab", name="Inspect").focus()
    keys.press("ArrowRight")
    expect(page.page.get_by_role("tab", name="Decide")).to_be_focused()
    for _ in range(6):  # after four links and buttons, and the type of the state
        keys.press("Tab")
    expect(form.get_by_label("State", exact=True)).to_be_focused()
    keys.insert_text("A few words <begin>")
    form.get_by_label("type").select_option("choice")
    form.get_by_label("Instructions").fill("Which one?")
    form.get_by_label("scoring").select_option("permutations")
    for i, text in enumerate(("one", "an option of many words " * 3)):
        form.get_by_label(f"option {i + 1}", exact=True).fill(text)
    keys.press("Control+Enter")
    answer = form.locator(".answer")
    expect(answer).to_have_count(1)
    for summary in answer.locator("summary").all():
        summary.press("Enter")
    answer.locator("details[aria-busy=false]").wait_for()
    form.get_by_label("option 2", exact=True).fill("one")
    keys.press("Control+Enter")
    expect(form.locator(".question").get_by_role("alert")).to_contain_text("occurs twice")
    form.get_by_role("button", name="Copy as curl").press("Enter")
    expect(form.get_by_label("curl command")).to_be_visible()
    form.get_by_label("option 2", exact=True).fill("one")
    keys.press("Control+Enter")
    expect(form.locator(".question").get_by_role("alert")).to_be_visible()
    answer.locator(".cells .cell").first.press("ArrowRight")
    expect(answer.locator(".cells .cell").nth(1)).to_be_focused()
    expect(page.details).to_be_visible()
    return form


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_audit_of_decisions_passes(page: Inspector, scheme: Any) -> None:
    page.page.emulate_media(color_scheme=scheme)
    form = decide(page)
    assert audit(page.page) == []
    page.screenshot(f"decide-{scheme}")
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Escape")
    expect(form.locator(".cells .cell").nth(1)).to_be_focused()


def test_narrow_screen_layout_of_decisions(page: Inspector) -> None:
    page.page.set_viewport_size({"width": 360, "height": 740})
    decide(page)
    width, inner = page.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner
    page.screenshot("decide-narrow")


def test_examples_of_a_first_visit(page: Inspector, context: BrowserContext, url: str) -> None:
    expect(page.page.locator("#settings [name=temperature]")).to_have_attribute("placeholder", "1")
    page.screenshot("first-visit")
    for name, start in (("A fact", "The capital of France"), ("A chat", "user:Why is the sky")):
        visit = Inspector(context.new_page())
        visit.open(url, MODEL)
        examples = visit.page.get_by_role("region", name="Examples")
        examples.get_by_role("button", name=name).click()
        visit.pane().wait()
        assert "".join(visit.pane().texts()).startswith(start)
        expect(examples).to_be_hidden()
        assert visit.complaints == []
    page.page.get_by_role("button", name="A decision").click()
    alert = page.page.locator("#decide .question").get_by_role("alert")
    expect(alert).to_contain_text("the labels 'Yes', 'No'")  # it was sent; this server's tokens are single bytes


def test_theme_can_be_chosen(page: Inspector) -> None:
    def back() -> str:
        return str(page.page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))

    light = back()
    page.page.get_by_role("button", name="Toggle theme").click()
    assert back() != light
    dark = back()
    page.page.reload()
    assert back() == dark


def test_page_works_by_keyboard(page: Inspector) -> None:
    pane, keys = page.pane(), page.page.keyboard
    pane.prompt.focus()
    keys.insert_text("Hello you")
    keys.press("Control+Enter")
    pane.wait()
    pane.cells.first.focus()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(pane.cells.nth(2)).to_be_focused()
    expect(pane.cells.nth(2)).to_have_attribute("aria-selected", "true")
    label = pane.cells.nth(2).get_attribute("aria-label") or ""
    assert label.startswith("l: prompt, log-prob ")
    assert "rank" in label
    expect(page.details).to_be_visible()
    keys.press("Enter")
    expect(page.alternatives.first).to_be_focused()
    keys.press("ArrowDown")
    expect(page.alternatives.nth(1)).to_be_focused()
    keys.press("Escape")
    expect(pane.cells.nth(2)).to_be_focused()
    keys.press("End")
    expect(pane.cells.last).to_be_focused()
    keys.press("Home")
    expect(pane.cells.first).to_be_focused()
    keys.press("ArrowRight")
    keys.press("Enter")
    keys.press("Enter")  # takes the first alternative
    expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
    pane.wait()
    expect(pane.cells.nth(1)).to_be_focused()
    # One stop in the order of Tab, however many tokens there are.
    assert pane.cells.evaluate_all("cells => cells.filter(cell => cell.tabIndex === 0).length") == 1


def test_arrow_keys_move_by_lines(page: Inspector) -> None:
    pane = page.pane()
    pane.run("ab\ncd\nef", "Score only")
    pane.cells.nth(1).focus()
    page.page.keyboard.press("ArrowDown")
    expect(pane.cells.nth(4)).to_be_focused()
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("ArrowUp")
    expect(pane.cells.nth(4)).to_be_focused()


def test_narrow_screen_layout(page: Inspector) -> None:
    page.page.set_viewport_size({"width": 360, "height": 740})
    pane = page.pane()
    pane.run("word " * 60 + "x" * 80)
    pane.cells.nth(2).focus()
    expect(page.details).to_be_visible()
    width, inner = page.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner
    for index in (2, 150, 250, 0):  # in the first lines, further down and back
        pane.cells.nth(index).click()
        box, cell = page.details.bounding_box(), pane.cells.nth(index).bounding_box()
        assert box is not None
        assert cell is not None
        assert box["y"] >= 0
        assert cell["y"] >= box["y"] + box["height"]  # the panel is above the token
        expect(pane.cells.nth(index)).to_be_in_viewport()
    page.screenshot("narrow")
    page.page.set_viewport_size({"width": 1280, "height": 740})
    expect(page.page.locator("#side #details")).to_be_visible()
    page.page.set_viewport_size({"width": 360, "height": 740})
    page.details.get_by_role("button", name="Unpin").click()
    expect(page.details).to_be_hidden()


def scroll(page: Page, pixels: int) -> None:
    page.locator(".cells").evaluate("(cells, pixels) => cells.scrollBy(0, pixels)", pixels)


def scrolls_in_a_layer(page: Page) -> bool:
    """True if the cells have a compositing layer of their own, so that scrolling repaints nothing."""
    session = page.context.new_cdp_session(page)
    trees: list[Any] = []
    session.on("LayerTree.layerTreeDidChange", lambda change: trees.append(change))
    session.send("DOM.enable")
    root = session.send("DOM.getDocument")["root"]["nodeId"]
    cells = session.send("DOM.querySelector", {"nodeId": root, "selector": ".cells"})["nodeId"]
    node = session.send("DOM.describeNode", {"nodeId": cells})["node"]["backendNodeId"]
    session.send("LayerTree.enable")
    scroll(page, 1)
    height = page.locator(".cells").evaluate("cells => cells.clientHeight")
    for _ in range(50):  # the event of a frame may come after later ones
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        drawn = [layer for tree in trees for layer in tree.get("layers", []) if layer["drawsContent"]]
        if any(layer.get("backendNodeId") == node and layer["height"] > height for layer in drawn):
            return True
    return False


def test_ten_thousand_tokens_stay_responsive(page: Inspector) -> None:
    pane = page.pane()
    page.set(max_tokens=5)
    pane.run("".join(f"{i:9} " for i in range(LONG // 10)))
    expect(pane.cells).to_have_count(LONG + 5)
    assert len(pane.exported()["tokens"]) == LONG + 5
    pane.cells.first.focus()
    page.page.keyboard.press("End")
    expect(pane.cells.last).to_be_in_viewport()
    assert scrolls_in_a_layer(page.page)
    page.page.mouse.move(5, 5)
    pane.cells.nth(LONG // 2).focus()
    expect(page.details).to_be_visible()
    assert f"token {LONG // 2:,}" in page.details.inner_text()
