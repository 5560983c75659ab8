"""From the prompts and conversations of requests to token ids.

Refuses prompts that leave no room for an answer; shortens one only where the request asks for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec

from sinterlm.engine.prompts import Prompt
from sinterlm.errors import UsageError
from sinterlm.serve.errors import bad_request, from_exception
from sinterlm.serve.protocol.chat import ChatRequest, Message, Tool, ToolCall
from sinterlm.serve.protocol.shared import GenerationRequest
from sinterlm.serve.protocol.tokens import TokenizeRequest
from sinterlm.serve.served import ServedModel

T = TypeVar("T")

#: A body at least this long is tokenised on another thread: the event loop serves everybody.
_LONG_BODY = 8192


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """``work()``, on another thread when ``size`` bytes of text would hold up the event loop."""
    return work() if size < _LONG_BODY else await asyncio.to_thread(work)


Conversation: TypeAlias = ChatRequest | TokenizeRequest


class Renderer:
    """Makes prompts for one served model. Raises ApiError 400 naming the field."""

    def __init__(self, served: ServedModel, *, trust_templates: bool) -> None:
        self._served = served
        self._tokenizer = served.tokenizer
        self._trust_templates = trust_templates

    def text(
        self,
        text: str,
        add_special_tokens: bool | None,
        param: str,
        *,
        may_be_empty: bool = False,
        may_be_long: bool = False,
    ) -> Prompt:
        """A plain text as it stands. ``may_be_long``: it need not fit into the context."""
        if not text and not may_be_empty:
            raise bad_request(f"{param} is empty; give at least one character", param=param)
        if not may_be_long:
            self._check_length(text, param)
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens is not False)
        except UsageError as exc:
            raise from_exception(exc, param=param) from exc
        return Prompt(ids, text)

    def _check_length(self, text: str, param: str) -> None:
        """Refuse what cannot fit before every character of it is tokenised."""
        most = self._served.most_chars
        if most is not None and len(text) > most:
            raise bad_request(
                f"{param} makes a prompt of {len(text)} characters, which are more than "
                f"{self._served.max_model_len} tokens, the context of this model (max_model_len); "
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def tokens(self, token_ids: list[int], param: str, *, may_be_empty: bool = False) -> Prompt:
        """Token ids as they stand."""
        if not token_ids and not may_be_empty:
            raise bad_request(f"{param} is empty; give at least one token", param=param)
        bad = next((t for t in token_ids if not 0 <= t < self._served.vocab_size), None)
        if bad is not None:
            last = self._served.vocab_size - 1
            raise bad_request(
                f"{param} holds token {bad}, and token ids of this model are 0 … {last}",
                param=param,
            )
        return Prompt(token_ids, None)

    def chat(
        self,
        request: Conversation,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: dict[str, Any],
    ) -> Prompt:
        """A conversation through the chat template, in its sandbox."""
        if request.chat_template is not None and not self._trust_templates:
            raise bad_request(
                "chat_template: this server runs its own template only; it would take yours when "
                "started with --trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        renamed = "developer" not in self._template(request)
        continues = request.continue_final_message is True
        generation = request.add_generation_prompt
        try:
            text = self._tokenizer.render_chat(
                [_plain(m, f"messages[{i}]", renamed) for i, m in enumerate(messages)],
                add_generation_prompt=not continues if generation is None else generation,
                continue_final_message=continues,
                tools=None if tools is None else [_without_null(tool) for tool in tools],
                chat_template=request.chat_template or self._served.chat_template,
                chat_template_kwargs=variables,
            )
            if isinstance(request, ChatRequest) and request.truncate_prompt_tokens is None:
                self._check_length(text, "messages")
            special = request.add_special_tokens is True
            ids = self._tokenizer.encode(text, add_special_tokens=special)
        except UsageError as exc:
            raise from_exception(exc, param=_to_blame(str(exc))) from exc
        return Prompt(ids, text)

    def _template(self, request: Conversation) -> str:
        return request.chat_template or self._served.template_source

    def cut(self, prompt: Prompt, request: GenerationRequest, max_tokens: int | None) -> Prompt:
        """The prompt as ``truncate_prompt_tokens`` wants it."""
        keep, ids = request.truncate_prompt_tokens, list(prompt.token_ids)
        if keep is None:
            if request.truncation_side is not None:
                raise bad_request(
                    "truncation_side needs truncate_prompt_tokens", param="truncation_side"
                )
            return Prompt(ids, prompt.text)
        most = self._served.max_model_len - max(1, max_tokens or 1)
        keep = most if keep == -1 else keep
        if not 1 <= keep <= self._served.max_model_len:
            raise bad_request(
                f"truncate_prompt_tokens={keep} must be -1 or between 1 and "
                f"{self._served.max_model_len}",
                param="truncate_prompt_tokens",
            )
        if len(ids) <= keep:
            return Prompt(ids, prompt.text)
        kept = ids[:keep] if request.truncation_side == "right" else ids[-keep:]
        return Prompt(kept, None)

    def check_room(
        self, num_tokens: int, max_tokens: int | None, *, field: str, prompt_field: str
    ) -> None:
        """Raise a 400 when prompt and answer cannot fit together."""
        asked, limit = max(1, max_tokens or 1), self._served.max_model_len
        if num_tokens + asked <= limit:
            return
        wanted = "at least one" if max_tokens is None else f"{field}={max_tokens}"
        raise bad_request(
            f"the prompt has {num_tokens} tokens and {wanted} to generate, and the context of this "
            f"model is {limit} (max_model_len); shorten the prompt or ask for fewer tokens",
            param=field if num_tokens < limit else prompt_field,
            code="context_length_exceeded",
        )


def _to_blame(message: str) -> str:
    """The field that a message of the template engine is about."""
    for field in ("chat_template_kwargs", "continue_final_message"):
        if message.startswith(field):
            return field
    return "messages"


def _without_null(struct: msgspec.Struct) -> dict[str, Any]:
    """A struct as plain data, less what was left out."""
    plain: dict[str, Any] = _drop_null(msgspec.to_builtins(struct))
    return plain


def _drop_null(value: Any) -> Any:
    return {k: _drop_null(v) if k == "function" else v for k, v in value.items() if v is not None}


def _plain(message: Message, where: str, rename_developer: bool) -> dict[str, Any]:
    """A message as templates know it: text content, arguments as an object."""
    if message.refusal or message.annotations:
        field = "refusal" if message.refusal else "annotations"
        raise bad_request(
            f"{where}.{field} is not given to the model; leave it out or put it into the content",
            param=f"{where}.{field}",
        )
    # Templates from before OpenAI renamed the role drop a "developer" message without a word.
    is_renamed = message.role == "developer" and rename_developer
    plain: dict[str, Any] = {
        "role": "system" if is_renamed else message.role,
        "content": _content(message.content, where),
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    reasoning = message.reasoning or message.reasoning_content
    if reasoning:
        plain["reasoning"] = plain["reasoning_content"] = reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            _plain_call(call, f"{where}.tool_calls[{i}]")
            for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _content(content: str | list[dict[str, Any]] | None, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        place = f"{where}.content[{i}]"
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise bad_request(
                f"{place} is a part of type {str(kind)[:40]!r}; this model takes text only",
                param=f"{place}.type",
                code="unsupported_value",
            )
        if not isinstance(text, str):
            raise bad_request(f"{place}.text must be a text", param=f"{place}.text")
        extra = sorted(part.keys() - {"type", "text"})
        if extra:
            raise bad_request(
                f"unknown field {place}.{extra[0][:40]}; a text part has type and text",
                param=f"{place}.{extra[0][:40]}",
                code="unknown_parameter",
            )
        texts.append(text)
    return "\n".join(texts)


def _plain_call(call: ToolCall, where: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates print."""
    place = f"{where}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as exc:
        raise bad_request(f"{place} is not JSON: {exc}", param=place) from exc
    if not isinstance(arguments, dict):
        raise bad_request(f"{place} must be the JSON text of an object", param=place)
    plain = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return plain if call.id is None else {"id": call.id, **plain}
