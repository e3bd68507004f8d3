"""The tab of decisions in a real browser, on a real server with the default model in float32."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.integration.browser.inspector import Inspector, number
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

STATE = "Where is my lamp? I want my money back now."
REFUND = {"type": "predicate", "name": "refund", "instructions": "Does the customer want a refund?"}
TONE = {
    "type": "choice",
    "name": "tone",
    "instructions": "What is the tone?",
    "choices": [{"value": "angry", "description": "upset"}, {"value": "neutral"}, {"value": "very kind"}],
}
URGENCY = {
    "type": "score",
    "instructions": "How urgent is it?",
    "levels": [{"label": "can wait"}, {"label": "today", "description": "within a day"}],
}


class DecideView:
    """The tab of decisions."""

    def __init__(self, inspector: Inspector) -> None:
        self.inspector = inspector
        inspector.page.get_by_role("tab", name="Decide").click()
        self.root = inspector.page.locator("#decide")
        self.state = self.root.get_by_label("State", exact=True)
        self.status = self.root.locator(".status")
        self.answers = self.root.locator(".answer")
        self.questions = self.root.locator(".question")

    def fill(self, *questions: dict[str, Any], state: str = STATE) -> None:
        """Type the state and the questions; there is one empty question."""
        self.state.fill(state)
        for i, question in enumerate(questions):
            if i >= self.questions.count():
                self.root.get_by_role("button", name="Add question").click()
            self._fill_question(self.questions.nth(i), question)

    def _fill_question(self, card: Locator, question: dict[str, Any]) -> None:
        card.get_by_label("type").select_option(question["type"])
        card.get_by_label("name").fill(question.get("name", ""))
        card.get_by_label("Instructions").fill(question["instructions"])
        noun, start = ("level", 0) if question["type"] == "score" else ("option", 1)
        for i, option in enumerate(question.get("choices") or question.get("levels") or []):
            if i > 1:
                card.get_by_role("button", name=f"Add {noun}").click()
            name = f"{noun} {i + start}"
            card.get_by_label(name, exact=True).fill(option["label" if noun == "level" else "value"])
            card.get_by_label(f"Description of {name}", exact=True).fill(option.get("description", ""))

    def run(self) -> None:
        """Press the button and wait for the end."""
        self.root.get_by_role("button", name="Decide", exact=True).click()
        self.root.locator(".decision[aria-busy=false]").wait_for()

    def scoring(self, name: str) -> None:
        self.root.get_by_label("scoring").select_option(name)

    def errors(self) -> list[str]:
        return [error.inner_text() for error in self.root.locator("[role=alert]:visible").all()]

    def code(self, button: str) -> str:
        """Return the text that a button copies."""
        self.root.get_by_role("button", name=f"Copy as {button}").click()
        expect(self.root.locator(".code")).to_be_visible()
        return self.root.locator(".code").input_value()


def rows(table: Locator) -> list[list[str]]:
    """Texts of the cells, without the heading."""
    return [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]


def facts(answer: Locator) -> dict[str, str]:
    return dict(zip(answer.locator("dt").all_inner_texts(), answer.locator("dd").all_inner_texts(), strict=True))


def ask(server: ServerProcess, *questions: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """Return the answers without the page."""
    body = {"input": STATE, "questions": questions, "return_token_ids": True} | fields
    response = httpx2.post(f"{server.url}/v1/decisions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answers: list[dict[str, Any]] = response.json()["answers"]
    return answers


def check(row: list[str], probability: float, *logprobs: float) -> None:
    """Compare a row of the table: option, bar, probability, labels, log-probs."""
    assert number(row[2]) == pytest.approx(100 * probability, abs=0.00501)
    assert [number(cell) for cell in row[4 : 4 + len(logprobs)]] == pytest.approx(logprobs, abs=5.1e-5)


@pytest.fixture
def decide(inspector: Inspector, server: ServerProcess) -> DecideView:
    inspector.open(server.url)
    return DecideView(inspector)


def test_answers_show_the_servers_numbers(decide: DecideView, server: ServerProcess) -> None:
    decide.fill(REFUND, TONE, URGENCY)
    decide.run()
    assert decide.errors() == []
    refund, tone, urgency = ask(server, REFUND, TONE, URGENCY)
    expect(decide.status).to_contain_text("3 answers")
    shown = rows(decide.answers.nth(0).locator(".probabilities"))
    for row, text, label, probability, logprob in zip(
        shown,
        ("yes", "no"),
        ("Yes", "No"),
        (refund["probability"], 1 - refund["probability"]),
        refund["evidence"]["logprobs"],
        strict=True,
    ):
        assert (row[0], row[3]) == (text, label)
        check(row, probability, logprob)
    for i, (answer, names, labels) in enumerate(
        ((tone, ["angry", "neutral", "very kind"], "ABC"), (urgency, ["0: can wait", "1: today"], "AB")), 1
    ):
        view, evidence = decide.answers.nth(i), answer["evidence"]
        shown = rows(view.locator(".probabilities"))
        assert [(row[0], row[3]) for row in shown] == [*zip(names, labels, strict=True)]
        for row, option, logprob in zip(shown, answer["probabilities"], evidence["logprobs"], strict=True):
            check(row, option["probability"], logprob)
        bars = view.locator(".probabilities .bar").evaluate_all(
            "bars => bars.map(b => b.style.getPropertyValue('--share'))"
        )
        assert [*map(float, bars)] == [option["probability"] for option in answer["probabilities"]]
        values = facts(view)
        assert number(values["label mass"]) == pytest.approx(100 * evidence["label_mass"], abs=0.00501)
        assert values["most likely token is a label"] == ("yes" if evidence["argmax_is_label"] else "no")
        value, _, formula = values["confidence"].partition(" = ")
        assert number(value) == pytest.approx(answer["confidence"], abs=5e-4)
        assert formula == evidence["confidence_formula"]
    expect(decide.answers.nth(1).locator("h2")).to_contain_text(f"2. tone: {tone['choice']}, ")
    assert facts(decide.answers.nth(2))["score"].endswith(f" = {urgency['evidence']['score_formula']}")
    decide.inspector.page.evaluate("scrollTo(0, 0)")
    decide.inspector.screenshot("decide")


def test_effect_of_the_order(decide: DecideView, server: ServerProcess) -> None:
    decide.fill(TONE)
    decide.scoring("permutations")
    decide.root.get_by_label("orders").fill("5")
    decide.root.get_by_label("temperature").fill("2")
    decide.run()
    [answer] = ask(server, TONE, scoring="permutations", permutations=5, temperature=2)
    orders, options = answer["evidence"]["orders"], answer["probabilities"]
    view = decide.answers.first
    for i, row in enumerate(rows(view.locator(".probabilities"))):
        check(row, options[i]["probability"], answer["evidence"]["logprobs"][i])
        assert number(row[5]) == pytest.approx(100 * answer["evidence"]["spread"][i], abs=0.00501)
    bars = view.locator(".bar").evaluate_all(
        "bars => bars.map(bar => ['--low', '--high'].map(name => Number(bar.style.getPropertyValue(name))))"
    )
    columns = [*zip(*(order["probabilities"] for order in orders), strict=True)]
    assert bars == [[min(column), max(column)] for column in columns]
    bests = [order["probabilities"].index(max(order["probabilities"])) for order in orders]
    mean = max(range(3), key=lambda i: options[i]["probability"])
    changed = sum(best != mean for best in bests)
    expect(view.locator(".effect")).to_contain_text(f"differs in {changed} of 5 orders")
    view.get_by_text("All orders", exact=True).click()
    table = rows(view.locator("details table"))
    names = [option["value"] for option in options]
    for i, (row, order) in enumerate(zip(table, orders, strict=True)):
        assert row[0] == f"{i + 1}. " + ", ".join(names[j] for j in order["order"])
        shown = [number(cell) for cell in row[1:5]]
        assert shown == pytest.approx([100 * p for p in (*order["probabilities"], order["label_mass"])], abs=0.00501)


@pytest.mark.parametrize("normalize", ["sum", "token", "pmi"])
def test_sequences(decide: DecideView, server: ServerProcess, normalize: str) -> None:
    decide.fill(TONE)
    decide.scoring("sequences")
    decide.root.get_by_label("normalize").select_option("" if normalize == "sum" else normalize)
    decide.run()
    [answer] = ask(server, TONE, scoring="sequences", normalize=normalize)
    evidence = answer["evidence"]
    shown = rows(decide.answers.first.locator(".probabilities"))
    for i, row in enumerate(shown):
        columns = {"sum": ["logprobs"], "token": ["logprobs", "normalized"]}
        names = columns.get(normalize, ["logprobs", "prior_logprobs", "normalized"])
        check(row, answer["probabilities"][i]["probability"], *(evidence[name][i] for name in names))
        assert len(row) == 4 + len(names)
    assert shown[2][3] == "very kind<|im_end|>"
    assert facts(decide.answers.first)["scoring"] == f"sequences, {normalize}"
    if normalize == "pmi":
        prompts = decide.answers.first.locator("details")
        prompts.get_by_text("Tokens of the 2 prompts").click()
        prompts.get_by_role("button", name="empty state").click()
        prompt, prior = evidence["prompt_token_ids"]
        assert len(prior) < len(prompt)
        expect(prompts.locator(".cells .cell")).to_have_count(len(prior) + 1)


def test_prompt_tokens_and_the_token_after_them(decide: DecideView, server: ServerProcess) -> None:
    decide.fill(TONE)
    decide.run()
    [answer] = ask(server, TONE)
    evidence = answer["evidence"]
    prompts = decide.answers.first.locator("details")
    prompts.get_by_text("Tokens of the prompt").click()
    prompts.and_(decide.inspector.page.locator("[aria-busy=false]")).wait_for()
    cells = prompts.locator(".cells .cell")
    [ids] = evidence["prompt_token_ids"]
    expect(cells).to_have_count(len(ids) + 1)
    body = {"tokens": ids, "return_token_bytes": True}
    parts = httpx2.post(f"{server.url}/detokenize", json=body).json()["token_bytes"]
    assert cells.all_text_contents()[:-1] == [bytes(part).decode() for part in parts]
    cells.last.hover()
    labels = dict(zip("ABC", evidence["logprobs"], strict=True))
    found = 0
    for row in decide.inspector.details.locator("tbody tr").all():  # a label's log-prob is that of the next token
        text, value = row.locator(".cell").inner_text(), row.locator("td").nth(4).inner_text()
        if text in labels:
            found += 1
            assert number(value) == pytest.approx(labels[text], abs=5.1e-5)
    assert found > 0
    decide.inspector.alternatives.nth(1).click()
    expect(decide.inspector.page.get_by_role("tab", name="Inspect")).to_have_attribute("aria-selected", "true")
    pane = decide.inspector.pane()
    pane.wait()
    tokens = pane.exported()["tokens"]
    assert [token["token_id"] for token in tokens[: len(ids)]] == ids
    assert tokens[len(ids)]["origin"] == "branch"


def test_errors_are_at_what_they_name(decide: DecideView) -> None:
    twice = TONE | {"choices": [{"value": "a"}, {"value": "b"}, {"value": ""}]}
    decide.fill(REFUND, twice)
    decide.run()
    card = decide.questions.nth(1)
    expect(card.get_by_role("alert")).to_contain_text("questions[1].choices[2].value")
    expect(card.get_by_label("option 3", exact=True)).to_be_focused()
    expect(card.get_by_label("option 3", exact=True)).to_have_attribute("aria-invalid", "true")
    assert len(decide.errors()) == 1
    decide.inspector.screenshot("decide-error")
    card.get_by_label("option 3", exact=True).fill("a")
    decide.run()
    [message] = decide.errors()
    assert '"a" occurs twice' in message
    expect(card.get_by_label("option 3", exact=True)).not_to_have_attribute("aria-invalid", "true")
    card.get_by_role("button", name="Remove option 3").click()
    expect(card.get_by_label("option 2", exact=True)).to_be_focused()
    decide.root.get_by_label("list of messages").check()
    for state, part in (("[{", "not valid JSON"), ('[{"role": "tool", "content": "a"}]', "input[0].role")):
        decide.state.fill(state)
        decide.run()
        [message] = decide.errors()
        assert part in message
        expect(decide.state).to_be_focused()
    decide.state.fill('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]')
    decide.run()
    assert decide.errors() == []
    expect(decide.answers).to_have_count(2)
    decide.questions.nth(0).get_by_role("button", name="Remove question 1").click()
    expect(decide.questions).to_have_count(1)
    expect(card).to_have_count(0)
    assert decide.questions.get_by_label("Instructions").input_value() == TONE["instructions"]


def posted(page: Page, decide: DecideView) -> str:
    """Return the body of the page's request."""
    with page.expect_request("**/v1/decisions") as sent:
        decide.run()
    return sent.value.post_data or ""


def test_json_is_sent_as_typed(decide: DecideView) -> None:
    mark = "\uf8ff"  # stands for the state in the page
    decide.fill(REFUND, state=mark)
    assert json.loads(posted(decide.inspector.page, decide))["input"] == mark
    state = '{"b": 1.0, "2": "x", "1": 12345678901234567890}'
    decide.root.get_by_label("JSON").check()
    decide.fill(REFUND, state=state)
    assert f'"data":{state}' in posted(decide.inspector.page, decide)
    assert decide.errors() == []
    assert f'"data": {state}' in decide.code("curl")
    assert f"json.loads({json.dumps(state)})" in decide.code("Python")


def test_code_asks_the_same(decide: DecideView, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    state = 'It\'s "quoted" \\ $HOME `x`\nEND\n\u2028 😊'
    decide.fill(REFUND, TONE, state=state)
    decide.scoring("sequences")
    expected = json.loads(posted(decide.inspector.page, decide))
    assert (expected["input"], expected["questions"]) == (state, [REFUND, TONE])
    del expected["return_token_ids"]
    stub = 'curl() { printf "%s\\n" "$@"; cat; }\n'
    output = subprocess.run(["bash", "-c", stub + decide.code("curl")], capture_output=True, text=True, check=True)
    arguments, brace, body = output.stdout.partition("{")
    assert arguments.split("\n")[0] == f"{server.url}/v1/decisions"
    model = {"model": "SmolLM2-135M-Instruct"}
    assert json.loads(brace + body) == model | expected
    calls = list[dict[str, Any]]()
    module = ModuleType("openai")

    def create(*, extra_body: dict[str, Any], **fields: Any) -> Any:
        calls.append(fields | extra_body)
        return SimpleNamespace(answers=[])

    module.__dict__["OpenAI"] = lambda **_: SimpleNamespace(decisions=SimpleNamespace(create=create))
    monkeypatch.setitem(sys.modules, "openai", module)
    exec(decide.code("Python"), {})
    assert calls == [model | expected]


def test_link_restores_questions_and_tab(decide: DecideView, context: BrowserContext) -> None:
    decide.fill(REFUND, TONE, URGENCY)
    decide.scoring("permutations")
    decide.root.get_by_label("orders").fill("3")
    page = decide.inspector.page
    page.get_by_role("button", name="Share link").click()
    expect(page.locator("#notice")).to_contain_text("questions")
    other = Inspector(context.new_page())
    other.open(page.url)
    expect(other.page.get_by_role("tab", name="Decide")).to_have_attribute("aria-selected", "true")
    copy = DecideView(other)
    expect(copy.answers).to_have_count(0)
    body = json.loads(posted(other.page, copy))
    assert (body["input"], body["questions"], body["permutations"]) == (STATE, [REFUND, TONE, URGENCY], 3)
    page.reload()
    assert decide.state.input_value() == STATE
    assert other.complaints == []
