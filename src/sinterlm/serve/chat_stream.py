"""ChatStream: the events of one streamed chat answer, in vLLM's shape.

The first event of a choice carries the role with its first token; no event precedes a token. Text
that a parser still holds back makes no event of its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import UNSET

from sinterlm.engine.outputs import Delta
from sinterlm.serve.answering import AnswerReader, delta_message
from sinterlm.serve.chat_plan import ChatPlan
from sinterlm.serve.endpoint import counted, usage_of
from sinterlm.serve.generation import Generation
from sinterlm.serve.logprobs import chat_logprobs
from sinterlm.serve.protocol.answers import CompletionTokensDetails, Usage
from sinterlm.serve.protocol.chat import ChatEvent, ChatEventChoice
from sinterlm.serve.protocol.shared import StreamOptions
from sinterlm.serve.served import ServedModel
from sinterlm.serve.sse import encode_event


class ChatStream:
    """The state of one stream."""

    def __init__(
        self, plan: ChatPlan, served: ServedModel, answer_id: str, options: StreamOptions
    ) -> None:
        chat = plan.request
        self._plan = plan
        self._served = served
        self._options = options
        self._id = answer_id
        self._created = int(time.time())
        self._model = chat.model or served.name
        self._readers: dict[int, AnswerReader] = {}
        self._begun: set[int] = set()
        self._reasoning: list[str] = []
        self._num_prompt = len(list(plan.prompt.token_ids))
        self._num_output = 0
        self._with_reasoning = chat.include_reasoning is not False

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """One event per token, then the usage if asked for. Raises ApiError as Generation does."""
        usage = None
        async with aclosing(generation.events()) as deltas:
            async for _, delta in deltas:
                self._num_output += len(delta.token_ids)
                choice = self._choice(delta)
                if choice is not None:
                    yield encode_event(self._event(choice))
                if delta.output is not None:
                    usage = usage_of([delta.output])
        if self._options.include_usage and usage is not None:
            if self._plan.reads_reasoning(self._served):
                count = self._served.count_tokens("".join(self._reasoning))
                usage.completion_tokens_details = CompletionTokensDetails(count)
            yield encode_event(self._envelope([], usage))

    def _choice(self, delta: Delta) -> ChatEventChoice | None:
        """What a token adds; None when a parser holds all of it back."""
        chat = self._plan.request
        reader = self._readers.get(delta.index)
        if reader is None:
            reader = self._readers[delta.index] = self._plan.reader(self._served)
        piece = reader.push(delta.text, last=delta.finish_reason is not None)
        if piece.reasoning:
            self._reasoning.append(piece.reasoning)
        message = delta_message(
            piece, first=delta.index not in self._begun, with_reasoning=self._with_reasoning
        )
        shows = piece.content or piece.calls or (piece.reasoning and self._with_reasoning)
        is_due = shows or reader.is_plain or delta.finish_reason is not None
        if not (is_due or chat.logprobs or chat.return_token_ids):
            return None
        self._begun.add(delta.index)
        choice = ChatEventChoice(index=delta.index, delta=message)
        if delta.logprobs is not None:
            as_ids = chat.return_tokens_as_token_ids is True
            choice.logprobs = chat_logprobs([delta.logprobs], chat.top_logprobs or 0, as_ids=as_ids)
        if chat.return_token_ids:
            choice.token_ids = list(delta.token_ids)
        if delta.finish_reason is not None:
            choice.finish_reason = self._plan.finish_reason(delta.finish_reason, reader.num_calls)
            choice.stop_reason = delta.stop_reason
        return choice

    def _event(self, choice: ChatEventChoice) -> ChatEvent:
        usage = None
        if self._options.continuous_usage_stats:
            usage = counted(self._num_prompt, self._num_output)
        event = self._envelope([choice], usage)
        if self._plan.request.return_token_ids and choice.delta.role is not UNSET:
            event.prompt_token_ids = list(self._plan.prompt.token_ids)
        return event

    def _envelope(self, choices: list[ChatEventChoice], usage: Usage | None) -> ChatEvent:
        return ChatEvent(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=UNSET if usage is None else usage,
        )
