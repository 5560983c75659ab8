"""Parsers of answers by vLLM's names, and which one a chat template asks for.

``auto`` looks at the template; ``none`` parses nothing. Refuses an unknown name with those known.
"""

from __future__ import annotations

from sinterlm.errors import UsageError
from sinterlm.serve.parsers.base import (
    ReasoningDelta,
    ReasoningParser,
    ToolCallDelta,
    ToolDelta,
    ToolParser,
)
from sinterlm.serve.parsers.calls import HERMES, LLAMA3_JSON, JsonCallParser
from sinterlm.serve.parsers.think import CLOSING, OPENING, ThinkParser, starts_inside

__all__ = [
    "CLOSING",
    "OPENING",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "ReasoningDelta",
    "ReasoningParser",
    "ToolCallDelta",
    "ToolDelta",
    "ToolParser",
    "begins_reasoning",
    "choose_reasoning_parser",
    "choose_tool_parser",
    "reasoning_parser",
    "starts_inside",
    "tool_parser",
]

#: Name -> whose answers it reads.
TOOL_PARSERS: dict[str, str] = {
    "hermes": "Hermes 2 and 3, Qwen2.5, QwQ, Qwen3: <tool_call>{…}</tool_call>",
    "llama3_json": "Llama 3.1 and later: {…}, with or without <|python_tag|>",
}
REASONING_PARSERS: dict[str, str] = {
    "deepseek_r1": "DeepSeek-R1 and its distillations: reasoning first, even without <think>",
    "qwq": "QwQ: the same",
    "qwen3": "Qwen3: reasoning only if the prompt or the answer opens it",
}


def tool_parser(name: str) -> ToolParser:
    """A parser for one answer. ``name`` is one of ``TOOL_PARSERS``; raises UsageError."""
    _check("tool_call_parser", name, TOOL_PARSERS)
    return JsonCallParser(HERMES if name == "hermes" else LLAMA3_JSON)


def reasoning_parser(name: str, *, starts_inside: bool | None) -> ReasoningParser:
    """A parser for one answer. ``name`` is one of ``REASONING_PARSERS``; raises UsageError.

    ``starts_inside``: what the function of that name says about the prompt.
    """
    inside = begins_reasoning(name, starts_inside)
    if name == "qwen3":  # it is known to forget the closing tag before a call
        return ThinkParser(inside=inside, implied=(HERMES.opening,))
    return ThinkParser(inside=inside)


def begins_reasoning(name: str, starts_inside: bool | None) -> bool:
    """Whether an answer is reasoning from its first token on. Arguments of ``reasoning_parser``."""
    _check("reasoning_parser", name, REASONING_PARSERS)
    return starts_inside is True if name == "qwen3" else starts_inside is not False


def choose_tool_parser(asked: str, chat_template: str | None) -> str | None:
    """The parser that option ``asked`` means with this template; None = none. Raises UsageError."""
    if asked == "none":
        return None
    if asked != "auto":
        _check("tool_call_parser", asked, TOOL_PARSERS)
        return asked
    template = chat_template or ""
    if "tools" not in template:
        return None
    if HERMES.opening in template:  # Qwen3-Coder writes XML between the same tags
        return None if "<function=" in template else "hermes"
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template
    return "llama3_json" if is_llama else None


def choose_reasoning_parser(asked: str, chat_template: str | None) -> str | None:
    """The same for reasoning. A template that knows ``<think>`` gets the parser that takes
    nothing for reasoning unless it was opened."""
    if asked == "none":
        return None
    if asked != "auto":
        _check("reasoning_parser", asked, REASONING_PARSERS)
        return asked
    template = chat_template or ""
    return "qwen3" if OPENING in template or CLOSING in template else None


def _check(option: str, name: str, known: dict[str, str]) -> None:
    if name not in known:
        raise UsageError(f"{option}={name!r} is none of auto, none, {', '.join(known)}")
