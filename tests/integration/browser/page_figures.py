"""`python -m tests.integration.browser.page_figures`: size of the page and time to its first paint, as a table."""

import gzip
import statistics
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.integration.browser.conftest import FLAGS, program
from tests.integration.browser.inspector import Inspector
from tests.support.http_client import MODEL
from tests.support.listening import listening
from tests.support.server_process import ROOT, ServerProcess

_PROMPT = "The capital of France is Paris, and the capital of Italy is Rome."
_LONG = 10_000
_ROUNDS = 5

# Notes when the first cell, the first number and the first generated token are in the document.
_WATCH = """() => {
    window.seen = {};
    const began = performance.now();
    const things = {cell: ".cells .cell", number: ".cells [class*=' s']", generated: ".cells .generated"};
    const note = () => {
        for (const [name, selector] of Object.entries(things))
            if (document.querySelector(selector)) window.seen[name] ??= performance.now() - began;
    };
    new MutationObserver(note).observe(document.querySelector(".pane"),
        {childList: true, subtree: true, attributes: true, attributeFilter: ["class"]});
    document.querySelector(".run").click();
}"""

# Scrolls through all cells in 120 frames; the times between frames.
_SCROLL = """async () => {
    const cells = document.querySelector(".cells"), times = [];
    let last = performance.now();
    for (let i = 0; i <= 120; i++) {
        cells.scrollTop = (cells.scrollHeight - cells.clientHeight) * i / 120;
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
    }
    return times;
}"""


def weight() -> tuple[int, int, int]:
    """Return number of files, bytes, and compressed bytes."""
    files = [path.read_bytes() for path in (ROOT / "serve" / "api" / "inspector" / "page").iterdir()]
    return len(files), sum(map(len, files)), sum(len(gzip.compress(data)) for data in files)


def ready(page: Page) -> float:
    """Return milliseconds until the page was interactive."""
    return float(page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive"))


def first_seen(browser: Browser, url: str) -> dict[str, float]:
    """Return median milliseconds from Run to the first cell, log-prob and generated token of a new prompt."""
    rounds: list[dict[str, Any]] = []
    for i in range(_ROUNDS):
        inspector = Inspector(browser.new_page())
        inspector.open(url)
        opened = ready(inspector.page)
        inspector.set(temperature=0, max_tokens=8)
        inspector.pane().prompt.fill(f"{i + 1}. {_PROMPT}")
        inspector.page.evaluate(_WATCH)
        inspector.pane().wait()
        rounds.append({"page": opened, **inspector.page.evaluate("window.seen")})
        inspector.page.close()
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def frames(browser: Browser) -> list[float]:
    """Return milliseconds between frames while scrolling through 10,000 cells."""
    with listening(script=b"", max_model_len=_LONG + 100, pages=2 + (_LONG + 100) // 64) as (url, _):
        inspector = Inspector(browser.new_page(viewport={"width": 1280, "height": 900}))
        inspector.open(url, MODEL)
        inspector.pane().run("".join(f"{i:9} " for i in range(_LONG // 10)), "Score only")
        expect(inspector.pane().cells).to_have_count(_LONG)
        times: list[float] = inspector.page.evaluate(_SCROLL)
        return sorted(times[1:])


def main() -> None:
    """Print the table."""
    count, size, zipped = weight()
    print(f"page: {count} files, {size / 1e3:.1f} kB, {zipped / 1e3:.1f} kB zipped")
    server = ServerProcess("--max-num-seqs", "4", "--max-model-len", "2048")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=FLAGS)
        seen = first_seen(browser, server.url)
        server.terminate()
        times = frames(browser)
        browser.close()
    print(f"page interactive after {seen['page']:.0f} ms; from Run to the first cell {seen['cell']:.0f} ms,", end=" ")
    print(f"to the first number {seen['number']:.0f} ms, to the first generated token {seen['generated']:.0f} ms")
    middle, worst = times[len(times) // 2], times[int(len(times) * 0.95)]
    print(f"scrolling through 10,000 cells: a frame takes {middle:.1f} ms (median), {worst:.1f} ms (95 %)")


if __name__ == "__main__":
    main()
