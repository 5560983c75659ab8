"""A headless Chromium for the page's tests; skipped with a reason where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.serve.browser.scripted import Scripted, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def until(page: Page, expression: str, *, within_s: float = 10.0) -> None:
    """Wait until ``expression`` is true on the page. Playwright's own wait needs eval there."""
    deadline = time.monotonic() + within_s
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never became true: {expression}"
        page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, driven by Playwright's Python package. Playwright keeps an event loop in
    this thread, so it goes before tests that run loops of their own."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium; on Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def script() -> Iterator[Scripted]:
    """A scripted server of its own for one test."""
    with serving(Scripted()) as running:
        yield running


@pytest.fixture
def page(browser: Browser, script: Scripted) -> Iterator[Page]:
    """The page, open; fails the test when its scripts throw or its policy is broken."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "console",
        lambda message: (
            problems.append(message.text) if "Security Policy" in message.text else None
        ),
    )
    opened.on(
        "request",
        lambda request: (
            None if request.url.startswith(script.url) else problems.append(request.url)
        ),
    )
    opened.goto(script.url)
    yield opened
    context.close()
    assert problems == []
