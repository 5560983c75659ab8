"""CompletionStream: the events of one streamed completion, in vLLM's shape: a token each."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET

from sinterlm.engine.outputs import Delta, PromptLogprobs, RequestOutput, TokenLogprobs
from sinterlm.engine.prompts import Prompt
from sinterlm.serve.endpoint import counted, stream_options, usage_of
from sinterlm.serve.generation import Generation
from sinterlm.serve.logprobs import completion_logprobs
from sinterlm.serve.protocol.answers import Usage
from sinterlm.serve.protocol.completion import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from sinterlm.serve.served import ServedModel
from sinterlm.serve.sse import encode_event


class CompletionStream:
    """The state of one stream."""

    def __init__(
        self,
        asked: CompletionRequest,
        prompts: Sequence[Prompt],
        served: ServedModel,
        answer_id: str,
    ) -> None:
        self._asked = asked
        self._prompts = prompts
        self._served = served
        self._options = stream_options(asked)
        self._id = answer_id
        self._created = int(time.time())
        self._model = asked.model or served.name
        self._prompt_only = asked.max_tokens == 0
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # choice -> where its next token's text begins
        self._scores: dict[int, PromptLogprobs] = {}  # prompt -> its log-probabilities, to echo
        self._held: dict[int, list[Delta]] = {}  # prompt -> what came before its scores
        self._num_prompt = sum(len(list(prompt.token_ids)) for prompt in prompts)
        self._num_output = 0

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """One event per token, then the usage if asked for. Raises ApiError as Generation does."""
        outputs: list[RequestOutput] = []
        async with aclosing(generation.events()) as deltas:
            async for i, given in deltas:
                for delta in self._ready(i, given):
                    self._num_output += 0 if self._prompt_only else len(delta.token_ids)
                    usage = None
                    if self._options.continuous_usage_stats:
                        usage = counted(self._num_prompt, self._num_output)
                    yield encode_event(self._envelope([self._choice(i, delta)], usage))
                    if delta.output is not None:
                        outputs.append(delta.output)
        if self._options.include_usage:
            usage = usage_of(outputs)
            if self._prompt_only:
                usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
            yield encode_event(self._envelope([], usage))

    def _ready(self, prompt: int, delta: Delta) -> list[Delta]:
        """``delta`` and what it was waited for: a choice begins with the scores of its prompt, and
        of n sequences the first one tells them, which another may overtake."""
        if not (self._asked.echo and self._asked.logprobs is not None):
            return [delta]
        if delta.prompt_logprobs is not None:
            self._scores[prompt] = delta.prompt_logprobs
        waiting = [*self._held.pop(prompt, []), delta]
        if prompt in self._scores:
            return waiting
        self._held[prompt] = waiting
        return []

    def _choice(self, prompt: int, delta: Delta) -> CompletionChoice:
        asked = self._asked
        index = prompt * (asked.n or 1) + delta.index
        first = index not in self._begun
        self._begun.add(index)
        choice = CompletionChoice(index=index, text="" if self._prompt_only else delta.text)
        if first and asked.echo:
            given = self._prompts[prompt]
            choice.text = self._served.echoed(given.text, given.token_ids) + choice.text
        if delta.logprobs is not None:
            choice.logprobs = self._logprobs(prompt, index, delta, first)
        if asked.return_token_ids:
            choice.token_ids = [] if self._prompt_only else list(delta.token_ids)
            if first:
                choice.prompt_token_ids = list(self._prompts[prompt].token_ids)
        if delta.finish_reason is not None:
            is_cut = self._prompt_only or delta.finish_reason == "length"
            choice.finish_reason = "length" if is_cut else "stop"
            choice.stop_reason = None if self._prompt_only else delta.stop_reason
        return choice

    def _logprobs(self, prompt: int, index: int, delta: Delta, first: bool) -> CompletionLogprobs:
        entries: list[TokenLogprobs | None] = [delta.logprobs]
        ids = list(delta.token_ids)
        if self._prompt_only:
            entries, ids = [], []
        if first and self._asked.echo:
            entries = [*self._scores[prompt], *entries]
            ids = [*self._prompts[prompt].token_ids, *ids]
        texts = [self._served.tokenizer.token_text(i) for i in ids]
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(text or "") for text in texts)
        return completion_logprobs(
            entries,
            ids,
            texts,
            offset=offset,
            as_ids=self._asked.return_tokens_as_token_ids is True,
        )

    def _envelope(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=UNSET if usage is None else usage,
        )
