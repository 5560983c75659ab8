"""The page's pictures in docs/images, from a real server of the demo model, in light and dark.

Needs `pip install -e '.[browser]'` and Debian's chromium.
Usage: python scripts/page_screenshots.py
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs/images"
QUESTION = "Explain gravity in three short sentences."
CLIENTS = 6


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server of the demo model."""
    command = [sys.executable, "-m", "sinterlm", "serve", "smollm2", "--port", "0"]
    command += ["--measure-roof", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r" at (http://\S+)", process.stdout.readline())
        assert found is not None
        yield found[1]
        process.terminate()


def keep_busy(url: str, number: int, stop: threading.Event) -> None:
    """Ask one thing after the other behind a common beginning, so that there is much to see."""
    rules = "You tell stories. " + "They are short, kind and true to life. " * 12
    for turn in itertools.count():
        if stop.is_set():
            return
        body = {
            "messages": [
                {"role": "system", "content": rules},
                {"role": "user", "content": f"Story {turn} of narrator {number}, please."},
            ],
            "max_completion_tokens": 20 + 15 * number,
        }
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        urllib.request.urlopen(request).read()


def open_page(browser: Browser, url: str, *, is_dark: bool) -> Page:
    """The page at a size that a README shows."""
    return browser.new_page(
        base_url=url,
        viewport={"width": 1200, "height": 780},
        color_scheme="dark" if is_dark else "light",
    )


def picture_chat(browser: Browser, url: str) -> None:
    """One answered question, in light."""
    page = open_page(browser, url, is_dark=False)
    page.goto("/")
    page.fill("#temperature", "0")
    page.fill("#max_completion_tokens", "120")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer:not([aria-busy])", timeout=120_000)
    page.screenshot(path=IMAGES / "chat.png")


def picture_dashboard(browser: Browser, url: str) -> None:
    """A minute under load, in dark."""
    stop = threading.Event()
    clients = [threading.Thread(target=keep_busy, args=(url, i, stop)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    page = open_page(browser, url, is_dark=True)
    page.set_viewport_size({"width": 1200, "height": 1450})
    page.goto("/#dashboard")
    page.wait_for_timeout(62_000)
    page.screenshot(path=IMAGES / "dashboard.png")
    stop.set()
    for client in clients:
        client.join()


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        picture_chat(browser, url)
        picture_dashboard(browser, url)
        browser.close()


if __name__ == "__main__":
    main()
