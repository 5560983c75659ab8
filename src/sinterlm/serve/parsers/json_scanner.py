"""JSON, one character at a time: is it still JSON, and where does the value end?

Accepts what RFC 8259 does, and raw control characters in strings, which models like to write and
``repaired`` escapes. Nesting costs memory alone, never a call stack.
"""

from __future__ import annotations

import json
import re
from enum import Enum

_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_SCALAR_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SPACE = frozenset(" \t\n\r")
_HEX = frozenset("0123456789abcdefABCDEF")


class Progress(Enum):
    """What a character did."""

    MORE = "taken, and more must come"
    DONE = "taken, and it was the last one"
    ENDED = "not taken: the value ended before it"
    WRONG = "not taken: it cannot stand here"


class _Expect(Enum):
    VALUE = "a value"
    VALUE_OR_END = "a value, or the end of an empty array"
    KEY = "a key"
    KEY_OR_END = "a key, or the end of an empty object"
    COLON = "a colon"
    COMMA_OR_END = "a comma, or the end of the container"


class JsonScanner:
    """Follows one value; white space before it is part of it."""

    def __init__(self) -> None:
        self._containers: list[str] = []  #: the bracket that closes each open one
        self._expect = _Expect.VALUE
        self._scalar = ""  #: a number or a word that may go on
        self._in_string = False
        self._escape = 0  #: characters that an escape still takes; -1 = the one that says

    def feed(self, char: str) -> Progress:
        """Follow one more character."""
        if self._in_string:
            return self._string(char)
        if self._scalar:
            if char in _SCALAR_CHARS:
                self._scalar += char
                return Progress.MORE
            word, self._scalar = self._scalar, ""
            if _SCALAR.fullmatch(word) is None:
                return Progress.WRONG
            if self._value_ended() is Progress.DONE:
                return Progress.ENDED
        return Progress.MORE if char in _SPACE else self._structure(char)

    def repaired(self, char: str) -> str:
        """``char``, which was just taken, as valid JSON has it."""
        return json.dumps(char)[1:-1] if self._in_string and char < " " else char

    def _structure(self, char: str) -> Progress:
        expect = self._expect
        if char in "}]":
            open_ended = (_Expect.COMMA_OR_END, _Expect.KEY_OR_END, _Expect.VALUE_OR_END)
            if expect in open_ended and self._containers and self._containers[-1] == char:
                self._containers.pop()
                return self._value_ended()
        elif char == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
            return Progress.MORE
        elif char == "," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._containers[-1] == "}" else _Expect.VALUE
            return Progress.MORE
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and char == '"':
            self._in_string, self._expect = True, _Expect.KEY
            return Progress.MORE
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            return self._value(char)
        return Progress.WRONG

    def _value(self, char: str) -> Progress:
        if char == '"':
            self._in_string, self._expect = True, _Expect.VALUE
        elif char == "{":
            self._containers.append("}")
            self._expect = _Expect.KEY_OR_END
        elif char == "[":
            self._containers.append("]")
            self._expect = _Expect.VALUE_OR_END
        elif char in _SCALAR_CHARS and char != "+" and char != ".":
            self._scalar = char
        else:
            return Progress.WRONG
        return Progress.MORE

    def _string(self, char: str) -> Progress:
        if self._escape < 0:
            if char not in '"\\/bfnrtu':
                return Progress.WRONG
            self._escape = 4 if char == "u" else 0
        elif self._escape > 0:
            if char not in _HEX:
                return Progress.WRONG
            self._escape -= 1
        elif char == "\\":
            self._escape = -1
        elif char == '"':
            self._in_string = False
            if self._expect is _Expect.VALUE:
                return self._value_ended()
            self._expect = _Expect.COLON
        return Progress.MORE

    def _value_ended(self) -> Progress:
        self._expect = _Expect.COMMA_OR_END
        return Progress.MORE if self._containers else Progress.DONE
