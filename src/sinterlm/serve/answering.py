"""AnswerReader: one choice's text taken apart into reasoning, content and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET

from sinterlm.serve.parsers.base import (
    ReasoningDelta,
    ReasoningParser,
    ToolCallDelta,
    ToolDelta,
    ToolParser,
)
from sinterlm.serve.protocol.chat import AnsweredFunction, AnsweredMessage, AnsweredToolCall


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain with one push."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class AnswerReader:
    """A reasoning parser in front of a tool parser; either may be missing."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self.num_calls = 0  #: calls begun so far
        self.is_plain = reasoning is None and tools is None  #: text passes through as it is

    def push(self, text: str, *, last: bool) -> Piece:
        """Take the next piece of text; with ``last`` also what was held back."""
        if self.is_plain:
            return Piece(content=text)
        thought = ReasoningDelta(content=text)
        if self._reasoning is not None:
            thought = self._reasoning.push(text)
            if last:
                rest = self._reasoning.finish()
                thought = ReasoningDelta(
                    thought.reasoning + rest.reasoning, thought.content + rest.content
                )
        if self._tools is None:
            return Piece(thought.reasoning, thought.content)
        said = self._tools.push(thought.content)
        if last:
            rest_said = self._tools.finish()
            said = ToolDelta(said.content + rest_said.content, said.calls + rest_said.calls)
        self.num_calls += sum(call.id is not None for call in said.calls)
        return Piece(thought.reasoning, said.content, said.calls)


def whole_message(piece: Piece, *, with_reasoning: bool) -> AnsweredMessage:
    """A complete answer. Content is null when there is only reasoning or calls."""
    message = AnsweredMessage(
        role="assistant", content=piece.content or ("" if _is_empty(piece) else None)
    )
    if piece.reasoning and with_reasoning:
        message.reasoning = message.reasoning_content = piece.reasoning
    if piece.calls:
        message.tool_calls = _joined_calls(piece.calls)
    return message


def delta_message(piece: Piece, *, first: bool, with_reasoning: bool) -> AnsweredMessage:
    """What one piece adds. The first delta of a choice carries the role."""
    message = AnsweredMessage()
    if first:
        message.role = "assistant"
    if piece.reasoning and with_reasoning:
        message.reasoning = message.reasoning_content = piece.reasoning
    if piece.content or not (piece.reasoning or piece.calls):
        message.content = piece.content
    if piece.calls:
        message.tool_calls = [_delta_call(call) for call in piece.calls]
    return message


def _is_empty(piece: Piece) -> bool:
    return not (piece.reasoning or piece.calls)


def _delta_call(call: ToolCallDelta) -> AnsweredToolCall:
    function = AnsweredFunction(name=call.name or UNSET, arguments=call.arguments)
    if call.id is None:
        return AnsweredToolCall(index=call.index, function=function)
    return AnsweredToolCall(index=call.index, id=call.id, type="function", function=function)


def _joined_calls(deltas: tuple[ToolCallDelta, ...]) -> list[AnsweredToolCall]:
    calls: dict[int, AnsweredToolCall] = {}
    for delta in deltas:
        if delta.index not in calls:
            calls[delta.index] = AnsweredToolCall(
                id=delta.id or UNSET,
                type="function",
                function=AnsweredFunction(name=delta.name or UNSET),
            )
        calls[delta.index].function.arguments += delta.arguments
    return [calls[index] for index in sorted(calls)]
