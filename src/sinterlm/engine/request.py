"""Request: one sequence on its way through the engine, and RequestGroup: the n of one prompt.

Nouns only; the scheduler moves ``num_computed``, ``pages`` and ``status``, the engine the rest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from sinterlm.engine.outputs import FinishReason, RequestMetrics, TokenLogprobs
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.text_stream import TextStream
from sinterlm.runtime.batch import Int32, RowSampling


class Status(enum.Enum):
    """Where a request stands. WAITING -> RUNNING -> FINISHED, and back to WAITING if preempted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class TokenBuffer:
    """Prompt and drawn tokens in one growing int32 array, so that histories are views."""

    __slots__ = ("_data", "num_prompt", "num_tokens")

    def __init__(self, prompt: Int32, expected_new: int) -> None:
        self._data = np.empty(len(prompt) + min(expected_new, 256), np.int32)
        self._data[: len(prompt)] = prompt
        self.num_prompt = self.num_tokens = len(prompt)

    def append(self, token_id: int) -> None:
        """Add one drawn token."""
        if self.num_tokens == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self.num_tokens] = token_id
        self.num_tokens += 1

    def __getitem__(self, index: int) -> int:
        return int(self._data[index])

    def slice(self, start: int, stop: int) -> Int32:
        """View of tokens [start, stop)."""
        return self._data[start:stop]

    @property
    def prompt(self) -> Int32:
        """View of the prompt."""
        return self._data[: self.num_prompt]

    @property
    def output(self) -> Int32:
        """View of the drawn tokens."""
        return self._data[self.num_prompt : self.num_tokens]


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: what to compute, how far it got, and what it holds."""

    group: RequestGroup
    index: int  #: completion index within the group
    arrival: int  #: position in the order of arrival; the scheduler's only priority
    tokens: TokenBuffer
    max_total_tokens: int  #: prompt and output together may not exceed this
    row: RowSampling  #: reused every step; its position is moved before each
    row_after_min_tokens: RowSampling | None  #: takes over from ``row`` once min_tokens is reached
    stop_token_ids: frozenset[int]  #: eos ids included, unless ignored
    text: TextStream | None  #: None without a tokenizer or with detokenize=False
    status: Status = Status.WAITING
    num_computed: int = 0  #: tokens whose KV is in the cache
    pages: list[int] = field(default_factory=list)
    slot: int = -1  #: row of the page-table array while running
    table_filled: int = 0  #: pages already copied into that row
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and drawn tokens."""
        return self.tokens.num_tokens

    @property
    def num_output(self) -> int:
        """Drawn tokens."""
        return self.tokens.num_tokens - self.tokens.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is missing; exactly 1 while decoding."""
        return self.tokens.num_tokens - self.num_computed


@dataclass(slots=True, eq=False)
class RequestGroup:
    """What the caller submitted: one prompt, its parameters, and its n sequences."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    arrival_time: float  #: seconds of time.perf_counter
    requests: list[Request] = field(default_factory=list)
    first_token_time: float | None = None
    stream: bool = False  #: whether deltas carry text as it appears

    @property
    def is_finished(self) -> bool:
        """Whether all n sequences are done."""
        return all(r.status is Status.FINISHED for r in self.requests)

    def metrics(self, finished_time: float) -> RequestMetrics:
        """The group's time stamps."""
        return RequestMetrics(self.arrival_time, self.first_token_time, finished_time)
