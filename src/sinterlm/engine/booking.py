"""What a step's results mean for one sequence: its log-probabilities, its text, whether it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sinterlm.engine.outputs import CompletionOutput, FinishReason, Logprob, TokenLogprobs
from sinterlm.engine.request import Request
from sinterlm.engine.schedule import Chunk
from sinterlm.runtime.batch import StepResult

#: A token's own text; None without a tokenizer.
TokenText = Callable[[int], str | None]


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence is complete."""

    reason: FinishReason
    stop_reason: int | str | None = None


def book_logprobs(
    request: Request, result: StepResult, row: int, text: TokenText
) -> TokenLogprobs | None:
    """Note the log-probabilities of the token drawn in ``row``, if they were asked for."""
    if request.logprobs is None:
        return None
    entry = _entry(result, row, request.row.num_logprobs, text)
    request.logprobs.append(entry)
    request.cumulative_logprob += float(result.logprobs[row])
    return entry


def book_prompt_logprobs(chunk: Chunk, result: StepResult, first_row: int, text: TokenText) -> None:
    """Note those of the prompt tokens that the chunk's first rows tell."""
    scores, wanted = chunk.request.prompt_logprobs, chunk.request.group.params.prompt_logprobs
    if scores is not None and wanted is not None:
        rows = range(first_row, first_row + len(chunk.scored))
        scores += [_entry(result, row, wanted, text) for row in rows]


def _entry(result: StepResult, row: int, num_best: int, text: TokenText) -> TokenLogprobs:
    token_id = int(result.tokens[row])
    own = Logprob(float(result.logprobs[row]), int(result.ranks[row]), text(token_id))
    entry = {token_id: own}
    for i in range(num_best):
        other = int(result.top_ids[row, i])
        if other not in entry:
            entry[other] = Logprob(float(result.top_logprobs[row, i]), i + 1, text(other))
    return entry


def book_token(request: Request, token_id: int) -> Ending | None:
    """Add one drawn token to its sequence; how that ends it, if it does."""
    request.tokens.append(token_id)
    params = request.group.params
    may_stop = request.num_output >= params.min_tokens
    if may_stop:
        request.skip_min_tokens()
    if token_id in request.stop_token_ids:
        if request.text is not None and params.include_stop_str_in_output:
            request.text.push(token_id, may_stop=False)
        # Only a token the caller named is worth reporting; eos is the ordinary end.
        return Ending("stop", token_id if token_id in params.stop_ids else None)
    if request.text is not None:
        stop = request.text.push(token_id, may_stop=may_stop)
        if stop is not None:
            return Ending("stop", stop)
    if request.constraint is not None and request.constraint.advance(token_id):
        failure = request.constraint.failure
        return Ending("stop") if failure is None else Ending("error", failure)
    if request.num_tokens >= request.max_total_tokens:
        return Ending("length")
    keep_drawable(request)
    return None


def keep_drawable(request: Request) -> None:
    """Give min_tokens up where the grammar allows nothing but what it bars."""
    if request.row_after_min_tokens is None or request.constraint is None:
        return
    if not request.constraint.allows_beside(request.stop_token_ids):
        request.skip_min_tokens()


def completion(request: Request) -> CompletionOutput:
    """What a finished sequence came to."""
    assert request.finish_reason is not None
    return CompletionOutput(
        index=request.index,
        text="" if request.text is None else request.text.text,
        token_ids=tuple(request.tokens.output.tolist()),
        logprobs=request.logprobs,
        cumulative_logprob=None if request.logprobs is None else request.cumulative_logprob,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
