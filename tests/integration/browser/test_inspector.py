"""The inspector in a real browser, on a real server with the default model in float32."""

import csv
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from playwright.sync_api import BrowserContext, expect

from model.token_logprobs import TokenLogprobs
from model.weights.source import default_model_path
from serve.cli.score.config import ScoreConfig
from serve.cli.score.rows import RowWriter
from serve.cli.score.texts import Text
from serve.jobs.results import perplexity
from serve.jobs.score import EncodedText
from serve.server.model_files import local_tokenizer
from tests.integration.browser.inspector import Inspector, number
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "logprobs": True, "top_logprobs": 5, "prompt_logprobs": 5}


def ask(server: ServerProcess, **fields: Any) -> Any:
    """Return the log-probs without the page."""
    response = httpx2.post(f"{server.url}/v1/chat/completions", json=GREEDY | fields, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def page(inspector: Inspector, server: ServerProcess) -> Inspector:
    """The page with greedy decoding and few tokens."""
    inspector.open(server.url)
    inspector.set(temperature=0, max_tokens=8)
    return inspector


def test_cells_show_the_servers_logprobs(page: Inspector, server: ServerProcess) -> None:
    pane = page.pane()
    pane.run(PROMPT)
    tokens = pane.exported()["tokens"]
    assert [token["origin"] for token in tokens] == ["prompt"] * 5 + ["generated"] * 8
    assert "".join(pane.texts()) == "".join(token["text"] for token in tokens)
    assert "".join(pane.texts()).startswith(PROMPT)
    ids = [token["token_id"] for token in tokens]
    expected = ask(server, prompt_token_ids=ids[:5], max_tokens=8)
    assert tokens[0]["logprob"] is None
    for token, entry in zip(tokens[1:5], expected["prompt_logprobs"][1:], strict=True):
        own = entry[str(token["token_id"])]
        assert (token["logprob"], token["rank"]) == (own["logprob"], own["rank"])
        best = [(other["token_id"], other["logprob"]) for other in token["top"]]
        assert dict(best) | {token["token_id"]: own["logprob"]} == {
            int(index): other["logprob"] for index, other in entry.items()
        }
    for token, entry in zip(tokens[5:], expected["choices"][0]["logprobs"]["content"], strict=True):
        assert {name: token[name] for name in ("token_id", "bytes", "logprob", "rank")} == {
            name: entry[name] for name in ("token_id", "bytes", "logprob", "rank")
        }
        assert [other["logprob"] for other in token["top"]] == [other["logprob"] for other in entry["top_logprobs"]]


def test_cell_colors_follow_the_logprobs(page: Inspector) -> None:
    pane = page.pane()
    pane.run(PROMPT)
    bounds = [0.05, 0.3, 0.7, 1.4, 2.3, 3.5, 5, 7, 10]
    for i, token in enumerate(pane.exported()["tokens"][1:], 1):
        step = sum(-token["logprob"] >= bound for bound in bounds)
        assert f"s{step}" in (pane.cells.nth(i).get_attribute("class") or "").split()
    colors = [
        page.page.locator(f".legend .s{i}").evaluate("cell => getComputedStyle(cell).backgroundColor")
        for i in range(10)
    ]
    assert len(set(colors)) == 10


def test_details_are_docked_and_can_be_pinned(page: Inspector) -> None:
    pane = page.pane()
    page.set(alternatives=20)
    pane.run(PROMPT)
    token = pane.exported()["tokens"][1]
    pane.cells.nth(1).hover()
    facts = page.facts()
    assert facts["id"] == str(token["token_id"])
    assert bytes.fromhex(facts["bytes"]) == b" capital"
    assert number(facts["log-prob"]) == pytest.approx(token["logprob"], abs=1e-4)
    assert number(facts["probability"]) == pytest.approx(100 * math.exp(token["logprob"]), abs=0.01)
    assert number(facts["rank"]) == token["rank"] > 20
    # The best, and the token itself, which is none of them and in view at both ends of the table.
    rows = [row.locator("td").all_inner_texts() for row in page.details.locator("tbody tr").all()]
    assert [int(row[5]) for row in rows] == [other["token_id"] for other in token["top"]] + [token["token_id"]]
    cumulative = np.cumsum([math.exp(other["logprob"]) for other in token["top"]])
    assert [number(row[3]) for row in rows[:20]] == pytest.approx(100 * cumulative, abs=0.006)
    assert [number(row[4]) for row in rows[:20]] == pytest.approx([o["logprob"] for o in token["top"]], abs=1e-4)
    assert [bytes.fromhex(row[6]) for row in rows[:20]] == [bytes(other["bytes"]) for other in token["top"]]
    shares = page.details.locator(".bar").evaluate_all("bars => bars.map(bar => bar.style.getPropertyValue('--share'))")
    assert [float(share) for share in shares[:20]] == pytest.approx([math.exp(o["logprob"]) for o in token["top"]])
    page.page.set_viewport_size({"width": 1280, "height": 620})  # too low for 20 rows
    own, scroller = page.details.locator(".own td").first, page.details.locator(".scroller")
    for end in (10_000, 0):
        scroller.evaluate("(element, end) => element.scrollTo(0, end)", end)
        expect(own).to_be_in_viewport(ratio=0.99)
    page.page.set_viewport_size({"width": 1280, "height": 900})
    page.screenshot("inspector")
    page.page.mouse.move(5, 5)
    expect(page.details).to_be_visible()  # it covers nothing
    pane.cells.nth(0).hover()
    assert page.facts()["log-prob"] == "none (first token)"
    pane.cells.nth(3).click()
    pane.cells.nth(2).hover()
    assert bytes.fromhex(page.facts()["bytes"]) == b" France"
    expect(pane.cells.nth(3)).to_have_class(re.compile("pinned"))
    page.page.keyboard.press("Escape")
    pane.cells.nth(4).hover()
    assert bytes.fromhex(page.facts()["bytes"]) == b" is"


def test_alternative_starts_a_branch(page: Inspector, server: ServerProcess) -> None:
    pane = page.pane()
    pane.run(PROMPT)
    before = pane.exported()["tokens"]
    pane.cells.nth(5).hover()
    page.alternatives.nth(1).click()
    expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
    pane.wait()
    branch = pane.exported()["tokens"]
    taken = before[5]["top"][1]
    assert branch[:5] == before[:5]
    assert branch[5]["origin"] == "branch"
    assert {name: branch[5][name] for name in taken} == taken  # scored again, with the same bits
    ids = [token["token_id"] for token in branch]
    expected = ask(server, prompt_token_ids=ids[:6], max_tokens=8)["choices"][0]["logprobs"]["content"]
    assert [(t["token_id"], t["logprob"]) for t in branch[6:]] == [(e["token_id"], e["logprob"]) for e in expected]
    page.screenshot("branch")
    pane.root.get_by_role("navigation").get_by_role("button").first.click()
    assert pane.exported()["tokens"] == before


def test_text_can_be_continued(page: Inspector, server: ServerProcess) -> None:
    pane = page.pane()
    pane.run(PROMPT, "Score only")
    expect(pane.cells).to_have_count(5)
    pane.run(button="Continue")
    pane.run(button="Continue")
    tokens = pane.exported()["tokens"]
    ids = [token["token_id"] for token in tokens]
    expected = ask(server, prompt_token_ids=ids[:5], max_tokens=16)["choices"][0]["logprobs"]["content"]
    assert [(t["token_id"], t["logprob"]) for t in tokens[5:]] == [(e["token_id"], e["logprob"]) for e in expected]


def test_chat_shows_the_reply(page: Inspector, server: ServerProcess) -> None:
    pane = page.pane()
    pane.root.get_by_label("chat").check()
    pane.root.get_by_label("Message", exact=True).fill("What is the capital of France?")
    page.set(max_tokens=20)
    pane.run()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = ask(server, messages=messages, max_tokens=20, return_token_ids=True)
    tokens = pane.exported()["tokens"]
    assert [token["token_id"] for token in tokens] == expected["prompt_token_ids"] + expected["choices"][0]["token_ids"]
    assert [token["text"] for token in tokens if token["special"]].count("<|im_end|>") == 3
    expect(pane.status).to_contain_text("finished")
    page.screenshot("chat")
    pane.button("Add reply to the chat").click()
    texts = [box.input_value() for box in pane.root.get_by_label("Message", exact=True).all()]
    assert texts == [messages[0]["content"], expected["choices"][0]["message"]["content"], ""]


def test_summary_equals_the_sum_of_tokens(page: Inspector) -> None:
    pane = page.pane()
    pane.run("Once upon a time, a zebra wrote Python.")
    tokens, totals = pane.exported()["tokens"], pane.totals()
    scored = [token for token in tokens if token["logprob"] is not None]
    mean = sum(token["logprob"] for token in scored) / len(scored)
    bits = -sum(token["logprob"] for token in scored) / math.log(2) / sum(len(token["bytes"]) for token in scored)
    assert number(totals["tokens"][2]) == len(tokens)
    assert number(totals["perplexity"][2]) == pytest.approx(math.exp(-mean), abs=1e-3)
    assert number(totals["bits per byte"][2]) == pytest.approx(bits, abs=1e-3)
    surprising = pane.root.locator(".surprising button")
    lowest = min(scored, key=lambda token: token["logprob"])
    assert f"rank {lowest['rank']:,}" in surprising.first.inner_text()
    counts = pane.root.locator(".histogram .size").all_inner_texts()
    ranks = [token["rank"] for token in scored]
    limits = [0, 1, 3, 10, 100, 1000, math.inf]
    assert [int(count) for count in counts] == [
        sum(low < rank <= high for rank in ranks) for low, high in itertools.pairwise(limits)
    ]
    surprising.first.click()
    expect(pane.cells.nth(tokens.index(lowest))).to_be_focused()
    # A click on the curve goes to the token there: at its left end, the first that has numbers.
    pane.root.locator(".curve").click(position={"x": 1, "y": 10})
    expect(pane.cells.nth(1)).to_be_focused()


def test_side_by_side_compares_two_prompts(page: Inspector) -> None:
    page.page.get_by_role("button", name="Compare").click()
    left, right = page.pane(0), page.pane(1)
    left.prompt.fill("Water boils at one hundred degrees.")
    right.prompt.fill("Water boils at ninety thousand degrees.")
    left.button("Score only").click()
    right.run(button="Score only")
    left.wait()
    table = page.page.locator("#comparison")
    rows = {
        row[0]: row[1:] for row in ([*each.locator("th, td").all_inner_texts()] for each in table.locator("tr").all())
    }
    one, other, difference = map(number, rows["perplexity"])
    assert [one, other] == [number(pane.totals()["perplexity"][2]) for pane in (left, right)]
    assert other - one == pytest.approx(difference, abs=1.5e-3 if other < 1000 else 1)
    assert one < other
    boxes = [pane.root.bounding_box() for pane in (left, right)]
    assert boxes[0]
    assert boxes[1]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.screenshot("compare")
    page.page.get_by_role("button", name="Compare").click()
    expect(page.page.locator(".pane")).to_have_count(1)


def test_export_as_tables(page: Inspector) -> None:
    pane = page.pane()
    pane.run('A "quoted", text\nof 😊 two lines \ufeff')
    exported, text = pane.exported(), pane.download("Export CSV")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(exported["tokens"])
    for row, token in zip(rows, exported["tokens"], strict=True):
        assert (int(row["token_id"]), bytes.fromhex(row["bytes"])) == (token["token_id"], bytes(token["bytes"]))
        assert row["logprob"] == ("" if token["logprob"] is None else repr(token["logprob"]))
        assert json.loads(row["text"]) == token["text"] == bytes(token["bytes"]).decode("utf-8", "replace")
        tops = [row[f"top_{i}_token_id"] for i in range(1, 6)]
        assert tops == [str(other["token_id"]) for other in token["top"]] or tops == [""] * 5
        texts = [json.loads(row[f"top_{i}_text"] or '""') for i in range(1, 6)]
        assert texts == [other["text"] for other in token["top"]] or texts == [""] * 5
    assert exported["model"] == "SmolLM2-135M-Instruct"


def test_grammar_shows_allowed_mass_and_forced_tokens(page: Inspector, server: ServerProcess) -> None:
    pane = page.pane()
    page.set_grammar("regular expression", r" (London|Berlin)\.")
    pane.run(PROMPT)
    tokens = pane.exported()["tokens"]
    entries = ask(
        server,
        prompt_token_ids=[token["token_id"] for token in tokens[:5]],
        max_tokens=8,
        structured_outputs={"regex": r" (London|Berlin)\."},
    )["choices"][0]["logprobs"]["content"]
    names = ("token_id", "logprob", "allowed_mass")
    assert [[token[name] for name in names] for token in tokens[5:]] == [
        [entry[name] for name in names] for entry in entries
    ]
    forced = [entry.get("forced", False) for entry in entries]
    assert [token["forced"] for token in tokens] == [None] * 5 + forced
    assert True in forced
    assert False in forced
    expect(pane.status).to_contain_text(f"{sum(forced)} forced")
    rows = list(csv.DictReader(io.StringIO(pane.download("Export CSV"), newline="")))
    assert [row["allowed_mass"] for row in rows] == [""] * 5 + [repr(entry["allowed_mass"]) for entry in entries]
    assert entries[0]["allowed_mass"] < 0.5  # the model would name another city
    held = pane.cells.nth(5 + forced.index(True))
    expect(held).to_have_css("border-bottom-style", "double")
    label = pane.cells.nth(5).get_attribute("aria-label") or ""
    assert "allowed mass" in label
    assert "forced" not in label
    assert (held.get_attribute("aria-label") or "").endswith(", forced by the grammar")
    pane.cells.nth(5).hover()
    assert number(page.facts()["allowed mass"]) == pytest.approx(100 * entries[0]["allowed_mass"], abs=0.01)
    assert "forced" not in page.facts()
    page.page.locator("[name=colors]").select_option("allowed mass")
    colors = [
        page.page.locator(f".legend .m{i}").evaluate("cell => getComputedStyle(cell).backgroundColor")
        for i in range(10)
    ]
    assert len(set(colors)) == 10
    for i, entry in enumerate(entries, 5):
        step = sum(-math.log(entry["allowed_mass"]) >= bound for bound in (0.05, 0.3, 0.7, 1.4, 2.3, 3.5, 5, 7, 10))
        color = pane.cells.nth(i).evaluate("cell => getComputedStyle(cell).backgroundColor")
        assert color == colors[step]
    held.hover()
    assert page.facts()["forced"] == "the grammar allowed no other token"
    page.screenshot("grammar")
    page.page.reload()
    assert page.page.get_by_label("Grammar text").input_value() == r" (London|Berlin)\."
    assert page.page.locator("html").get_attribute("data-colors") == "mass"


def test_grammar_goes_on_after_continue_and_in_branches(page: Inspector) -> None:
    pane = page.pane()
    page.set_grammar("regular expression", " (London|Paris|Berlin) is large, and so is Rome[.]")
    page.set(max_tokens=20)
    pane.run(PROMPT)
    whole = pane.exported()["tokens"]
    page.set(max_tokens=3)
    pane.run()
    page.set(max_tokens=20)
    pane.run(button="Continue")
    assert pane.exported()["tokens"] == whole
    pane.cells.nth(5).hover()
    page.alternatives.filter(has_text="London").click()
    expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
    pane.wait()
    assert "".join(pane.texts()).startswith(f"{PROMPT} London is large, and so is Rome.")
    pane.cells.nth(6).hover()
    page.alternatives.filter(has_text=",").first.click()
    expect(pane.error).to_contain_text("the grammar does not allow token")


def test_export_contains_the_run(page: Inspector) -> None:
    pane = page.pane()
    pane.run(PROMPT)
    page.set(max_tokens=3, temperature=0.5)
    pane.run(button="Continue")
    pane.prompt.fill("another text")
    page.set(temperature=1)
    exported = pane.exported()
    assert exported["request"] == {"prompt": PROMPT}
    first, then = exported["parameters"]
    assert first == {"from": 5, "max_tokens": 8, "temperature": 0, "top_logprobs": 5}
    assert then == {"from": 13, "max_tokens": 3, "temperature": 0.5, "top_logprobs": 5}
    assert exported["system_fingerprint"].startswith("fp_")
    pane.cells.nth(5).hover()
    page.alternatives.nth(1).click()
    expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
    pane.wait()
    branch = pane.exported()
    assert [each["from"] for each in branch["parameters"]] == [6]  # nothing before it was generated
    assert branch["request"] == exported["request"]


def test_summary_equals_the_score_command(page: Inspector) -> None:
    """Without special tokens, in both."""
    pane = page.pane()
    pane.run("<|im_start|>user\nOnce upon a time, a zebra 😊<|im_end|>\n", "Score only")
    exported = pane.exported()
    tokens = exported["tokens"]
    empty = np.empty((len(tokens) - 1, 0), np.int32)
    scores = TokenLogprobs(
        np.array([token["logprob"] for token in tokens[1:]], np.float32),
        np.array([token["rank"] for token in tokens[1:]], np.int32),
        empty,
        empty.astype(np.float32),
        top_ranks=empty,
    )
    writer = RowWriter(local_tokenizer(default_model_path()), ScoreConfig(file=Path("a.jsonl")))
    text = Text(EncodedText([token["token_id"] for token in tokens]))
    _, sums = writer.row(1, text, 1, scores)
    totals = exported["totals"]
    assert totals["bitsPerByte"] == pytest.approx(sums.bits_per_byte)
    assert totals["perplexity"] == pytest.approx(perplexity(sums.logprob, sums.scored))
    assert sums.bytes < sum(len(token["bytes"]) for token in tokens[1:])


def test_link_restores_the_form_and_runs_nothing(page: Inspector, context: BrowserContext) -> None:
    pane = page.pane()
    pane.prompt.fill("Shared: ünï 😊")
    page.set(max_tokens=3, top_p=0.5)
    page.page.get_by_role("button", name="Share link").click()
    expect(page.page.locator("#notice")).to_contain_text("link")
    other = Inspector(context.new_page())
    other.open(page.page.url)
    assert other.pane().prompt.input_value() == "Shared: ünï 😊"
    assert other.page.get_by_label("top p", exact=True).input_value() == "0.5"
    expect(other.pane().cells).to_have_count(0)
    other.page.goto(page.page.url[:-4])
    expect(other.page.locator("#notice")).to_contain_text("damaged")
    assert other.complaints == []


def test_reload_keeps_the_form(page: Inspector) -> None:
    page.pane().prompt.fill("not lost")
    page.page.reload()
    assert page.pane().prompt.input_value() == "not lost"
    assert page.page.get_by_label("max tokens", exact=True).input_value() == "8"


def test_edits_after_a_link_are_kept(page: Inspector) -> None:
    pane = page.pane()
    pane.prompt.fill("before")
    page.page.get_by_role("button", name="Share link").click()
    expect(page.page.locator("#notice")).to_contain_text("link")
    link = page.page.url
    page.page.reload()
    expect(pane.prompt).to_have_value("before")
    assert page.page.url == link  # nothing was typed: it can still be copied
    pane.prompt.fill("after")
    page.page.reload()
    expect(pane.prompt).to_have_value("after")
    page.page.goto(link)
    expect(pane.prompt).to_have_value("before")
    page.page.goto(link.partition("#")[0])
    expect(pane.prompt).to_have_value("before")  # what a link brought is kept, too


def test_files_can_be_opened(page: Inspector, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.bin"
    good.write_text("From a file: é\n", "utf-8")
    bad.write_bytes(b"\xff\xfe\x00")
    pane = page.pane()
    chooser = pane.root.get_by_label("load text file")
    chooser.set_input_files(good)
    expect(pane.prompt).to_have_value("From a file: é\n")
    chooser.set_input_files(bad)
    expect(pane.error).to_have_text("bad.bin is not UTF-8 text.")
    bad.write_bytes(b"a" * ((4 << 20) + 1))
    chooser.set_input_files(bad)
    expect(pane.error).to_have_text("bad.bin is larger than 4 MiB.")
    expect(pane.prompt).to_have_value("From a file: é\n")


def test_invisible_characters_are_shown(page: Inspector) -> None:
    pane = page.pane()
    text = "a \t b\n\n<|im_start|>\u200b\u202ex\u0301 👩\u200d💻"
    pane.run(text, "Score only")
    exported = pane.exported()["tokens"]
    assert b"".join(bytes(token["bytes"]) for token in exported) == text.encode()
    special = [i for i, token in enumerate(exported) if token["special"]]
    assert [exported[i]["text"] for i in special] == ["<|im_start|>"]
    assert "special" in (pane.cells.nth(special[0]).get_attribute("class") or "")
    drawn = pane.cells.evaluate_all(
        """cells => cells.map(cell => [...cell.querySelectorAll("i")].map(
            i => getComputedStyle(i, "::before").content).join(""))"""
    )
    signs = "".join(drawn)
    assert all(sign in signs for sign in ("·", "→", "↵"))
    # Halves of a character: each byte in hexadecimal, and the whole beside the last.
    halves = [
        i for i, token in enumerate(exported) if bytes(token["bytes"]).decode("utf-8", "replace").endswith("\ufffd")
    ]
    assert halves
    wholes = pane.cells.evaluate_all("cells => cells.map(cell => cell.dataset.whole ?? '')")
    assert {"👩", "💻"} <= set(wholes)
    pane.cells.nth(halves[0]).hover()
    assert page.facts()["part of"] == "<U+200B>"  # which nobody could see
    page.screenshot("bytes")


def test_prompt_of_5000_tokens(page: Inspector) -> None:
    pane = page.pane()
    text = "".join(f"{n} is a number. " for n in range(1, 645))
    pane.prompt.fill(text)
    page.set(max_tokens=2)
    pane.button("Run").click()
    expect(pane.cells.first).to_be_visible()  # the tokens come before their numbers
    pane.wait()
    tokens = pane.exported()["tokens"]
    assert sum(token["origin"] == "prompt" for token in tokens) > 5000
    assert all(token["logprob"] is not None for token in tokens[1:])
    expect(pane.cells).to_have_count(len(tokens))
    assert "".join(pane.texts()).startswith(text)
    pane.cells.nth(10).focus()
    page.page.keyboard.press("End")
    expect(pane.cells.last).to_be_in_viewport()
    page.screenshot("long")
