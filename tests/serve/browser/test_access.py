"""The page without a mouse, in both lights, for screen readers, on a small screen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.browser.conftest import until
from tests.serve.browser.scripted import Scripted
from tests.serve.browser.test_chat import DONE, ask

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

#: Every visible control and text against the rules; returns what breaks one.
AUDIT = """() => {
  const problems = [];
  const visible = (e) => e.checkVisibility({ opacityProperty: false, visibilityProperty: true });
  const name = (e) => (e.getAttribute('aria-label') || e.labels?.[0]?.textContent ||
    document.getElementById(e.getAttribute('aria-labelledby'))?.textContent ||
    e.textContent || '').trim();
  for (const e of document.querySelectorAll('button, a, input, textarea, summary, [tabindex="0"]'))
    if (visible(e) && !name(e)) problems.push(`no name: ${e.outerHTML.slice(0, 80)}`);
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  if (new Set(ids).size !== ids.length) problems.push('an id twice');
  for (const attribute of ['aria-labelledby', 'aria-describedby', 'aria-controls'])
    for (const e of document.querySelectorAll(`[${attribute}]`))
      for (const id of (e.getAttribute(attribute) || '').split(' ').filter(Boolean))
        if (!document.getElementById(id)) problems.push(`${attribute} to nothing: ${id}`);
  for (const e of document.querySelectorAll('svg'))
    if (visible(e) && !e.getAttribute('aria-hidden') && !e.getAttribute('aria-label'))
      problems.push('a picture without words');
  if (!document.documentElement.lang) problems.push('no language');
  if (document.querySelectorAll('main:not([hidden])').length !== 1) problems.push('not one main');
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (css) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = css;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  let checked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    const unseen = !visible(e) || e.closest('.hidden, .skip, svg, noscript');
    if (!walker.currentNode.data.trim() || unseen) continue;
    const ratio = contrast(rgba(getComputedStyle(e).color), behind(e));
    checked += 1;
    if (ratio < 4.5)
      problems.push(`contrast ${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  for (const e of document.querySelectorAll('input, textarea')) {
    if (!visible(e) || e.type === 'radio') continue;
    const edge = e.closest('.box') ?? e;
    const ratio = contrast(rgba(getComputedStyle(edge).borderColor), behind(edge.parentElement));
    if (ratio < 3) problems.push(`edge ${ratio.toFixed(2)}: ${e.id}`);
  }
  if (checked < 10) problems.push(`only ${checked} texts`);
  return problems;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_contrast_and_references(browser: Browser, script: Scripted, scheme: Any) -> None:
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    page.goto(script.url)
    page.wait_for_selector("text=Ready")
    assert page.evaluate(AUDIT) == [], "the welcome"
    ask(page, "think markdown")
    page.click("summary")
    ask(page, "busy", wait=False)
    page.wait_for_selector(".failure")
    page.fill("#temperature", "9")
    assert page.evaluate(AUDIT) == [], "a conversation"
    script.key = "k"
    page.click("nav >> text=Dashboard")
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate(AUDIT) == [], "the dialog"
    page.keyboard.press("Escape")
    page.wait_for_selector("text=A key is needed")
    script.key = None
    page.click("text=Enter a key")
    page.wait_for_selector("#ops tr")
    assert page.evaluate(AUDIT) == [], "the dashboard"
    script.failure = "RuntimeError, id 7f"
    page.wait_for_selector("text=Engine failed")
    assert page.evaluate(AUDIT) == [], "a failed engine"
    context.close()


def test_everything_works_by_keyboard(page: Page, script: Scripted) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a slow one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in two lines")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.answer .markdown').textContent.length > 10")
    assert script.bodies[0]["messages"][0]["content"] == "a slow one\nin two lines"
    page.keyboard.press("Escape")
    page.wait_for_selector(DONE)
    assert page.inner_text(".meta").endswith("stopped")
    assert page.evaluate("document.activeElement.id") == "prompt"

    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            continue  # the browser's own controls come between the last and the first
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
        outline = page.evaluate(
            "[getComputedStyle(document.activeElement).outlineStyle,"
            " getComputedStyle(document.activeElement.closest('.box') ?? document.body).boxShadow]"
        )
        assert outline[0] != "none" or outline[1] != "none", f"no focus ring: {reached}"
    assert {"skip", "Chat", "Dashboard", "theme", "scroll", "prompt", "clear", "send"} <= reached
    assert {"Copy", "Edit", "Regenerate", "system", "temperature", "seed", "Reset"} <= reached

    page.focus("nav >> text=Dashboard")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ops tr")
    page.focus("input[value=minute]")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[value=start]")


def test_focus_stays_where_stop_and_send_change_places(page: Page) -> None:
    page.fill("#prompt", "a slow one")
    page.focus("#send")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    assert page.evaluate("document.activeElement.id") == "send"


def test_a_screen_reader_hears_sentences(page: Page) -> None:
    assert page.get_attribute("#announcer", "aria-live") == "polite"
    ask(page, "hello")
    heard = page.locator("#announcer p").all_inner_texts()
    assert heard == ["Generating.", "The capital of France is Paris.", "Answer complete."]


def test_the_theme_follows_the_system_until_it_is_chosen(
    browser: Browser, script: Scripted
) -> None:
    def ground(page: Page) -> int:
        color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return int(color.removeprefix("rgb(").split(",")[0])

    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(script.url)
    assert ground(page) < 60
    page.emulate_media(color_scheme="light")
    assert ground(page) > 200
    page.click("#theme")  # light
    page.emulate_media(color_scheme="dark")
    assert ground(page) > 200
    page.click("#theme")  # dark
    page.emulate_media(color_scheme="light")
    page.reload()
    assert ground(page) < 60
    assert page.get_attribute("#theme", "aria-label") == "Theme: dark. Switch to system."
    page.click("#theme")  # the system's again
    assert ground(page) > 200
    context.close()


@pytest.mark.parametrize("view", ["chat", "dashboard"])
@pytest.mark.parametrize("width", [320, 700, 1000, 1600])
def test_nothing_sticks_out(browser: Browser, script: Scripted, view: str, width: int) -> None:
    script.stats = replace(script.stats, generation_tokens_total=123_456_789)
    context = browser.new_context(viewport={"width": width, "height": 700})
    page = context.new_page()
    page.goto(f"{script.url}#{view}")
    page.wait_for_selector("text=Ready")
    if view == "chat":
        ask(page, "markdown " + "w" * 200)
    else:
        page.wait_for_selector("#ops tr")
    wide = page.evaluate(
        "() => [...document.querySelectorAll('html, main:not([hidden]), .scroll')]"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.id || e.tagName)"
    )
    assert wide == []
    if view == "chat" and width < 960:
        page.click("#toggle-parameters")
        assert page.is_visible("#temperature")
        assert page.get_attribute("#toggle-parameters", "aria-expanded") == "true"
    context.close()


def test_motion_is_reduced_when_asked(browser: Browser, script: Scripted) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(script.url)
    ask(page, "a slow one", wait=False)
    page.wait_for_selector(".answer")
    assert page.evaluate("document.getAnimations().length") == 0
    context.close()
