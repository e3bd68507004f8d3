"""A headless Chromium: Debian's, or another that is installed. Playwright brings none."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from tests.integration.browser.inspector import Inspector

_NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def program() -> str | None:
    """The browser's file."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@pytest.fixture(scope="module")  # no longer: its event loop would stand in the way of asynchronous tests
def browser() -> Iterator[Browser]:
    """One process, with a profile that nobody else has."""
    if (path := program()) is None:
        # Where `make test` could install one, it is missed.
        assert not (shutil.which("apt-get") and os.geteuid() == 0), "Chromium could not be installed"
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Storage of its own, as in a new window."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield context
    context.close()


@pytest.fixture
def inspector(context: BrowserContext) -> Iterator[Inspector]:
    """An empty page."""
    inspector = Inspector(context.new_page())
    yield inspector
    assert inspector.complaints == []
