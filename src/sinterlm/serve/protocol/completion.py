"""``POST /v1/completions``: the request and its answers, in OpenAI's and vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from sinterlm.serve.protocol.answers import PromptLogprobs, Usage
from sinterlm.serve.protocol.fields import effect, refused
from sinterlm.serve.protocol.shared import GenerationRequest


class CompletionRequest(GenerationRequest, kw_only=True):
    """A text to go on with. ``prompt`` is the only field that must be there."""

    prompt: Annotated[
        str | list[str | int | list[int]],
        effect("a text, a list of texts, token ids, or a list of lists of token ids"),
    ]
    max_tokens: Annotated[int | None, effect("most tokens to generate: 16; 0 only with echo")] = 16
    logprobs: Annotated[
        int | None, effect("log-probabilities of each token, with this many alternatives")
    ] = None
    echo: Annotated[
        bool | None, effect("begin with the prompt; with logprobs also those of the prompt")
    ] = None
    best_of: Annotated[int | None, effect("only the value of n is possible")] = None

    suffix: Annotated[
        str | None, refused("the models served here do not fill in the middle", "")
    ] = None
    prompt_embeds: Annotated[Any, refused("a prompt is a text or token ids")] = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class CompletionAnswer(msgspec.Struct, kw_only=True):
    """All completions, or (with one choice and no usage) one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    system_fingerprint: str | msgspec.UnsetType = msgspec.UNSET
