"""Reasoning between ``<think>`` and ``</think>``: DeepSeek-R1, QwQ, Qwen3.

The opening tag may be missing, in the prompt, or in the answer; white space alone is no reasoning.
A second ``<think>`` after the reasoning has ended is content.
"""

from __future__ import annotations

from sinterlm.serve.parsers.base import ReasoningDelta
from sinterlm.serve.parsers.text import find_first, held_back, may_become

OPENING = "<think>"
CLOSING = "</think>"


class ThinkParser:
    """One answer. ``inside`` tells where it starts when it does not open with ``<think>``.

    ``implied`` are tags that end the reasoning without closing it, and stay in the content.
    """

    def __init__(self, *, inside: bool, implied: tuple[str, ...] = ()) -> None:
        self._read = self._lead
        self._inside = inside
        self._ends = (CLOSING, *implied)
        self._pending = ""
        #: White space that is reasoning if more than that follows; None = more did.
        self._blank: str | None = ""

    def push(self, text: str) -> ReasoningDelta:
        """Take the next piece of the answer."""
        self._pending += text
        return self._read(is_last=False)

    def finish(self) -> ReasoningDelta:
        """The answer is complete: what was held back."""
        return self._read(is_last=True)

    def _lead(self, is_last: bool) -> ReasoningDelta:
        """Nothing but white space so far: does the answer open with the tag?"""
        text = self._pending.lstrip()
        if not is_last and (not text or may_become(text, (OPENING,))):
            return ReasoningDelta()
        if text.startswith(OPENING):
            self._pending = text[len(OPENING) :]
            self._read = self._reasoning
        else:
            self._read = self._reasoning if self._inside else self._content
        return self._read(is_last=is_last)

    def _reasoning(self, is_last: bool) -> ReasoningDelta:
        found = find_first(self._pending, self._ends)
        if found is None:
            held = 0 if is_last else held_back(self._pending, self._ends)
            certain = len(self._pending) - held
            reasoning, self._pending = self._pending[:certain], self._pending[certain:]
            return ReasoningDelta(reasoning=self._unless_blank(reasoning))
        at, tag = found
        reasoning = self._unless_blank(self._pending[:at])
        self._pending = self._pending[at + len(CLOSING) if tag == CLOSING else at :]
        self._read = self._content
        return ReasoningDelta(reasoning, self._content(is_last=is_last).content)

    def _unless_blank(self, text: str) -> str:
        if self._blank is not None:
            text = self._blank + text
            self._blank = None if text.strip() else text
        return text if self._blank is None else ""

    def _content(self, is_last: bool) -> ReasoningDelta:
        text, self._pending = self._pending, ""
        return ReasoningDelta(content=text)


def starts_inside(prompt: str) -> bool | None:
    """Whether ``prompt`` leaves the model inside its reasoning; None when it does not say."""
    tail = prompt.rstrip()
    if tail.endswith(OPENING):
        return True
    return False if tail.endswith(CLOSING) else None
