"""A request's fields as SamplingParams: the checkpoint's defaults overlaid with what was given.

SamplingParams judges the values; here its words are turned into the request's own field names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from sinterlm.serve.errors import bad_request
from sinterlm.serve.protocol.shared import GenerationRequest
from sinterlm.serve.served import ServedModel

#: Fields that mean the same in a request and in SamplingParams.
_SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop", "stop_token_ids", "bad_words", "allowed_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
)  # fmt: skip

_MOST_BIAS = 100.0  #: OpenAI's range of logit_bias


def sampling_params(
    request: GenerationRequest,
    served: ServedModel,
    overrides: Mapping[str, Any],
    *,
    called: Mapping[str, str],
) -> SamplingParams:
    """How to draw for ``request``. ``overrides`` are fields of SamplingParams that the endpoint
    worked out itself; ``called`` says what the client calls those of another name.

    Raises ApiError 400 naming the field of the request.
    """
    given: dict[str, Any] = {
        name: value for name in _SAME if (value := getattr(request, name)) is not None
    }
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    if request.seed is not None:
        given["seed"] = _seed(request.seed)
    given["detokenize"] = served.tokenizer.has_vocabulary
    try:
        params = replace(served.defaults, **given, **overrides)
        params.check_vocabulary(served.vocab_size)
        return params
    except UsageError as exc:
        field = exc.field or ""
        name = called.get(field, field)
        message = name + str(exc).removeprefix(field)
        raise bad_request(message, param=name or None) from exc


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise bad_request(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        if not math.fabs(value) <= _MOST_BIAS:
            raise bad_request(
                f"logit_bias[{key}]={value:g} must be between -100 and 100", param="logit_bias"
            )
        bias[int(key)] = value
    return bias


def _seed(given: int) -> int:
    # OpenAI's seeds are signed; the engine's are the same 64 bits, unsigned.
    if not -(2**63) <= given < 2**64:
        raise bad_request(f"seed={given} must fit in 64 bits", param="seed")
    return given % 2**64
