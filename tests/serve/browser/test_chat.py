"""The playground in a real browser: streaming, stopping, parameters, errors, hostile output."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.serve.browser.conftest import until
from tests.serve.browser.scripted import Scripted

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

DONE = ".answer:not([aria-busy])"


def ask(page: Page, question: str, *, wait: bool = True) -> None:
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")
    if wait:
        page.wait_for_selector(f"li:last-child{DONE}")


def test_an_answer_streams_and_tells_its_speed(page: Page, script: Scripted) -> None:
    ask(page, "a slow one", wait=False)
    until(page, "document.querySelector('.answer .markdown').textContent.length > 10")
    early = page.inner_text(".answer .markdown")
    assert 10 < len(early) < 600, "it came all at once"
    assert page.is_visible("#stop")
    page.wait_for_selector(DONE, timeout=60_000)
    assert page.inner_text(".answer .markdown").startswith("The capital of France is Paris.")
    meta = page.inner_text(".meta")
    assert re.fullmatch(r"\d+ tokens · [\d.,]+ tokens/s · first token \d+(\.\d)? m?s", meta), meta
    assert page.is_visible("#send")
    assert script.ended == ["done"]


def test_stop_keeps_what_came_and_drops_the_connection(page: Page, script: Scripted) -> None:
    ask(page, "a slow one", wait=False)
    until(page, "document.querySelector('.answer .markdown').textContent.length > 10")
    page.click("#stop")
    page.wait_for_selector(DONE)
    assert page.inner_text(".meta").endswith("stopped")
    assert page.inner_text(".answer .markdown").startswith("The cap")
    deadline = time.monotonic() + 5
    while script.ended != ["dropped"] and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert script.ended == ["dropped"]
    ask(page, "another")
    assert "Paris" in page.inner_text(".answer:last-child .markdown")


def test_reasoning_is_folded_and_not_sent_back(page: Page, script: Scripted) -> None:
    ask(page, "think first", wait=False)
    page.wait_for_selector("summary:has-text('Thinking')")
    page.wait_for_selector(DONE)
    assert page.inner_text("summary") == "Reasoning"
    assert not page.is_visible(".reasoning .markdown")
    page.click("summary")
    assert page.inner_text(".reasoning .markdown") == "I wonder why."
    assert page.inner_text(".reasoning strong") == "why"
    ask(page, "and now")
    assert [m["role"] for m in script.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert "wonder" not in script.bodies[1]["messages"][1]["content"]


def test_parameters_reach_the_server_and_only_those_given(page: Page, script: Scripted) -> None:
    ask(page, "bare")
    assert set(script.bodies[0]) == {"model", "messages", "stream", "stream_options"}
    assert script.bodies[0]["stream_options"] == {"include_usage": True}
    values = {
        "temperature": "0.7", "top_p": "0.9", "top_k": "40", "seed": "7",
        "max_completion_tokens": "64", "system": "Be brief.",
    }  # fmt: skip
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.reload()
    ask(page, "given")
    body = script.bodies[1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 40)
    assert (body["seed"], body["max_completion_tokens"]) == (7, 64)
    page.click("text=Reset")
    page.click("#clear")
    ask(page, "bare again")
    assert set(script.bodies[2]) == set(script.bodies[0])


def test_a_wrong_parameter_is_named_and_nothing_is_sent(page: Page, script: Scripted) -> None:
    page.fill("#temperature", "9")
    ask(page, "hello", wait=False)
    assert page.inner_text("#parameter-problem").startswith("Temperature: ")
    assert page.get_attribute("#temperature", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == "temperature"
    assert script.bodies == []
    assert page.input_value("#prompt") == "hello"


def test_markdown_becomes_elements(page: Page) -> None:
    ask(page, "markdown please")
    answer = page.locator(".answer .markdown")
    assert answer.locator("strong").inner_text() == "mass"
    assert answer.locator("em").inner_text() == "spacetime"
    assert answer.locator("ol > li").count() == 2
    assert answer.locator("ol ul > li").inner_text() == "nested"
    assert answer.locator("li code").inner_text() == "g = 9.81"
    assert answer.locator("pre code").inner_text() == "fall = 2 * 3"
    assert answer.locator("a").get_attribute("href") == "https://example.org/g"
    assert "noopener" in (answer.locator("a").get_attribute("rel") or "")
    assert answer.locator("td").all_inner_texts() == ["Moon", "1.62"]
    page.click("text=Copy code")
    assert page.evaluate("navigator.clipboard.readText()") == "fall = 2 * 3"


def test_hostile_output_stays_text(page: Page) -> None:
    ask(page, "<img src=x onerror='window.pwned = 1'> hostile")
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    shown = page.inner_text(".answer .markdown")
    assert "<script>window.pwned = 1</script>" in shown
    assert "<svg onload=window.pwned=1>" in shown
    assert page.locator("#messages :is(script, img, svg, iframe, object)").count() == 0
    for link in page.locator("#messages a").all():
        assert (link.get_attribute("href") or "").startswith("https://")
    assert page.locator("#messages [onerror], #messages [onmouseover]").count() == 0


def test_a_policy_forbids_html_from_strings(page: Page) -> None:
    made = page.evaluate(
        "() => { try { document.body.innerHTML = '<p>'; return 'made'; } catch { return 'no'; } }"
    )
    assert made == "no"


def test_edit_and_regenerate_take_the_conversation_back(page: Page, script: Scripted) -> None:
    for question in ("one", "two", "three"):
        ask(page, question)
    page.hover(".question >> nth=1")
    page.locator(".question").nth(1).locator("text=Edit").click()
    page.fill(".editor textarea", "two, in other words")
    page.press(".editor textarea", "Enter")
    until(page, "document.querySelectorAll('.message').length === 4")
    page.wait_for_selector(f"li:last-child{DONE}")
    asked = [m["content"] for m in script.bodies[-1]["messages"] if m["role"] == "user"]
    assert asked == ["one", "two, in other words"]
    page.locator(".answer:last-child >> text=Regenerate").click()
    page.wait_for_selector(f"li:last-child{DONE}")
    assert script.bodies[-1]["messages"] == script.bodies[-2]["messages"]
    page.locator(".answer:last-child .foot >> text=Copy").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("The capital")
    page.click("#clear")
    assert page.locator(".message").count() == 0
    assert page.is_visible("#welcome")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("busy", ["The server is full", "512 requests wait already", "7 s"]),
        ("wrong", ["refuses temperature", "temperature=9 is above 2"]),
        ("broken", ["The answer failed", "the engine died (id 7f)"]),
    ],
)
def test_errors_are_shown_in_the_servers_words(page: Page, question: str, words: list[str]) -> None:
    ask(page, question, wait=False)
    page.wait_for_selector(".failure[role=alert]")
    shown = page.inner_text(".failure")
    assert all(word in shown for word in words), shown
    page.click("text=Try again")
    page.wait_for_selector(".failure")


def test_a_server_that_is_gone_is_an_error(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "hello", wait=False)
    page.wait_for_selector(".failure")
    assert "cannot be reached" in page.inner_text(".failure")


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, script: Scripted) -> None:
    script.key = "right"
    ask(page, "hello", wait=False)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("text=does not accept this key")
    page.fill("#key", "right")
    page.press("#key", "Enter")
    page.wait_for_selector(DONE)
    assert "Paris" in page.inner_text(".answer .markdown")
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("Object.values(sessionStorage)") == ["right"]
    page.reload()
    ask(page, "again")
    assert not page.is_visible("#key-dialog")


def test_no_key_means_an_error_not_a_loop(page: Page, script: Scripted) -> None:
    script.key = "right"
    ask(page, "hello", wait=False)
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector(".failure")
    assert "A key is needed" in page.inner_text(".failure")
    assert not page.is_visible("#key-dialog")
