"""Request: one sequence on its way through the engine, and RequestGroup: the n of one prompt.

Nouns only; the scheduler moves ``num_computed``, ``pages`` and ``status``, the engine the rest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sinterlm.engine.bad_words import BadWords
from sinterlm.engine.outputs import (
    FinishReason,
    PromptLogprobs,
    RequestMetrics,
    TokenLogprobs,
)
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.text_stream import TextStream
from sinterlm.runtime.batch import Int32, RowSampling

if TYPE_CHECKING:
    from sinterlm.engine.constraints import Constraint


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

    def stage(self, drafts: Int32) -> None:
        """Put guesses behind the last token, where ``slice`` sees them; ``append`` overwrites."""
        end = self.num_tokens + len(drafts)
        if end > len(self._data):
            more = np.empty(max(len(self._data), len(drafts)), np.int32)
            self._data = np.concatenate([self._data, more])
        self._data[self.num_tokens : end] = drafts

    @property
    def known(self) -> Int32:
        """View of prompt and drawn tokens."""
        return self._data[: self.num_tokens]

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
    arrival: int  #: position in the order of arrival
    tokens: TokenBuffer
    max_total_tokens: int  #: prompt and output together may not exceed this
    row: RowSampling  #: reused every step; its position is moved before each
    row_after_min_tokens: RowSampling | None  #: takes over from ``row`` once min_tokens is reached
    stop_token_ids: frozenset[int]  #: eos ids included, unless ignored
    text: TextStream | None  #: None without a tokenizer or with detokenize=False
    bad_words: BadWords | None = None  #: None where all of them are barred by the rows already
    constraint: Constraint | None = None  #: its mask, which changes, is both rows' ``allowed``
    status: Status = Status.WAITING
    num_computed: int = 0  #: tokens whose KV is in the cache
    pages: list[int] = field(default_factory=list)
    page_digests: list[bytes] = field(default_factory=list)  #: names of its full pages, so far
    num_named: int = 0  #: pages that the prefix cache knows or was told of
    num_cached: int = 0  #: prompt tokens found in the prefix cache when it first started
    slot: int = -1  #: row of the page-table array while running
    table_filled: int = 0  #: pages already copied into that row
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] | None = None
    #: One per prompt token computed so far, the first None; None unless asked for
    prompt_logprobs: PromptLogprobs | None = None
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

    @property
    def unscored(self) -> range:
        """Positions whose logits must still tell the logprob of the prompt token behind them."""
        if self.prompt_logprobs is None:
            return range(0)
        return range(len(self.prompt_logprobs) - 1, self.tokens.num_prompt - 1)

    def skip_min_tokens(self) -> None:
        """Let the sequence end from now on."""
        if self.row_after_min_tokens is not None:
            self.row, self.row_after_min_tokens = self.row_after_min_tokens, None

    @property
    def can_draft(self) -> bool:
        """Whether guesses may be checked: every row is then drawn by the same rules."""
        return self.row_after_min_tokens is None and self.constraint is None

    @property
    def can_repeat(self) -> bool:
        """Whether several tokens may be drawn before Python sees one: nothing but a stop token ends
        it, and every row is drawn by rules that hold still."""
        watched = self.text is not None and self.text.may_stop
        changing = self.group.params.has_penalties or self.bad_words is not None
        return not watched and not changing and self.can_draft

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower priority values, then earlier arrivals."""
        return self.group.priority, self.arrival


@dataclass(slots=True, eq=False)
class RequestGroup:
    """What the caller submitted: one prompt, its parameters, and its n sequences."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    arrival_time: float  #: seconds of time.perf_counter
    cache_root: bytes  #: where the names of its pages start from
    priority: int = 0  #: lower runs earlier
    deadline: float | None = None  #: seconds of time.perf_counter
    requests: list[Request] = field(default_factory=list)
    scheduled_time: float | None = None  #: when a step first took it up
    first_token_time: float | None = None
    stream: bool = False  #: whether deltas carry text as it appears

    @property
    def is_finished(self) -> bool:
        """Whether all n sequences are done."""
        return all(r.status is Status.FINISHED for r in self.requests)

    def begin(self, now: float) -> None:
        """A step takes it up, at ``now``; only the first time counts."""
        if self.scheduled_time is None:
            self.scheduled_time = now

    def metrics(self, finished_time: float) -> RequestMetrics:
        """The group's time stamps."""
        return RequestMetrics(
            self.arrival_time, self.scheduled_time, self.first_token_time, finished_time
        )
