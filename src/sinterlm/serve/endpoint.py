"""What the two generating endpoints have in common: reading the body, submitting, usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import ClientDisconnect, Request

from sinterlm.engine.outputs import RequestOutput
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from sinterlm.serve.bridge import Bridge
from sinterlm.serve.errors import ApiError, bad_request
from sinterlm.serve.protocol.answers import PromptTokensDetails, Usage
from sinterlm.serve.protocol.shared import GenerationRequest, StreamOptions
from sinterlm.serve.structure import Constraint

MAX_SALT = 1024  #: characters of ``cache_salt``


async def json_body(request: Request) -> bytes:
    """The body of a request that says it is JSON. Raises ApiError 415 otherwise.

    Saying so also keeps web pages of other origins out: a browser asks before it sends JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            415,
            f"content-type={kind[:60]!r} must be application/json; "
            "with curl: -H 'content-type: application/json'",
            param="content-type",
        )
    try:
        return await request.body()
    except ClientDisconnect as exc:
        raise ApiError(499, "the client closed the request") from exc


def stream_options(request: GenerationRequest) -> StreamOptions:
    """``stream_options`` with its default. Raises ApiError 400 when there is no stream."""
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream=true", param="stream_options")
    return request.stream_options or StreamOptions()


def checked_salt(request: GenerationRequest) -> str | None:
    """``cache_salt``. Raises ApiError 400 for an empty or an oversized one."""
    salt = request.cache_salt
    if salt is not None and not 1 <= len(salt) <= MAX_SALT:
        raise bad_request(
            f"cache_salt has {len(salt)} characters, and 1 to {MAX_SALT} are possible",
            param="cache_salt",
        )
    return salt


def checked_priority(request: GenerationRequest) -> int:
    """``priority``. Raises ApiError 400 beyond 64 bits."""
    priority = request.priority or 0
    if not -(2**63) <= priority < 2**63:
        raise bad_request(f"priority={priority} must fit in 64 bits", param="priority")
    return priority


async def constrained(
    bridge: Bridge, params: SamplingParams, constraint: Constraint | None
) -> SamplingParams:
    """``params`` with the constraint, grammar compiled. Raises ApiError 400 naming its field."""
    if constraint is None:
        return params
    try:
        params = replace(params, structured_outputs=constraint.wanted)
        await bridge.prepare(params)
    except UsageError as exc:
        raise constraint.error(exc) from exc
    return params


def usage_of(outputs: Sequence[RequestOutput]) -> Usage:
    """Tokens of finished prompts."""
    return counted(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(one.token_ids) for output in outputs for one in output.outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


def counted(prompt_tokens: int, completion_tokens: int, cached: int | None = None) -> Usage:
    """A Usage; ``cached`` is None while it is not known."""
    usage = Usage(
        prompt_tokens=prompt_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        completion_tokens=completion_tokens,
    )
    if cached is not None:
        usage.prompt_tokens_details = PromptTokensDetails(cached)
    return usage
