"""Page objects of the inspector."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

from tests.support.server_process import ROOT

# Kept after the tests; `make screenshots` has them written into the documentation instead.
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS") or ROOT / ".screenshots")
_LONG = 180_000  # ms: a prompt of thousands of tokens on a busy machine


class Inspector:
    """An open page; console errors are recorded."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self._heard(message.type, message.text))

    def open(self, url: str, model: str = "SmolLM2-135M-Instruct") -> None:
        """Load the page and wait until it shows the model."""
        self.page.goto(url)
        expect(self.page.locator("#model")).to_contain_text(model)

    def set(self, **parameters: object) -> None:
        """Fill parameters by label; underscores are spaces."""
        for name, value in parameters.items():
            self.page.locator("#settings").get_by_label(name.replace("_", " "), exact=True).fill(str(value))

    def set_grammar(self, kind: str, text: str) -> None:
        """Choose a kind of grammar, by its name in the page, and enter its text."""
        settings = self.page.locator("#settings")
        settings.locator("details").evaluate("details => { details.open = true; }")
        settings.locator("[name=grammar]").select_option(label=kind)
        settings.get_by_label("Grammar text").fill(text)

    def pane(self, index: int = 0) -> "PaneView":
        """Return a pane, counted from the left."""
        return PaneView(self.page.locator(".pane").nth(index), self.page)

    def screenshot(self, name: str) -> None:
        """Save a screenshot as NAME.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    @property
    def details(self) -> Locator:
        """The panel with one token's details."""
        return self.page.locator("#details")

    @property
    def alternatives(self) -> Locator:
        """The buttons of its table."""
        return self.details.locator(".alternatives button")

    def facts(self) -> dict[str, str]:
        """The names and values in it."""
        names = self.details.locator("dt").all_inner_texts()
        return dict(zip(names, self.details.locator("dd").all_inner_texts(), strict=True))

    def _heard(self, kind: str, text: str) -> None:
        # HTTP errors are in the console, too; tests check them in the page.
        if kind == "error" and not text.startswith("Failed to load resource"):
            self.complaints.append(text)


class PaneView:
    """One pane."""

    def __init__(self, root: Locator, page: Page) -> None:
        self.root = root
        self._page = page
        # Look up roles in the form only; computing them for ten thousand cells is slow.
        self.form = root.locator(".editor")
        self.prompt = self.form.get_by_role("textbox", name="Prompt")
        self.cells = root.locator(".cells > .cell")
        self.error = root.locator("> [role=alert]")
        self.status = root.locator("[role=status]")

    def button(self, name: str) -> Locator:
        """A button by its text."""
        return self.form.get_by_role("button", name=name, exact=True)

    def run(self, prompt: str | None = None, button: str = "Run") -> None:
        """Type a prompt, if given, press a button and wait for the end."""
        if prompt is not None:
            self.prompt.fill(prompt)
        self.button(button).click()
        self.wait()

    def wait(self) -> None:
        """Wait until no request is running."""
        # Not with expect(), which describes all cells after each failed attempt.
        self.root.and_(self._page.locator("[aria-busy=false]")).wait_for(state="attached", timeout=_LONG)

    def texts(self) -> list[str]:
        """Return the text of every token, as copied to the clipboard."""
        return self.cells.all_text_contents()

    def totals(self) -> dict[str, list[str]]:
        """Return the summary table: row name -> prompt, generated, all."""
        rows = [row.locator("th, td").all_inner_texts() for row in self.root.locator(".totals tbody tr").all()]
        return {name: values for name, *values in rows}

    def download(self, button: str) -> str:
        """Return the contents of the file saved by a button."""
        with self._page.expect_download() as saved:
            self.button(button).click()
        return Path(saved.value.path()).read_text("utf-8")

    def exported(self) -> Any:
        """Return the exported state of the run."""
        return json.loads(self.download("Export JSON"))


def number(text: str) -> float:
    """Parse a number as the page formats it."""
    if "∞" in text:
        return -math.inf
    return float(re.sub("[,% ]", "", text.replace("−", "-")))
