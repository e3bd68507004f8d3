"""Views of a result: colors, the sampled distribution, the tree of continuations and the table of tokens."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from playwright.sync_api import expect

from serve.jobs.generate import GenerationOptions
from tests.integration.browser.inspector import Inspector, number
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"


def ask(server: ServerProcess, **fields: Any) -> list[Any]:
    """Return the best of the next tokens."""
    body = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1} | fields
    response = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    top: list[Any] = response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return top


def alternatives(token: dict[str, Any]) -> list[float]:
    known = {each["token_id"]: each["logprob"] for each in [*token["top"], token]}
    return sorted(known.values(), reverse=True)


def entropy(token: dict[str, Any]) -> float:
    p = np.exp(alternatives(token))
    return float(-np.sum(p * np.log(p)) - (1 - p.sum()) * math.log(1 - p.sum()))


def margin(token: dict[str, Any]) -> float:
    first, second, *_ = alternatives(token)
    return first - second


def test_colors_and_table(inspector: Inspector, server: ServerProcess) -> None:
    inspector.open(server.url)
    inspector.set(temperature=0, max_tokens=8)
    pane = inspector.pane()
    pane.run(PROMPT)
    tokens = pane.exported()["tokens"]
    values: dict[str, tuple[str, list[float], Callable[[dict[str, Any]], float]]] = {
        "rank": ("r", [2, 3, 5, 10, 30, 100, 300, 1000, 10_000], lambda token: token["rank"]),
        "entropy": ("e", [0.1, 0.3, 0.6, 1, 1.5, 2, 2.5, 3, 4], entropy),
        "margin": ("g", [-6, -4, -3, -2, -1.5, -1, -0.5, -0.25, -0.1], lambda token: -margin(token)),
    }
    for name, (prefix, bounds, value) in values.items():
        inspector.page.locator("[name=colors]").select_option(name)
        legend = inspector.page.locator(f".legend[data-scale={name}] .cell[class*=' {prefix}']")
        colors = legend.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).backgroundColor)")
        assert len(set(colors)) == 10
        expect(legend.first).to_be_visible()
        drawn = pane.cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).backgroundColor)")
        assert drawn[1:] == [colors[sum(value(token) >= bound for bound in bounds)] for token in tokens[1:]], name
    table = pane.root.locator(".token-table")
    table.locator("summary").click()
    rows = table.locator("tbody tr")
    expect(rows).to_have_count(13)
    for ascending in (True, False):
        table.get_by_role("button", name="log-prob").click()
        shown = [number(row.locator("td").nth(1).inner_text()) for row in rows.all()[:-1]]
        assert shown == sorted(shown, reverse=not ascending)  # the first token, without a number, is last
        assert shown == pytest.approx(sorted((t["logprob"] for t in tokens[1:]), reverse=not ascending), abs=1e-4)
    table.get_by_label("contains").fill("CAPITAL")
    expect(rows).to_have_count(1)
    rows.get_by_role("button").click()
    expect(pane.cells.nth(1)).to_be_focused()
    # The branch against the first run: no color where both have the same numbers.
    inspector.page.locator("[name=colors]").select_option("difference")
    pane.cells.nth(5).click()
    inspector.alternatives.nth(1).click()
    expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
    pane.wait()
    classes = [str(each).split() for each in pane.cells.evaluate_all("cells => cells.map(cell => cell.className)")]
    assert ["d4" in each for each in classes[:6]] == [False] + [True] * 4 + [False]
    inspector.screenshot("difference")


def test_sampled_distribution_and_tree(inspector: Inspector, server: ServerProcess) -> None:
    inspector.open(server.url)
    inspector.set(temperature=0, max_tokens=1, alternatives=20)
    pane = inspector.pane()
    pane.run(PROMPT)
    ids = [token["token_id"] for token in pane.exported()["tokens"]][:5]
    pane.cells.nth(5).click()
    details = inspector.details
    details.get_by_text("Sampled distribution").click()
    filters = {"temperature": 0.9, "top_p": 0.97, "top_k": 5, "min_p": 0.0}
    for name, value in filters.items():
        details.get_by_label(f"{name.replace('_', ' ')} of the sampled").fill(str(value))
    expected = ask(server, prompt_token_ids=ids, logprobs_mode="processed_logprobs", seed=1, **filters)
    expected = [other for other in expected if other["logprob"] > -1000]
    assert 1 < len(expected) < 5  # top_p excludes one of the five
    shown = [number(row.locator("td").nth(3).inner_text()) for row in details.locator("tbody tr").all()]
    assert shown[: len(expected)] == pytest.approx([100 * math.exp(o["logprob"]) for o in expected], abs=0.006)
    assert set(shown[len(expected) :]) == {0}
    details.get_by_role("button", name="Tree").click()
    tree = pane.root.get_by_role("region", name="Tree of continuations")
    first = tree.get_by_role("button").nth(2)  # after Close and the best token
    first.click()
    nodes = tree.locator("ul ul button")
    expect(nodes).to_have_count(8)
    [*_, second] = ask(server, prompt_token_ids=ids, temperature=0, top_logprobs=2)
    following = ask(server, prompt_token_ids=[*ids, second["token_id"]], temperature=0)[:8]
    label = nodes.nth(3).get_attribute("aria-label") or ""
    own, path = (number(part.rpartition(" %")[0].split(" ")[-1]) for part in label.rsplit(", ", 2)[1:])
    assert own == pytest.approx(100 * math.exp(following[3]["logprob"]), abs=0.006)
    assert path == pytest.approx(100 * math.exp(second["logprob"] + following[3]["logprob"]), abs=0.006)
    inspector.screenshot("tree")
    first.click()
    expect(nodes.first).to_be_hidden()


def test_copies_and_keys(inspector: Inspector, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector.open(server.url)
    inspector.set(temperature=0, max_tokens=4)
    pane, text = inspector.pane(), f"{PROMPT} \"<&>'"
    pane.run(text)
    tokens = pane.exported()["tokens"]

    def copy(kind: str) -> str:
        pane.form.get_by_label("Copy as").select_option(kind)
        return pane.root.get_by_label(kind, exact=True).input_value()

    assert json.loads(copy("ids")) == [token["token_id"] for token in tokens]
    stub = 'curl() { printf "%s\\n" "$1"; cat; }\n'
    output = subprocess.run(["bash", "-c", stub + copy("curl")], capture_output=True, text=True, check=True).stdout
    url, _, body = output.partition("\n")
    answer = httpx2.post(url, json=json.loads(body), timeout=60).json()["choices"][0]
    assert answer["logprobs"]["token_logprobs"][-4:] == [token["logprob"] for token in tokens[-4:]]
    calls = list[dict[str, Any]]()
    module = ModuleType("openai")

    def create(*, extra_body: dict[str, Any], **fields: Any) -> Any:
        calls.append(fields | extra_body)
        return SimpleNamespace(to_json=str)

    module.__dict__["OpenAI"] = lambda **_: SimpleNamespace(completions=SimpleNamespace(create=create))
    monkeypatch.setitem(sys.modules, "openai", module)
    exec(copy("Python"), {})
    assert calls == [json.loads(body)]
    code = copy("LLM")
    compile(code, "copied", "exec")
    names = [line.strip().partition("=")[0] for line in code.splitlines() if line.startswith("        ")]
    assert set(names) >= {"logprobs", "prompt_logprobs", "max_tokens", "temperature"}
    assert set(names[1:]) <= set(GenerationOptions.model_fields)  # the first is the prompt
    svg = ET.fromstring(pane.download("Save SVG"))
    drawn = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "".join(drawn[: len(drawn) - 4]) == text
    inspector.page.mouse.click(5, 5)
    inspector.page.keyboard.press("?")
    expect(inspector.page.get_by_role("dialog", name="Keys")).to_be_visible()
    inspector.screenshot("keys")
    inspector.page.keyboard.press("Escape")
    expect(inspector.page.get_by_role("dialog", name="Keys")).to_be_hidden()


def test_curve_selects_a_range_and_template_tokens_fold(inspector: Inspector, server: ServerProcess) -> None:
    inspector.open(server.url)
    inspector.set(temperature=0, max_tokens=4)
    pane = inspector.pane()
    pane.root.get_by_label("chat").check()
    pane.root.get_by_label("Message", exact=True).fill("Why is the sky blue?")
    pane.run()
    tokens = pane.exported()["tokens"]
    curve = pane.root.locator(".curve")
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    assert box is not None
    mouse, y = inspector.page.mouse, box["y"] + 20
    mouse.move(box["x"] + 1, y)
    mouse.down()
    mouse.move(box["x"] + box["width"] - 1, y)
    mouse.up()
    expect(pane.root.locator(".brushed")).to_have_count(len(tokens) - 1)  # all that have numbers
    total = sum(token["logprob"] for token in tokens[1:])
    text = pane.root.locator(".range").inner_text()
    assert text.startswith(f"Tokens 1 to {len(tokens) - 1}: log-prob ")
    assert number(text.split("log-prob ")[1].split(", ")[0]) == pytest.approx(total, abs=1e-3)
    mouse.click(box["x"] + 1, y)
    expect(pane.root.locator(".brushed")).to_have_count(0)
    expect(pane.cells.nth(1)).to_be_focused()
    pane.root.get_by_label("fold the template").check()
    content = [token for token in tokens if token["origin"] == "generated"]
    words = [each for each in tokens if each["text"].strip() in {"Why", "is", "the", "sky", "blue", "?"}]
    assert "".join(word["text"] for word in words) == "Why is the sky blue?"
    columns = pane.totals()
    assert [int(value) for value in columns["tokens"]] == [6, len(content), 6 + len(content)]
    assert number(columns["log-prob, sum"][0]) == pytest.approx(sum(word["logprob"] for word in words), abs=1e-3)
    inspector.screenshot("folded")
    pane.root.get_by_label("fold the template").uncheck()
    assert int(pane.totals()["tokens"][2]) == len(tokens)
