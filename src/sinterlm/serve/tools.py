"""Tools of a chat request: whether the model may, must or must not call one; and reading calls
that a JSON schema forced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sinterlm.serve.errors import bad_request
from sinterlm.serve.parsers.base import ToolCallDelta, ToolDelta, ToolParser
from sinterlm.serve.parsers.calls import new_call_id
from sinterlm.serve.protocol.chat import ChatRequest, NamedToolChoice, Tool
from sinterlm.serve.structure import Constraint, constraint

MAX_TOOLS = 128  #: OpenAI's limit


def choice_of(request: ChatRequest) -> NamedToolChoice | str:
    """``tool_choice`` with its default: auto where there are tools. Raises ApiError 400."""
    tools = request.tools or []
    choice = request.tool_choice
    if choice is None:
        return "auto" if tools else "none"
    if not tools and choice != "none":
        raise bad_request("tool_choice needs tools", param="tool_choice")
    if isinstance(choice, NamedToolChoice):
        names = [tool.function.name for tool in tools]
        if choice.function.name not in names:
            raise bad_request(
                f"tool_choice names {choice.function.name[:60]!r}, and tools are "
                f"{', '.join(names)[:200]}",
                param="tool_choice.function.name",
            )
    return choice


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse tools without a name of their own. Raises ApiError 400."""
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"{len(tools)} tools are more than {MAX_TOOLS}", param="tools")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool.function.name
        if not name or name in seen:
            raise bad_request(
                f"tools[{i}].function.name={name[:60]!r} must be a name of its own",
                param=f"tools[{i}].function.name",
            )
        seen.add(name)


def forced_calls(request: ChatRequest, choice: NamedToolChoice | str) -> Constraint | None:
    """The schema that makes the answer a call, or a list of calls; None where none is forced."""
    tools = request.tools or []
    if isinstance(choice, NamedToolChoice):
        tool = next(t for t in tools if t.function.name == choice.function.name)
        return constraint("tool_choice", {"json": _arguments(tool)})
    if choice != "required":
        return None
    calls = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call(tool) for tool in tools]},
    }
    if request.parallel_tool_calls is False:
        calls["maxItems"] = 1
    return constraint("tool_choice", {"json": calls})


def forced_parser(choice: NamedToolChoice | str) -> ToolParser:
    """Reads what ``forced_calls`` forced."""
    return OneCall(choice.function.name) if isinstance(choice, NamedToolChoice) else ListedCalls()


def _arguments(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "additionalProperties": False}


def _call(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": _arguments(tool)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


class OneCall:
    """The whole text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> ToolDelta:
        """Arguments as they come; the first piece announces the call."""
        if not text:
            return ToolDelta()
        if self._begun:
            return ToolDelta(calls=(ToolCallDelta(0, arguments=text),))
        self._begun = True
        return ToolDelta(calls=(ToolCallDelta(0, new_call_id(), self._name, text),))

    def finish(self) -> ToolDelta:
        """Nothing is held back."""
        return ToolDelta()


class ListedCalls:
    """The text is a JSON list of ``{"name", "parameters"}``; a call is given out when complete."""

    def __init__(self) -> None:
        self._rest = ""
        self._count = 0
        self._decoder = json.JSONDecoder()

    def push(self, text: str) -> ToolDelta:
        """The calls that ``text`` completed."""
        self._rest += text
        return ToolDelta(calls=tuple(self._complete())) if "}" in text else ToolDelta()

    def finish(self) -> ToolDelta:
        """A call that was cut off is content: nothing is lost."""
        rest = self._rest.strip()
        return ToolDelta(content="" if rest in ("", "[", "]", "[]") else self._rest)

    def _complete(self) -> Iterator[ToolCallDelta]:
        while True:
            self._rest = self._rest.lstrip(" \t\r\n[,")
            try:
                call, end = self._decoder.raw_decode(self._rest)
                name, arguments = call["name"], call["parameters"]
            except (ValueError, TypeError, KeyError):
                return
            self._rest = self._rest[end:]
            yield ToolCallDelta(
                self._count, new_call_id(), name, json.dumps(arguments, ensure_ascii=False)
            )
            self._count += 1


class FirstCall:
    """Lets through content and the first call alone: ``parallel_tool_calls: false``."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser

    def push(self, text: str) -> ToolDelta:
        """As the parser, less later calls."""
        return _only_first(self._parser.push(text))

    def finish(self) -> ToolDelta:
        """As the parser, less later calls."""
        return _only_first(self._parser.finish())


def _only_first(delta: ToolDelta) -> ToolDelta:
    return ToolDelta(delta.content, tuple(call for call in delta.calls if call.index == 0))
