"""The door of the engine: a prompt and its parameters become a RequestGroup, or an error.

Refuses prompts that are empty, too long or hold unknown tokens, and parameters that this model
cannot honour. Nothing is truncated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sinterlm.engine.bad_words import BadWords, read_bad_words
from sinterlm.engine.booking import keep_drawable
from sinterlm.engine.constraints import Grammars
from sinterlm.engine.prefix import root_digest
from sinterlm.engine.request import Request, RequestGroup, TokenBuffer
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.text_stream import CONTEXT_TOKENS, TextStream
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import PromptError, UsageError
from sinterlm.runtime.batch import Int32, RowSampling, UInt32, token_mask

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is checked against."""

    max_model_len: int  #: most tokens of prompt and output together
    vocab_size: int


def checked_tokens(token_ids: Iterable[int], limits: Limits, *, room_for: int) -> Int32:
    """Token ids as int32 [len], not empty, each in [0, vocab_size), with room for ``room_for``
    more within ``max_model_len``. Raises PromptError with the offending number otherwise.
    """
    try:
        given = token_ids if isinstance(token_ids, np.ndarray) else list(token_ids)
        ids = np.asarray(given)
    except (TypeError, ValueError) as exc:
        raise PromptError(f"a prompt must be a list of token ids: {exc}") from exc
    if ids.size == 0:
        raise PromptError("the prompt is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise PromptError("a prompt must be a flat list of integer token ids")
    if len(ids) + room_for > limits.max_model_len:
        new = f" and {room_for} to generate" if room_for else ""
        raise PromptError(
            f"the prompt has {len(ids)} tokens{new}, and max_model_len is {limits.max_model_len}; "
            "shorten the prompt, or load the model with a larger max_model_len if it has one"
        )
    bad = np.flatnonzero((ids < 0) | (ids >= limits.vocab_size))
    if len(bad):
        raise PromptError(
            f"prompt token {int(ids[bad[0]])} at index {int(bad[0])} is out of range: token ids "
            f"of this model are 0 … {limits.vocab_size - 1}"
        )
    return ids.astype(np.int32)


def make_group(
    request_id: str,
    prompt: str | None,
    prompt_token_ids: Iterable[int],
    params: SamplingParams,
    *,
    limits: Limits,
    tokenizer: Tokenizer,
    engine_seed: int,
    first_arrival: int,
    stream: bool,
    priority: int,
    deadline: float | None,
    cache_salt: str | None,
) -> RequestGroup:
    """The group of one submitted prompt. Raises PromptError and UsageError."""
    _check_place(priority, deadline, cache_salt)
    tokens = checked_tokens(prompt_token_ids, limits, room_for=1)
    params.check_vocabulary(limits.vocab_size)
    if params.stop_strings and not tokenizer.has_vocabulary:
        raise UsageError(f"stop={params.stop!r} needs a tokenizer, and this model has none")
    if params.min_tokens > limits.max_model_len - len(tokens):
        raise UsageError(
            f"min_tokens={params.min_tokens} does not fit behind a prompt of {len(tokens)} tokens: "
            f"max_model_len is {limits.max_model_len}"
        )
    group = RequestGroup(
        request_id,
        prompt,
        params,
        time.perf_counter(),
        root_digest(cache_salt),
        priority=priority,
        deadline=deadline,
        stream=stream,
    )
    ending = frozenset(params.stop_ids) | _eos(params, tokenizer, limits)
    bad_words = read_bad_words(params.bad_texts, tokenizer, limits.vocab_size)
    bias = _bias(params, bad_words)
    _check_drawable(params, ending, bad_words, limits.vocab_size)
    room = limits.max_model_len - len(tokens)
    allowed = None
    if params.allowed_ids is not None:
        allowed = token_mask(params.allowed_ids, limits.vocab_size)
    num_new = room if params.max_tokens is None else min(params.max_tokens, room)
    for index in range(params.n):
        seed = _seed(params.seed, index, engine_seed, first_arrival + index)
        buffer = TokenBuffer(tokens, num_new)
        row, row_after_min_tokens = _rows(params, tokens, seed, ending, bias, allowed)
        group.requests.append(
            Request(
                group=group,
                index=index,
                arrival=first_arrival + index,
                tokens=buffer,
                max_total_tokens=len(tokens) + num_new,
                row=row,
                row_after_min_tokens=row_after_min_tokens,
                stop_token_ids=ending,
                bad_words=bad_words if bad_words is not None and bad_words.changes else None,
                text=_text_stream(params, tokenizer, tokens, stream),
                logprobs=None if params.logprobs is None else [],
                # The prompt is the same for all n: one of them tells.
                prompt_logprobs=[None]
                if params.prompt_logprobs is not None and not index
                else None,
            )
        )
    return group


def constrain(group: RequestGroup, grammars: Grammars) -> None:
    """Give every sequence of a group its constraint, if one was asked for.

    Raises UsageError for a schema, regex or grammar that cannot be used.
    """
    wanted = group.params.structured_outputs
    if wanted is None:
        return
    for request in group.requests:
        constraint = grammars.constraint(
            wanted, ignore_eos=group.params.ignore_eos, kept=request.row.allowed
        )
        request.constraint = constraint
        for row in (request.row, request.row_after_min_tokens):
            if row is not None:
                row.allowed = constraint.mask
        keep_drawable(request)


def _check_place(priority: object, deadline: object, cache_salt: object) -> None:
    """Refuse a priority, deadline or salt that is none."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise UsageError(f"priority={priority!r} must be an integer; lower runs earlier")
    if deadline is not None and (
        isinstance(deadline, bool) or not isinstance(deadline, int | float) or math.isnan(deadline)
    ):
        raise UsageError(f"deadline={deadline!r} must be a number of seconds")
    if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
        raise UsageError(f"cache_salt={cache_salt!r} must be a text that is not empty")


def _eos(params: SamplingParams, tokenizer: Tokenizer, limits: Limits) -> frozenset[int]:
    if params.ignore_eos:
        return frozenset()
    return frozenset(i for i in tokenizer.eos_token_ids if 0 <= i < limits.vocab_size)


def _bias(params: SamplingParams, bad_words: BadWords | None) -> dict[int, float]:
    """What is added to logits at every place."""
    always = () if bad_words is None else bad_words.always
    return dict(params.logit_bias or {}) | dict.fromkeys(sorted(always), -math.inf)


def _check_drawable(
    params: SamplingParams, ending: frozenset[int], bad_words: BadWords | None, vocab_size: int
) -> None:
    """Refuse what may, with what min_tokens bars, leave nothing to draw at some place."""
    barred = {i for i, bias in (params.logit_bias or {}).items() if bias == -math.inf}
    if bad_words is not None:
        barred |= bad_words.sometimes
    early = barred | (ending if params.min_tokens else set())
    if params.allowed_ids is not None:
        # Under a grammar min_tokens yields where only what it bars could be drawn.
        gone = barred if params.structured_outputs is not None else early
        if gone.issuperset(params.allowed_ids):
            raise UsageError(
                "allowed_token_ids has no token that logit_bias, bad_words and min_tokens leave",
                field="allowed_token_ids",
            )
    elif barred and len(early) >= vocab_size:
        raise UsageError(
            f"logit_bias and bad_words forbid all {vocab_size} tokens that could be drawn"
        )


def _text_stream(
    params: SamplingParams, tokenizer: Tokenizer, tokens: Int32, stream: bool
) -> TextStream | None:
    if not params.detokenize or not tokenizer.has_vocabulary:
        return None
    return TextStream(
        tokenizer.decode_function(skip_special_tokens=params.skip_special_tokens),
        tokens[-CONTEXT_TOKENS:].tolist(),
        params.stop_strings,
        include_stop=params.include_stop_str_in_output,
        eager=stream,
    )


def _rows(
    params: SamplingParams,
    prompt: Int32,
    seed: int,
    ending: frozenset[int],
    bias: dict[int, float],
    allowed: UInt32 | None,
) -> tuple[RowSampling, RowSampling | None]:
    """How the first token is drawn, and, if min_tokens bars ending tokens at first, how later."""
    row = _row(params, prompt, seed, bias)
    row.allowed = allowed
    row.stop_tokens = np.array(sorted(ending), np.int32)
    if params.min_tokens == 0 or not ending:
        return row, None
    barred = bias | dict.fromkeys(sorted(ending), -math.inf)
    early = _row(params, prompt, seed, barred)
    early.allowed = allowed
    return early, row


def _row(params: SamplingParams, prompt: Int32, seed: int, bias: dict[int, float]) -> RowSampling:
    row = RowSampling(
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        top_k=max(0, params.top_k),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        seed=seed,
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
    )
    if params.has_penalties:
        row.prompt_tokens = prompt
    if bias:
        row.bias_ids = np.array(list(bias), np.int32)
        row.bias = np.array(list(bias.values()), np.float32)
    return row


def _seed(given: int | None, index: int, engine_seed: int, arrival: int) -> int:
    """64 bits: the request's own seed for its first sequence, else mixed so that no two agree."""
    if given is not None:
        return given if index == 0 else _mix(_mix(given) + index)
    return _mix(_mix(engine_seed) + arrival)


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
