"""``POST /v1/chat/completions``: a conversation in, answers out, whole or one token an event."""

from __future__ import annotations

import time
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from sinterlm.engine.outputs import CompletionOutput, RequestOutput
from sinterlm.engine.prompts import Prompt
from sinterlm.engine.sampling import SamplingParams
from sinterlm.serve.answering import whole_message
from sinterlm.serve.chat_plan import ChatPlan, variables_of
from sinterlm.serve.chat_stream import ChatStream
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
from sinterlm.serve.logprobs import chat_logprobs, prompt_logprobs
from sinterlm.serve.models import json_answer
from sinterlm.serve.protocol.answers import CompletionTokensDetails
from sinterlm.serve.protocol.chat import ChatAnswer, ChatChoice, ChatRequest
from sinterlm.serve.rendering import Renderer, off_loop
from sinterlm.serve.request_ids import request_id_of
from sinterlm.serve.sampling import sampling_params
from sinterlm.serve.sse import EventStream, while_connected
from sinterlm.serve.structure import constraint_of
from sinterlm.serve.tools import check_tools, choice_of, forced_calls


class ChatEndpoint:
    """The handler."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._served = context.served
        options = context.options
        self._decoder = BodyDecoder(ChatRequest, unknown_fields=options.unknown_fields)
        self._renderer = Renderer(
            context.served, trust_templates=options.trust_request_chat_template
        )

    async def __call__(self, request: Request) -> Response:
        """Answer one request. Raises ApiError."""
        body = await json_body(request)
        chat = self._decoder.decode(body)
        plan = await off_loop(len(body), lambda: self._plan(chat))
        plan = await self._with_grammar(plan)
        answer_id = f"chatcmpl-{request_id_of(request, chat.request_id)}"
        generation = Generation(
            self._context,
            Job(
                request_id=answer_id,
                prompts=[plan.prompt],
                params=plan.params,
                priority=checked_priority(chat),
                cache_salt=checked_salt(chat),
                param="messages",
                record=record_of(request, stream=chat.stream),
            ),
        )
        if chat.stream:
            stream = ChatStream(plan, self._served, answer_id, stream_options(chat))
            return EventStream(stream.events(generation), cancel=generation.cancel)
        work = generation.outputs()
        (output,) = await while_connected(work, request.receive, generation.cancel)
        return json_answer(self._answer(plan, answer_id, output))

    # -- what is asked for -----------------------------------------------------------------------

    def _plan(self, chat: ChatRequest) -> ChatPlan:
        self._served.check_name(chat.model)
        stream_options(chat)
        if chat.stream and chat.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs needs stream=false", param="prompt_logprobs")
        check_tools(chat.tools or [])
        choice = choice_of(chat)
        self._check_can_call(choice)
        constraint, forced = constraint_of(chat), forced_calls(chat, choice)
        if constraint is not None and choice != "none":
            raise bad_request(
                f"{constraint.field} and tools exclude each other; set tool_choice to none",
                param=constraint.field,
            )
        prompt = self._prompt(chat, tools_shown=choice != "none")
        params = self._params(chat, prompt)
        return ChatPlan(chat, choice, forced or constraint, prompt, params)

    def _check_can_call(self, choice: object) -> None:
        if choice == "auto" and self._served.tool_parser is None:
            raise bad_request(
                "tools: the answers of this model are not read for calls; set tool_choice to "
                "required or to one tool, or start the server with --tool-call-parser",
                param="tools",
                code="unsupported_parameter",
            )

    def _prompt(self, chat: ChatRequest, *, tools_shown: bool) -> Prompt:
        prompt = self._renderer.chat(
            chat,
            chat.messages,
            chat.tools if tools_shown else None,
            variables_of(chat, self._served.template_source),
        )
        return self._renderer.cut(prompt, chat, _max_tokens(chat)[1])

    def _params(self, chat: ChatRequest, prompt: Prompt) -> SamplingParams:
        field, max_tokens = _max_tokens(chat)
        num_prompt = len(list(prompt.token_ids))
        self._renderer.check_room(num_prompt, max_tokens, field=field, prompt_field="messages")
        if chat.top_logprobs is not None and not chat.logprobs and chat.top_logprobs != 0:
            raise bad_request("top_logprobs needs logprobs=true", param="top_logprobs")
        overrides: dict[str, Any] = {
            "max_tokens": self._served.default_max_tokens if max_tokens is None else max_tokens,
            "logprobs": (chat.top_logprobs or 0) if chat.logprobs else None,
            "prompt_logprobs": chat.prompt_logprobs,
        }
        called = {"max_tokens": field, "logprobs": "top_logprobs"}
        return sampling_params(chat, self._served, overrides, called=called)

    async def _with_grammar(self, plan: ChatPlan) -> ChatPlan:
        constraint = plan.after_reasoning(self._served)
        params = await constrained(self._context.bridge, plan.params, constraint)
        return plan.with_params(params)

    # -- the whole answer ------------------------------------------------------------------------

    def _answer(self, plan: ChatPlan, answer_id: str, output: RequestOutput) -> ChatAnswer:
        chat = plan.request
        usage = usage_of([output])
        choices, num_reasoning = [], 0
        for one in output.outputs:
            choice, reasoning = self._choice(plan, one)
            choices.append(choice)
            num_reasoning += self._served.count_tokens(reasoning)
        if plan.reads_reasoning(self._served):
            usage.completion_tokens_details = CompletionTokensDetails(num_reasoning)
        answer = ChatAnswer(
            id=answer_id,
            created=int(time.time()),
            model=chat.model or self._served.name,
            choices=choices,
            usage=usage,
        )
        if output.prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        if chat.return_token_ids:
            answer.prompt_token_ids = list(output.prompt_token_ids)
        return answer

    def _choice(self, plan: ChatPlan, one: CompletionOutput) -> tuple[ChatChoice, str]:
        chat = plan.request
        reader = plan.reader(self._served)
        piece = reader.push(one.text, last=True)
        logprobs = None
        if one.logprobs is not None:
            logprobs = chat_logprobs(
                one.logprobs, chat.top_logprobs or 0, as_ids=chat.return_tokens_as_token_ids is True
            )
        choice = ChatChoice(
            index=one.index,
            message=whole_message(piece, with_reasoning=chat.include_reasoning is not False),
            logprobs=logprobs,
            finish_reason=plan.finish_reason(one.finish_reason, reader.num_calls),
            stop_reason=one.stop_reason,
            token_ids=list(one.token_ids) if chat.return_token_ids else UNSET,
        )
        return choice, piece.reasoning


def _max_tokens(chat: ChatRequest) -> tuple[str, int | None]:
    """The limit of the answer's length, and what the client called it."""
    if chat.max_completion_tokens is not None or chat.max_tokens is None:
        return "max_completion_tokens", chat.max_completion_tokens
    return "max_tokens", chat.max_tokens
