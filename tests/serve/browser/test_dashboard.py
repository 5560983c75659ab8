"""The dashboard in a real browser: it moves under load, rests when unseen, and tells the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.serve.browser.conftest import until
from tests.serve.browser.scripted import Scripted

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


def tile(page: Page, name: str) -> str:
    return page.inner_text(f".tile:has(dt:text-is('{name}')) .value")


@pytest.fixture
def dashboard(page: Page) -> Page:
    page.click("nav >> text=Dashboard")
    page.wait_for_selector("#ops tr")
    return page


def test_tiles_and_table_say_what_the_engine_says(dashboard: Page) -> None:
    assert tile(dashboard, "Requests running") == "3"
    assert tile(dashboard, "KV pages in use") == "10 %"
    assert tile(dashboard, "Prefix cache hits") == "40 %"
    rows = [row.split("\t") for row in dashboard.locator("#ops tr").all_inner_texts()]
    assert rows[0][0] == "attention"
    assert [cell.strip() for cell in rows[0][1:]] == ["270", "27.778", "50 %", "75 %"]
    assert rows[1][4].strip() == "–", "a roof that was not measured is not a number"
    assert "30 % of their time outside the ops" in dashboard.inner_text("#ops-note")
    assert "512 tokens" in dashboard.inner_text("#facts")


def test_it_moves_under_load(dashboard: Page) -> None:
    line = "section:has-text('Output tokens per second') path.line"
    until(dashboard, "document.querySelectorAll('.tile .value')[1].textContent.match(/^[1-9]/)")
    before = dashboard.get_attribute(line, "d")
    dashboard.wait_for_timeout(2500)
    assert dashboard.get_attribute(line, "d") != before
    rate = float(tile(dashboard, "Output tokens/s"))
    assert 25 < rate < 80, "50 tokens per poll, a poll per second"
    assert dashboard.locator("section:has-text('(TTFT)') rect").count() > 0
    assert tile(dashboard, "ITL, median").endswith("ms")
    label = dashboard.get_attribute("section:has-text('(ITL)') svg", "aria-label") or ""
    assert "p50" in label and "–" not in label


def test_an_idle_engine_has_no_latencies(page: Page, script: Scripted) -> None:
    script.stats = replace(script.stats, num_running=0, steps=0, step_seconds_total=0.0, ops=())
    page.click("nav >> text=Dashboard")
    page.wait_for_selector("text=No step has run yet")
    assert tile(page, "TTFT, median") == "–"
    assert page.is_visible("text=No data in this span >> nth=0")


def test_the_span_can_be_chosen(dashboard: Page) -> None:
    until(dashboard, "document.querySelectorAll('.bars rect').length > 0")
    dashboard.click("text=Since start")
    assert dashboard.is_checked("input[value=start]")
    assert tile(dashboard, "TTFT, median") != "–"


def test_it_rests_when_nobody_looks(dashboard: Page, script: Scripted) -> None:
    dashboard.wait_for_timeout(1500)
    dashboard.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    dashboard.wait_for_timeout(300)
    polls = script.polls
    dashboard.wait_for_timeout(2500)
    assert script.polls == polls, "it polls while hidden"
    dashboard.evaluate(
        "Object.defineProperty(document, 'hidden', {value: false, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    dashboard.wait_for_timeout(1500)
    assert script.polls > polls
    dashboard.click("nav >> text=Chat")
    dashboard.wait_for_timeout(300)
    polls = script.polls
    dashboard.wait_for_timeout(2500)
    assert script.polls == polls, "it polls behind the chat"


def test_draining_failing_and_silence_are_told(dashboard: Page, script: Scripted) -> None:
    script.is_ready = False
    dashboard.wait_for_selector("#status:has-text('Draining')")
    script.failure = "RuntimeError, id 7f"
    dashboard.wait_for_selector("#status[data-state=bad]:has-text('Engine failed')")
    dashboard.route("**/ui/stats", lambda route: route.abort())
    dashboard.wait_for_selector("text=cannot be reached")
    dashboard.unroute("**/ui/stats")
    script.is_ready, script.failure = True, None
    dashboard.wait_for_selector("#status:has-text('Ready')")
