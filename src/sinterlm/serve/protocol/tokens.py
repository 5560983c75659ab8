"""``POST /tokenize`` and ``/detokenize``, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated

import msgspec

from sinterlm.serve.protocol.chat import (
    AddGenerationPrompt,
    ChatTemplate,
    ChatTemplateKwargs,
    ContinueFinalMessage,
    Message,
    Tool,
)
from sinterlm.serve.protocol.fields import effect
from sinterlm.serve.protocol.shared import Strict


class TokenizeRequest(Strict, kw_only=True):
    """Exactly one of ``prompt`` and ``messages``."""

    model: Annotated[str | None, effect("name of the served model; another one is a 404")] = None
    prompt: Annotated[str | None, effect("a text")] = None
    messages: Annotated[list[Message] | None, effect("a conversation")] = None
    tools: Annotated[list[Tool] | None, effect("tools the template shows to the model")] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = None
    add_special_tokens: Annotated[
        bool | None, effect("add a beginning-of-sequence token: for a text yes, for a chat no")
    ] = None
    return_token_strs: Annotated[bool | None, effect("also the text of each token")] = None


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict, kw_only=True):
    """Token ids to be read as text."""

    tokens: Annotated[list[int], effect("token ids")]
    model: Annotated[str | None, effect("name of the served model; another one is a 404")] = None


class DetokenizeAnswer(msgspec.Struct):
    """The text of token ids, special tokens included."""

    prompt: str
