"""The page during streaming and when requests or the server fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.integration.browser.inspector import Inspector
from tests.support.fake_runner import MAX_MODEL_LEN
from tests.support.http_client import MODEL, Gate, Server
from tests.support.listening import listening

pytestmark = pytest.mark.slow

SCRIPT = b"The model says this."


@pytest.fixture
def fake() -> Iterator[tuple[str, Server]]:
    with listening(script=SCRIPT) as served:
        yield served


def test_stream_appears_token_by_token(inspector: Inspector, fake: tuple[str, Server]) -> None:
    url, server = fake
    gate = server.runner.before_call = Gate("decode", after=4)
    inspector.open(url, MODEL)
    pane = inspector.pane()
    pane.prompt.fill("Hi")
    pane.button("Run").click()
    gate.wait()
    generated = pane.root.locator(".cells .generated")
    expect(generated).to_have_count(3)  # the engine reads a step behind the one that stands at the gate
    expect(pane.root).to_have_attribute("aria-busy", "true")
    assert generated.all_text_contents() == ["T", "h", "e"]
    pane.button("Stop").click()
    pane.wait()
    expect(generated).to_have_count(3)
    expect(pane.error).to_be_hidden()
    gate.open()
    pane.run(button="Continue")  # the model's script begins anew
    assert "".join(pane.texts()) == "HiThe" + SCRIPT.decode() + "<end>"


def test_markup_is_shown_as_text(inspector: Inspector, tmp_path: Path) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    with listening(script=markup.encode()) as (url, _):
        inspector.open(url, MODEL)
        pane = inspector.pane()
        inspector.set(max_tokens=100)
        pane.run(markup)
        assert "".join(pane.texts()) == markup + markup + "<end>"
        pane.cells.nth(3).hover()
        expect(inspector.details).to_be_visible()
        inspector.alternatives.first.click()
        expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
        pane.wait()
        file = tmp_path / "<img src=x onerror=alert(1)>.bin"
        file.write_bytes(b"\xff")
        pane.root.get_by_label("load text file").set_input_files(file)
        expect(pane.error).to_have_text(f"{file.name} is not UTF-8 text.")
        assert pane.exported()["request"] == {"prompt": markup}
        expect(inspector.page.locator("img, body script")).to_have_count(0)


def test_grammar_that_is_refused_names_the_reason(inspector: Inspector, fake: tuple[str, Server]) -> None:
    inspector.open(fake[0], MODEL)
    pane = inspector.pane()
    inspector.set_grammar("JSON schema", "")
    inspector.page.locator("#settings details").evaluate("details => { details.open = false; }")
    pane.run("Hi")
    expect(inspector.page.get_by_label("Grammar text")).to_be_focused()  # the browser asks for it
    inspector.set_grammar("JSON schema", '{"not": {}}')
    pane.run()
    expect(pane.error).to_contain_text("keyword `not` is not supported")
    inspector.set_grammar("regular expression", "x[0-9]")
    pane.run()
    expect(pane.error).to_be_hidden()
    expect(pane.status).to_contain_text("finished")


def test_page_asks_for_the_api_key(inspector: Inspector) -> None:
    with listening(script=SCRIPT, api_key=("secret",)) as (url, _):
        page = inspector.page
        page.goto(url)
        key = page.get_by_label("API key")
        expect(key).to_be_visible()
        expect(page.locator("#key p")).to_contain_text("This server requires an API key.")
        inspector.screenshot("key")
        pane = inspector.pane()
        pane.run("not lost")
        expect(pane.error).to_contain_text("API key")
        key.fill("wrong")
        page.get_by_role("button", name="Use key").click()
        expect(key).to_have_value("")
        expect(page.locator("#key p")).to_contain_text("The API key is invalid.")
        expect(page.locator("#model")).to_have_text("not connected")
        key.fill("secret")
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#model")).to_contain_text(MODEL)
        expect(key).to_be_hidden()
        expect(pane.error).to_be_hidden()
        expect(pane.prompt).to_have_value("not lost")
        pane.run()
        assert "".join(pane.texts()).startswith("not lostThe model")
        page.get_by_role("button", name="Share link").click()
        expect(page.locator("#notice")).to_contain_text("no API key")
        assert "secret" not in page.url
        assert "secret" not in page.evaluate("JSON.stringify(localStorage) + sessionStorage.getItem('state')")


def test_too_long_prompt_is_an_error(inspector: Inspector, fake: tuple[str, Server]) -> None:
    inspector.open(fake[0], MODEL)
    pane = inspector.pane()
    pane.run("seen before")
    before = pane.texts()
    pane.run("x" * (MAX_MODEL_LEN + 1))
    expect(pane.error).to_contain_text(f"{MAX_MODEL_LEN + 1} tokens")
    expect(pane.prompt).to_have_value("x" * (MAX_MODEL_LEN + 1))
    assert pane.texts() == before
    pane.prompt.press("Backspace")
    expect(pane.error).to_be_hidden()
    pane.run("x" * MAX_MODEL_LEN)  # it fits, but not what is to be generated: the server says so
    expect(pane.error).to_contain_text(f"maximum context length is {MAX_MODEL_LEN} tokens")
    inspector.screenshot("error")
    inspector.set(temperature=3)
    pane.button("Run").click()
    assert inspector.page.get_by_label("temperature", exact=True).evaluate("input => !input.validity.valid")


def test_server_restart_reconnects(inspector: Inspector) -> None:
    with listening(script=SCRIPT) as (url, _):
        inspector.open(url, MODEL)
    pane = inspector.pane()
    pane.run("typed")
    expect(pane.error).to_contain_text("is not responding")
    expect(pane.prompt).to_have_value("typed")
    with listening(int(url.rpartition(":")[2]), script=SCRIPT):
        expect(pane.error).to_be_hidden()  # the page tries again by itself
        expect(inspector.page.locator("#model")).to_contain_text(MODEL)
        pane.run()
        assert "".join(pane.texts()) == "typed" + SCRIPT.decode() + "<end>"


def test_server_restart_with_another_model(inspector: Inspector) -> None:
    with listening(script=SCRIPT) as (url, _):
        inspector.open(url, MODEL)
        pane = inspector.pane()
        pane.run("typed")
    port = int(url.rpartition(":")[2])
    with listening(port, script=b"Other.", served_model_name=("other",), system_fingerprint="fp_2"):
        pane.run(button="Run")  # nobody has seen it go
        expect(pane.error).to_contain_text("restarted with another model")
        expect(inspector.page.locator("#model")).to_have_text("not connected")
        pane.run()
        expect(pane.error).to_be_hidden()
        expect(inspector.page.locator("#model")).to_contain_text("other")
        assert "".join(pane.texts()) == "typedOther.<end>"
        pane.cells.nth(2).hover()
        inspector.alternatives.first.click()
        expect(pane.root.get_by_role("navigation").get_by_role("button")).to_have_count(3)
        pane.wait()
    pane.run()
    expect(inspector.page.locator("#model")).to_have_text("not connected")
    with listening(port, script=SCRIPT):  # numbers of two models are not put into one text
        pane.run()
        expect(inspector.page.locator("#model")).to_contain_text(MODEL)
        expect(pane.error).to_be_hidden()
        assert pane.exported()["model"] == MODEL


def test_run_of_a_removed_model_is_not_continued(inspector: Inspector) -> None:
    with listening(script=SCRIPT) as (url, _):
        inspector.open(url, MODEL)
        pane = inspector.pane()
        inspector.set(max_tokens=3)
        pane.run("typed")
        before = pane.texts()
    pane.run(button="Continue")
    expect(pane.error).to_contain_text("is not responding")
    with listening(int(url.rpartition(":")[2]), script=b"Other.", system_fingerprint="fp_2"):
        pane.run(button="Continue")
        expect(pane.error).to_contain_text("restarted with another model")
        assert pane.texts() == before


def test_run_summary_is_of_its_last_request(inspector: Inspector) -> None:
    with listening(script=SCRIPT, max_model_len=1024) as (url, server):
        inspector.open(url, MODEL)
        pane = inspector.pane()
        gate = server.runner.before_call = Gate("decode", after=4)
        pane.prompt.fill("x" * 700)  # scored in two pieces, of which the first has an end of its own
        pane.button("Run").click()
        gate.wait()
        expect(pane.root.locator(".cells .generated")).to_have_count(3)
        pane.button("Stop").click()
        pane.wait()
        gate.open()
        expect(pane.status).to_have_text("700 prompt tokens, 3 generated")
        pane.run(button="Continue")
        expect(pane.status).to_contain_text("finished")
        expect(pane.button("Continue")).to_be_hidden()
        pane.run(button="Score only")
        expect(pane.status).to_contain_text("scored only")


def test_focus_and_details_stay_while_streaming(inspector: Inspector, fake: tuple[str, Server]) -> None:
    url, server = fake
    scoring, choosing = Gate("score"), Gate("decode", after=4)
    inspector.open(url, MODEL)
    inspector.page.evaluate("""() => {
        window.said = [];
        const status = document.querySelector(".pane .status");
        new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
    }""")
    pane = inspector.pane()
    server.runner.before_call = scoring
    pane.prompt.fill("Hello")
    pane.button("Run").click()
    scoring.wait()
    pane.cells.nth(2).hover()
    assert inspector.facts()["log-prob"] == "pending"
    server.runner.before_call = choosing
    scoring.open()
    choosing.wait()
    expect(inspector.alternatives.first).to_be_visible()  # the numbers have come to the box that stood open
    assert inspector.facts()["rank"]
    first = pane.root.locator(".surprising button").first
    first.focus()
    choosing.open()
    pane.wait()
    expect(first).to_be_focused()
    assert inspector.page.evaluate("window.said") == [
        "5 tokens: waiting for log-probs …",
        pane.status.inner_text(),
    ]


def test_branch_keeps_the_focus(inspector: Inspector, fake: tuple[str, Server]) -> None:
    url, server = fake
    inspector.open(url, MODEL)
    pane = inspector.pane()
    pane.run("Hello")
    gate = server.runner.before_call = Gate("decode", after=4)
    pane.cells.nth(2).hover()
    inspector.alternatives.first.click()
    gate.wait()
    branches = pane.root.get_by_role("navigation").get_by_role("button")
    expect(branches).to_have_count(3)
    expect(pane.cells.nth(2)).to_be_focused()
    expect(inspector.details).to_be_visible()
    pane.prompt.fill("another")
    gate.open()
    pane.wait()
    expect(pane.prompt).to_be_focused()
    # Details are of the run that was shown, and go with it.
    pane.cells.nth(3).focus()
    expect(inspector.details).to_be_visible()
    branches.first.focus()
    inspector.page.keyboard.press("Enter")
    expect(inspector.details).to_be_hidden()


def test_page_opened_before_the_server_connects_later(inspector: Inspector, fake: tuple[str, Server]) -> None:
    url, _ = fake
    inspector.page.route("**/v1/models", lambda route: route.abort())
    inspector.page.goto(url)
    expect(inspector.page.locator("#notice")).to_contain_text("is not responding")
    inspector.page.unroute("**/v1/models")
    inspector.pane().run("typed")
    expect(inspector.page.locator("#model")).to_contain_text(MODEL)
    assert "".join(inspector.pane().texts()).startswith("typedThe")


def test_stream_that_fails_shows_the_error(inspector: Inspector, fake: tuple[str, Server]) -> None:
    url, server = fake
    gate = server.runner.before_call = Gate("decode", after=6)
    inspector.open(url, MODEL)
    pane = inspector.pane()
    pane.prompt.fill("Hi")
    pane.button("Run").click()
    gate.wait()

    def fail(name: str) -> None:
        if name != "reset":  # it recovers, and goes on
            raise RuntimeError(name)

    server.runner.before_call = fail
    gate.open()
    pane.wait()
    expect(pane.error).to_contain_text("fail")
    expect(pane.prompt).to_have_value("Hi")
    assert "".join(pane.texts()).startswith("HiThe")
    server.runner.before_call = lambda _: None
    pane.run(button="Continue")
    expect(pane.error).to_be_hidden()
    assert pane.texts()[-1] == "<end>"
