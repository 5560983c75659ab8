"""``POST /v1/completions``: prompts in, completions out, whole or one token an event."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sinterlm.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from sinterlm.engine.prompts import Prompt
from sinterlm.engine.sampling import SamplingParams
from sinterlm.serve.completion_stream import CompletionStream
from sinterlm.serve.context import Context
from sinterlm.serve.decoding import BodyDecoder
from sinterlm.serve.endpoint import (
    checked_priority,
    checked_salt,
    constrained,
    json_body,
    stream_options,
    usage_of,
)
from sinterlm.serve.errors import bad_request
from sinterlm.serve.generation import Generation, Job
from sinterlm.serve.journal import record_of
from sinterlm.serve.logprobs import completion_logprobs, prompt_logprobs
from sinterlm.serve.models import json_answer
from sinterlm.serve.protocol.completion import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from sinterlm.serve.rendering import Renderer, off_loop
from sinterlm.serve.request_ids import request_id_of
from sinterlm.serve.sampling import sampling_params
from sinterlm.serve.sse import EventStream, while_connected
from sinterlm.serve.structure import constraint_of


class CompletionEndpoint:
    """The handler."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._served = context.served
        options = context.options
        self._decoder = BodyDecoder(CompletionRequest, unknown_fields=options.unknown_fields)
        self._renderer = Renderer(
            context.served, trust_templates=options.trust_request_chat_template
        )

    async def __call__(self, request: Request) -> Response:
        """Answer one request. Raises ApiError."""
        body = await json_body(request)
        asked = self._decoder.decode(body)
        prompts, params = await off_loop(len(body), lambda: self._plan(asked))
        params = await constrained(self._context.bridge, params, constraint_of(asked))
        answer_id = f"cmpl-{request_id_of(request, asked.request_id)}"
        generation = Generation(
            self._context,
            Job(
                request_id=answer_id,
                prompts=prompts,
                params=params,
                priority=checked_priority(asked),
                cache_salt=checked_salt(asked),
                param="prompt",
                record=record_of(request, stream=asked.stream),
            ),
        )
        if asked.stream:
            stream = CompletionStream(asked, prompts, self._served, answer_id)
            return EventStream(stream.events(generation), cancel=generation.cancel)
        work = generation.outputs()
        outputs = await while_connected(work, request.receive, generation.cancel)
        return json_answer(self._answer(asked, answer_id, outputs))

    # -- what is asked for -----------------------------------------------------------------------

    def _plan(self, asked: CompletionRequest) -> tuple[list[Prompt], SamplingParams]:
        self._served.check_name(asked.model)
        stream_options(asked)
        self._check_combinations(asked)
        max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
        prompts = []
        for prompt in self._prompts(asked):
            cut = self._renderer.cut(prompt, asked, max_tokens)
            self._renderer.check_room(
                len(list(cut.token_ids)), max_tokens, field="max_tokens", prompt_field="prompt"
            )
            prompts.append(cut)
        num_logprobs = asked.prompt_logprobs
        if num_logprobs is None and asked.echo:
            num_logprobs = asked.logprobs
        overrides: dict[str, Any] = {
            # With echo, 0 asks for the prompt alone: one token is drawn and left out.
            "max_tokens": 1 if max_tokens == 0 and asked.echo else max_tokens,
            "logprobs": asked.logprobs,
            "prompt_logprobs": num_logprobs,
        }
        return prompts, sampling_params(asked, self._served, overrides, called={})

    def _check_combinations(self, asked: CompletionRequest) -> None:
        n = asked.n or 1
        if asked.best_of is not None and asked.best_of != n:
            raise bad_request(
                f"best_of={asked.best_of} must equal n={n}: every completion is returned",
                param="best_of",
            )
        if asked.stream and asked.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs needs stream=false", param="prompt_logprobs")

    def _prompts(self, asked: CompletionRequest) -> list[Prompt]:
        given, special = asked.prompt, asked.add_special_tokens
        is_cut = asked.truncate_prompt_tokens is not None
        if isinstance(given, str):
            return [self._renderer.text(given, special, "prompt", may_be_long=is_cut)]
        if not given:
            raise bad_request("prompt is empty; give a text or token ids", param="prompt")
        if isinstance(given[0], int):
            if not is_cut:  # a list of millions is not looked through
                self._renderer.check_room(
                    len(given), asked.max_tokens, field="max_tokens", prompt_field="prompt"
                )
        elif len(given) > (most := self._context.options.max_waiting):
            raise bad_request(
                f"prompt holds {len(given)} prompts, and {most} may wait at a time", param="prompt"
            )
        texts = [item for item in given if isinstance(item, str)]
        ids = [item for item in given if isinstance(item, int)]
        lists = [item for item in given if isinstance(item, list)]
        if len(ids) == len(given):
            return [self._renderer.tokens(ids, "prompt")]
        if len(texts) != len(given) and len(lists) != len(given):
            raise bad_request("prompt mixes texts and token ids; give one kind", param="prompt")
        return [
            *(
                self._renderer.text(text, special, f"prompt[{i}]", may_be_long=is_cut)
                for i, text in enumerate(texts)
            ),
            *(self._renderer.tokens(t, f"prompt[{i}]") for i, t in enumerate(lists)),
        ]

    # -- the whole answer ------------------------------------------------------------------------

    def _answer(
        self, asked: CompletionRequest, answer_id: str, outputs: list[RequestOutput]
    ) -> CompletionAnswer:
        n = asked.n or 1
        choices = [
            self._choice(asked, output, one, i * n + one.index)
            for i, output in enumerate(outputs)
            for one in output.outputs
        ]
        usage = usage_of(outputs)
        if asked.max_tokens == 0:
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        return CompletionAnswer(
            id=answer_id,
            created=int(time.time()),
            model=asked.model or self._served.name,
            choices=choices,
            usage=usage,
        )

    def _choice(
        self, asked: CompletionRequest, output: RequestOutput, one: CompletionOutput, index: int
    ) -> CompletionChoice:
        prompt_only = asked.max_tokens == 0
        text = "" if prompt_only else one.text
        if asked.echo:
            text = self._served.echoed(output.prompt, output.prompt_token_ids) + text
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=None if asked.logprobs is None else self._logprobs(asked, output, one),
            finish_reason="length" if prompt_only or one.finish_reason == "length" else "stop",
            stop_reason=None if prompt_only else one.stop_reason,
        )
        if asked.return_token_ids:
            choice.token_ids = [] if prompt_only else list(one.token_ids)
            choice.prompt_token_ids = list(output.prompt_token_ids)
        if asked.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return choice

    def _logprobs(
        self, asked: CompletionRequest, output: RequestOutput, one: CompletionOutput
    ) -> CompletionLogprobs:
        entries: list[TokenLogprobs | None] = [*(one.logprobs or [])]
        ids = list(one.token_ids)
        if asked.max_tokens == 0:
            entries, ids = [], []
        if asked.echo:
            assert output.prompt_logprobs is not None
            entries = [*output.prompt_logprobs, *entries]
            ids = [*output.prompt_token_ids, *ids]
        return completion_logprobs(
            entries,
            ids,
            [self._served.tokenizer.token_text(i) for i in ids],
            offset=0,
            as_ids=asked.return_tokens_as_token_ids is True,
        )
