"""One call of a tool: ``{"name": "f", "arguments": {…}}``, read one character at a time.

The call is certain once its name is known and its arguments begin; until then all of it may turn
out to be content. ``parameters`` means ``arguments``. Arguments that are a text holding an object
are that object; missing ones, where allowed, and ``null`` are ``{}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum

from sinterlm.serve.parsers.json_scanner import JsonScanner, Progress

_ARGUMENT_KEYS = ("arguments", "parameters")
#: Keys of a call that no tag announces; any other one makes it an answer that happens to be JSON.
_BARE_KEYS = ("type", "id", "name", *_ARGUMENT_KEYS)
_SPACE = " \t\n\r"
_SURROGATE = re.compile("[\ud800-\udfff]")


class CallProgress(Enum):
    """What a character did. Only MORE and DONE have taken it."""

    MORE = "more must come"
    DONE = "the call is complete"
    ENDED = "the call was complete before this character"
    REFUSED = "this is no call: all of it is content"
    SPOILED = "the call is certain, but its arguments are no JSON from here on"


class CallReader:
    """Reads one call from its opening brace on. ``is_tagged``: a tag announced it."""

    def __init__(self, *, is_tagged: bool) -> None:
        self._is_tagged = is_tagged
        self._raw: list[str] = []
        self._place: Callable[[str], CallProgress] = self._opening
        self._scanner = JsonScanner()
        self._value: list[str] = []  #: of the key or value being read
        self._key = ""
        self._is_streamed = False
        self._name: str | None = None
        self._kept: str | None = None  #: arguments that came before the name
        self._fragment: list[str] = []
        self._is_handed_out = False  #: whether the last character completed or went on arguments
        self.is_certain = False  #: whether the call can no longer turn out to be content

    @property
    def raw(self) -> str:
        """What is content if no call comes of it: all that was taken, or that followed its end."""
        return "".join(self._raw)

    @property
    def name(self) -> str:
        """The tool's name; once the call is certain."""
        assert self._name is not None
        return self._name

    def take_arguments(self) -> str:
        """The arguments' text that is new since the last call of this method."""
        text = "".join(self._fragment)
        self._fragment.clear()
        return text

    def feed(self, char: str) -> CallProgress:
        """Follow one more character."""
        self._is_handed_out = False
        progress = self._place(char)
        if progress is CallProgress.REFUSED and self.is_certain:
            progress = CallProgress.ENDED  # what spoils the rest does not undo the call
        if self._is_handed_out:
            self._raw.clear()
        elif progress in (CallProgress.MORE, CallProgress.DONE):
            self._raw.append(char)
        return progress

    # -- places in the object, in the order of the text ------------------------------------------

    def _opening(self, char: str) -> CallProgress:
        if char != "{":
            return CallProgress.REFUSED
        self._place = self._before_key
        return CallProgress.MORE

    def _before_key(self, char: str) -> CallProgress:
        if char in _SPACE:
            return CallProgress.MORE
        if char != '"':
            return CallProgress.REFUSED
        self._begin_value()
        self._place = self._in_key
        return self._in_key(char)

    def _in_key(self, char: str) -> CallProgress:
        progress = self._scan(char)
        if progress is Progress.DONE:
            self._key = _text("".join(self._value))
            if not self._is_tagged and self._key not in _BARE_KEYS:
                return CallProgress.REFUSED
            self._place = self._before_colon
        return CallProgress.REFUSED if progress is Progress.WRONG else CallProgress.MORE

    def _before_colon(self, char: str) -> CallProgress:
        if char in _SPACE:
            return CallProgress.MORE
        self._begin_value()
        self._place = self._before_value
        return CallProgress.MORE if char == ":" else CallProgress.REFUSED

    def _before_value(self, char: str) -> CallProgress:
        if char in _SPACE:
            return CallProgress.MORE
        self._is_streamed = (
            self._key in _ARGUMENT_KEYS
            and char == "{"
            and self._name is not None
            and not self.is_certain
        )
        self._place = self._in_value
        return self._in_value(char)

    def _in_value(self, char: str) -> CallProgress:
        progress = self._scan(char)
        if progress is Progress.WRONG:
            return CallProgress.SPOILED if self._is_streamed else CallProgress.REFUSED
        if self._is_streamed:
            self._fragment.append(self._value.pop())
            self.is_certain = self._is_handed_out = True
        if progress is Progress.MORE:
            return CallProgress.MORE
        if not self._is_streamed and not self._keep_value():
            return CallProgress.REFUSED
        self._place = self._after_value
        if progress is Progress.ENDED:
            if self._is_handed_out:
                self._raw.clear()
            self._is_handed_out = False
            return self._after_value(char)
        return CallProgress.MORE

    def _after_value(self, char: str) -> CallProgress:
        if char in _SPACE:
            return CallProgress.MORE
        if char == ",":
            self._place = self._before_key
            return CallProgress.MORE
        return self._complete() if char == "}" else CallProgress.REFUSED

    # -- parts -----------------------------------------------------------------------------------

    def _begin_value(self) -> None:
        self._scanner = JsonScanner()
        self._value.clear()

    def _scan(self, char: str) -> Progress:
        progress = self._scanner.feed(char)
        if progress in (Progress.MORE, Progress.DONE):
            self._value.append(self._scanner.repaired(char))
        return progress

    def _keep_value(self) -> bool:
        """Book a whole value; False when it makes the object no call."""
        text = "".join(self._value)
        if self._key == "name" and self._name is None:
            self._name = _text(text) or None
            if self._name is None:
                return False
        elif self._key in _ARGUMENT_KEYS and self._kept is None and not self.is_certain:
            self._kept = _as_object(text)
        else:
            return True
        if self._name is not None and self._kept is not None:
            self._fragment.append(self._kept)
            self.is_certain = self._is_handed_out = True
        return True

    def _complete(self) -> CallProgress:
        if not self.is_certain:
            if self._name is None or not self._is_tagged:
                return CallProgress.REFUSED
            self._fragment.append("{}")
            self.is_certain = True
        return CallProgress.DONE


def _text(value: str) -> str:
    """The text of a JSON string; empty for any other value, and for half a surrogate pair."""
    loaded = json.loads(value) if value.startswith('"') else ""
    return loaded if not _SURROGATE.search(loaded) else ""


def _as_object(value: str) -> str:
    """Arguments as they are, an object written as a text unwrapped, ``{}`` for null."""
    if value == "null":
        return "{}"
    try:
        return inner if isinstance(json.loads(inner := _text(value)), dict) else value
    except (ValueError, RecursionError):
        return value
