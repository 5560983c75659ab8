"""Finding tags in text that arrives in pieces. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable


def find_first(text: str, tags: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of ``tags`` begins in ``text``, and which one it is."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=None)


def held_back(text: str, tags: Iterable[str]) -> int:
    """How many last characters of ``text`` may be the beginning of one of ``tags``."""
    tags = tuple(tags)
    for length in range(min(len(text), max(map(len, tags), default=1) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


def may_become(text: str, tags: Iterable[str]) -> bool:
    """Whether ``text`` is the beginning of one of ``tags``, and not yet the whole of it."""
    return any(len(text) < len(tag) and tag.startswith(text) for tag in tags)
