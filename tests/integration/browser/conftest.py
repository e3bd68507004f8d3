"""A headless Chromium installed on this system; Playwright's own is not used."""

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
    """Return the path of the browser."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@pytest.fixture(scope="module")  # a longer scope would keep an event loop that blocks asynchronous tests
def browser() -> Iterator[Browser]:
    """One process with a fresh profile."""
    if (path := program()) is None:
        # `make test-all` installs one as root on Debian.
        assert not (shutil.which("apt-get") and os.geteuid() == 0), "Chromium could not be installed"
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Separate storage, as in a private window."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield context
    context.close()


@pytest.fixture
def inspector(context: BrowserContext) -> Iterator[Inspector]:
    """A new page without console errors."""
    inspector = Inspector(context.new_page())
    yield inspector
    assert inspector.complaints == []
