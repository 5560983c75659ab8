"""Objects that answers of several endpoints have in common."""

from __future__ import annotations

from typing import Literal

import msgspec


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int  #: found in the prefix cache, so not computed again


class CompletionTokensDetails(msgspec.Struct):
    """Of the generated tokens."""

    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of one request; those of an abandoned ``n``th completion included."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | msgspec.UnsetType = msgspec.UNSET
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


class PromptLogprob(msgspec.Struct):
    """One token's log-probability at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


#: One entry per prompt token: token id -> its log-probability; the first token has none.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class ModelCard(msgspec.Struct, kw_only=True):
    """One name under which the model is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sinterlm"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(msgspec.Struct):
    """``GET /version``."""

    version: str


class ResetAnswer(msgspec.Struct):
    """``POST /reset_prefix_cache``."""

    success: bool
