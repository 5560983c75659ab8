"""Chat messages as a template expects them; refuses what is not a role and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sinterlm.errors import UsageError


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages: a role each, content as text (text parts are joined by newlines).

    Raises UsageError naming the message and what is wrong with it.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise UsageError("messages is empty; give at least one message")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f'messages[{i}] must be an object with a "role" text')
        checked.append({**message, "content": _content_text(message.get("content"), i)})
    return checked


def _content_text(content: object, index: int) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UsageError(f"messages[{index}].content must be a text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise UsageError(
                f"messages[{index}].content holds a part of type {kind!r}; this model takes text"
            )
        texts.append(text)
    return "\n".join(texts)
