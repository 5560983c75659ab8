"""What a request gives back: deltas while it runs, one ``RequestOutput`` when it is done.

Shaped like vLLM's. Plain data; nothing here computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: "error": the sequence could not be carried on, and ``stop_reason`` says why
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability (nats, from the raw logits) among the whole vocabulary."""

    logprob: float
    rank: int  #: 1 = the most likely
    decoded_token: str | None  #: None without a tokenizer


#: Per drawn token: the drawn token first, then the n best, each token id once.
TokenLogprobs = dict[int, Logprob]

#: Per prompt token: itself first, then the n best. Nothing comes before the first: None.
PromptLogprobs = list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completed sequence of a request."""

    index: int  #: 0 … n-1
    text: str  #: empty without a tokenizer
    token_ids: tuple[int, ...]  #: drawn tokens, the one that stopped it included
    logprobs: list[TokenLogprobs] | None  #: None unless asked for
    cumulative_logprob: float | None  #: sum over token_ids; None unless logprobs were asked for
    finish_reason: FinishReason
    #: The stop token id or stop string, "deadline", or what the error is; None for eos and length
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds of ``time.perf_counter``."""

    arrival_time: float
    scheduled_time: float | None  #: None when aborted while it waited
    first_token_time: float | None  #: None when aborted before its first token
    finished_time: float

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until it was taken up."""
        return None if self.scheduled_time is None else self.scheduled_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request with its ``n`` completions in index order."""

    request_id: str
    prompt: str | None  #: None when the prompt was given as token ids
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: PromptLogprobs | None = None  #: None unless asked for
    num_cached_tokens: int = 0  #: prompt tokens found in the prefix cache
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence of one request."""

    request_id: str
    index: int
    text: str  #: new text; may be empty while a character or a stop string is incomplete
    token_ids: tuple[int, ...]  #: the token this step drew
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    #: On the first delta of sequence 0, if asked for
    prompt_logprobs: PromptLogprobs | None = None
    output: RequestOutput | None = None  #: the whole request, on its very last delta
