"""ChatPlan: what a chat request came to before the engine sees it, and how answers are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from sinterlm.engine.prompts import Prompt
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.structured import Reasoning
from sinterlm.serve.answering import AnswerReader
from sinterlm.serve.errors import bad_request
from sinterlm.serve.parsers import (
    begins_reasoning,
    reasoning_parser,
    starts_inside,
    tool_parser,
)
from sinterlm.serve.parsers.base import ReasoningParser, ToolParser
from sinterlm.serve.protocol.chat import ChatRequest, FinishReason, NamedToolChoice
from sinterlm.serve.served import ServedModel
from sinterlm.serve.structure import Constraint
from sinterlm.serve.tools import FirstCall, forced_parser


@dataclass(frozen=True)
class ChatPlan:
    """A checked request with its prompt and parameters."""

    request: ChatRequest
    tool_choice: NamedToolChoice | str
    constraint: Constraint | None
    prompt: Prompt
    params: SamplingParams

    def with_params(self, params: SamplingParams) -> ChatPlan:
        """The same with other parameters."""
        return replace(self, params=params)

    def reads_reasoning(self, served: ServedModel) -> bool:
        """Whether answers are searched for reasoning. A constrained one has room for it only where
        tokens tell when it ends."""
        constrained = self.constraint is not None and served.think_tokens is None
        return served.reasoning_parser is not None and not constrained

    def after_reasoning(self, served: ServedModel) -> Constraint | None:
        """The constraint, behind what the model thinks first."""
        if self.constraint is None or not self.reads_reasoning(served):
            return self.constraint
        assert served.reasoning_parser is not None and served.think_tokens is not None
        opening, closing = served.think_tokens
        starts = self._starts_inside()
        if begins_reasoning(served.reasoning_parser, starts):
            return self.constraint.behind(Reasoning(closing))
        if starts is False:  # the prompt has ended it
            return self.constraint
        return self.constraint.behind(Reasoning(closing, opening))

    def reader(self, served: ServedModel) -> AnswerReader:
        """What takes one answer apart."""
        return AnswerReader(self._reasoning(served), self._tools(served))

    def _reasoning(self, served: ServedModel) -> ReasoningParser | None:
        if not self.reads_reasoning(served):
            return None
        assert served.reasoning_parser is not None
        return reasoning_parser(served.reasoning_parser, starts_inside=self._starts_inside())

    def _starts_inside(self) -> bool | None:
        return starts_inside(self.prompt.text or "")

    def _tools(self, served: ServedModel) -> ToolParser | None:
        if self.tool_choice == "none":
            return None
        if self.tool_choice != "auto":
            return forced_parser(self.tool_choice)
        assert served.tool_parser is not None
        parser = tool_parser(served.tool_parser)
        return FirstCall(parser) if self.request.parallel_tool_calls is False else parser

    def finish_reason(self, reason: str, num_calls: int) -> FinishReason:
        """OpenAI's word for why an answer ended: a named tool ends with stop, as there."""
        is_named = isinstance(self.tool_choice, NamedToolChoice)
        if reason == "stop" and num_calls and not is_named:
            return "tool_calls"
        return cast(FinishReason, reason)


def variables_of(chat: ChatRequest, template: str) -> dict[str, Any]:
    """The template's variables. Raises ApiError 400 for one that the template does not read."""
    variables = dict(chat.chat_template_kwargs or {})
    template = chat.chat_template or template
    if chat.documents is not None:
        if "documents" not in template:
            raise _unread("documents")
        variables.setdefault("documents", chat.documents)
    effort = chat.reasoning_effort
    if effort is not None:
        knows_switch = effort == "none" and "enable_thinking" in template
        if "reasoning_effort" not in template and not knows_switch:
            raise _unread("reasoning_effort")
        variables.setdefault("reasoning_effort", effort)
        if effort == "none":
            variables.setdefault("enable_thinking", False)
    return variables


def _unread(field: str) -> Exception:
    return bad_request(
        f"{field}: the chat template of this model does not use it",
        param=field,
        code="unsupported_parameter",
    )
