"""Calls of tools as JSON objects between tags, or bare: Hermes, Qwen and Llama 3.

Text that turns out to be no call is content, tags included. White space around calls is dropped.
Once a call is certain, whatever follows up to its end belongs to its arguments, JSON or not.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from sinterlm.serve.parsers.base import ToolCallDelta, ToolDelta
from sinterlm.serve.parsers.call_reader import CallProgress, CallReader
from sinterlm.serve.parsers.text import find_first, held_back, may_become


@dataclass(frozen=True)
class CallSyntax:
    """How a family of models writes calls."""

    opening: str  #: tag before a call, or before several
    closing: str | None  #: tag after them
    is_bare: bool  #: whether an answer may begin with a call that no tag announces
    separators: str  #: characters that may stand between two calls


HERMES = CallSyntax("<tool_call>", "</tool_call>", is_bare=False, separators="")
LLAMA3_JSON = CallSyntax("<|python_tag|>", None, is_bare=True, separators=";")

_SPACE = " \t\n\r"


def new_call_id() -> str:
    """An id as OpenAI's servers give them."""
    return f"call_{uuid.uuid4().hex[:24]}"


class JsonCallParser:
    """One answer of a model that writes calls in ``syntax``."""

    def __init__(self, syntax: CallSyntax, new_id: Callable[[], str] = new_call_id) -> None:
        self._syntax = syntax
        self._new_id = new_id
        self._tags = tuple(tag for tag in (syntax.opening, syntax.closing) if tag)
        self._read = self._seek if syntax.is_bare else self._in_content
        self._pending = ""  #: not looked at, or not enough to tell what it is
        self._held = ""  #: what ``_seek`` went past: content if no call follows
        self._is_tagged = False  #: behind an opening tag that was not closed
        self._follows_call = False  #: nothing but separators since the last call
        self._reader = CallReader(is_tagged=False)
        self._is_announced = False  #: whether the reader's call was handed out
        self._num_calls = 0
        self._blank: str | None = ""  #: white space since the start or the last call; None = more
        self._content: list[str] = []
        self._calls: list[ToolCallDelta] = []

    def push(self, text: str) -> ToolDelta:
        """Take the next piece of the answer."""
        self._pending += text
        return self._run(is_last=False)

    def finish(self) -> ToolDelta:
        """The answer is complete: what was held back."""
        return self._run(is_last=True)

    def _run(self, is_last: bool) -> ToolDelta:
        while self._pending and self._read(is_last):
            pass
        if is_last:
            self._settle()
        content, calls = "".join(self._content), tuple(self._calls)
        self._content.clear()
        self._calls.clear()
        return ToolDelta(content, calls)

    def _settle(self) -> None:
        """What waited for more text gets none."""
        if self._read == self._in_call and not self._is_announced:
            self._say(self._held + self._reader.raw)
        elif self._read == self._seek and not self._follows_call:
            self._say(self._held)
        if self._blank and self._num_calls == 0:
            self._content.append(self._blank)

    # -- states: each takes from ``_pending`` and tells whether to go on -------------------------

    def _in_content(self, is_last: bool) -> bool:
        """Content up to a tag; a closing tag is one only where a call was announced by a tag."""
        tags = self._tags if self._is_tagged else (self._syntax.opening,)
        found = find_first(self._pending, tags)
        if found is None:
            held = 0 if is_last else held_back(self._pending, tags)
            self._say(self._take(len(self._pending) - held))
            return False
        at, tag = found
        self._say(self._take(at))
        self._take(len(tag))
        self._is_tagged = tag == self._syntax.opening
        if self._is_tagged:
            self._held, self._follows_call, self._read = tag, False, self._seek
        return True

    def _seek(self, is_last: bool) -> bool:
        """Where a call may begin: at the start of a bare answer, behind a tag or another call."""
        skipped = _SPACE + (self._syntax.separators if self._follows_call else "")
        rest = self._pending.lstrip(skipped)
        self._held += self._take(len(self._pending) - len(rest))
        if not rest:
            return False
        if rest[0] == "{" and (self._is_tagged or self._syntax.is_bare):
            self._reader = CallReader(is_tagged=self._is_tagged)
            self._is_announced = False
            self._read = self._in_call
            return True
        if may_become(rest, self._tags) and not is_last:
            return False
        if not (self._follows_call and rest.startswith(self._tags)):
            self._say(self._held)
        self._is_tagged = self._is_tagged and self._follows_call
        self._held, self._read = "", self._in_content
        return True

    def _in_call(self, is_last: bool) -> bool:
        for at, char in enumerate(self._pending):
            progress = self._reader.feed(char)
            if progress is not CallProgress.MORE:
                self._take(at + (progress is CallProgress.DONE))
                self._leave_call(progress)
                return True
        self._announce()
        self._pending = ""
        return False

    def _leave_call(self, progress: CallProgress) -> None:
        self._announce()
        if progress is CallProgress.REFUSED:
            self._say(self._held + self._reader.raw)
            self._is_tagged = self._is_tagged and self._follows_call
            self._read = self._in_content
        else:
            self._follows_call = True
            is_spoiled = progress is CallProgress.SPOILED
            self._read = self._in_spoiled_call if is_spoiled else self._seek
            if progress is CallProgress.ENDED:
                self._say(self._reader.raw)
        self._held = ""

    def _in_spoiled_call(self, is_last: bool) -> bool:
        """Arguments that are no JSON, up to a tag, without the brace that closed the call."""
        found = find_first(self._pending, self._tags)
        if found is None and not is_last:
            certain = self._pending[: len(self._pending) - held_back(self._pending, self._tags)]
            self._argue(self._take(len(certain.rstrip(_SPACE + "}"))))
            return False
        rest = self._take(len(self._pending) if found is None else found[0])
        self._argue(rest.rstrip(_SPACE).removesuffix("}"))
        self._read = self._seek
        return True

    # -- taking and giving -----------------------------------------------------------------------

    def _take(self, length: int) -> str:
        taken, self._pending = self._pending[:length], self._pending[length:]
        return taken

    def _say(self, text: str) -> None:
        """Content; white space only once more than that follows."""
        if self._blank is not None:
            text = self._blank + text
            self._blank = text if not text.strip(_SPACE) else None
        if self._blank is None and text:
            self._content.append(text)

    def _announce(self) -> None:
        """Hand out what the reader has made certain."""
        if not self._reader.is_certain:
            return
        arguments = self._reader.take_arguments()
        if self._is_announced:
            self._argue(arguments)
            return
        self._is_announced, self._blank = True, ""
        self._calls.append(
            ToolCallDelta(self._num_calls, self._new_id(), self._reader.name, arguments)
        )
        self._num_calls += 1

    def _argue(self, arguments: str) -> None:
        if arguments:
            self._calls.append(ToolCallDelta(self._num_calls - 1, arguments=arguments))
