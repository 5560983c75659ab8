"""What a parser of answers is: text goes in as it is drawn, what became certain comes out.

One parser per choice. The result depends on the text alone, never on how it was cut into pushes,
so a whole answer is one push and a finish. Nothing is lost: what is no call is content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text that became certain; either may be empty. Reasoning comes before content."""

    reasoning: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one call. The first one of an ``index`` has ``id`` and ``name``, no later one."""

    index: int  #: 0, 1, … in the order of the text
    id: str | None = None  #: ``call_`` and 24 hexadecimal digits
    name: str | None = None
    arguments: str = ""  #: the next piece of the JSON text; all pieces together are the arguments


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """What became certain. Content belongs before the calls of the same delta."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class ReasoningParser(Protocol):
    """Separates what a model thinks from what it says."""

    def push(self, text: str) -> ReasoningDelta:
        """Take the next piece of the answer."""
        ...

    def finish(self) -> ReasoningDelta:
        """The answer is complete: what was held back. Called once, last."""
        ...


class ToolParser(Protocol):
    """Separates calls of tools from content."""

    def push(self, text: str) -> ToolDelta:
        """Take the next piece of the answer (of its content, behind a reasoning parser)."""
        ...

    def finish(self) -> ToolDelta:
        """The answer is complete: what was held back. Called once, last."""
        ...
