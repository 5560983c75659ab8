"""What a load is made of: requests, when they are sent, and how many at a time.

Arrivals are vLLM's (``vllm/benchmarks/serve.py``, 0.32): the same seed gives the same times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sinterlm.errors import UsageError


@dataclass(frozen=True)
class Request:
    """One request as a dataset made it."""

    request_id: str
    prompt: str
    prompt_len: int  #: tokens, as the client's tokenizer counts them
    output_len: int  #: tokens asked for
    token_ids: tuple[int, ...] | None = None  #: of the prompt, where they are sent instead of text
    at_s: float | None = None  #: seconds after the start, where a trace says so
    #: Requests of one conversation are sent one after another, each with what was said before.
    conversation: int | None = None


@dataclass(frozen=True)
class Ramp:
    """A request rate that grows over the run."""

    strategy: Literal["linear", "exponential"]
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_rps <= self.end_rps or self.end_rps == 0:
            raise UsageError(
                f"a ramp from {self.start_rps:g} to {self.end_rps:g} requests/s does not rise; "
                "give --ramp-up-start-rps at most --ramp-up-end-rps, and both from 0 up"
            )
        if self.strategy == "exponential" and self.start_rps == 0:
            raise UsageError("an exponential ramp cannot start at 0; give --ramp-up-start-rps 1")

    def rate(self, progress: float) -> float:
        """Requests/s after a share ``progress`` (0 to 1) of all requests."""
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return self.start_rps * math.pow(self.end_rps / self.start_rps, progress)


@dataclass(frozen=True)
class Load:
    """How requests are sent. Infinite rate = all at once, ``max_concurrency`` of them in flight
    (closed loop); a finite rate sends each at its time whatever was answered (open loop)."""

    request_rate: float = math.inf  #: requests/s
    burstiness: float = 1.0  #: shape of the gamma distribution; 1 = Poisson arrivals
    max_concurrency: int | None = None  #: requests in flight, None = no limit
    num_warmups: int = 0  #: requests sent and forgotten before the run
    ramp: Ramp | None = None
    use_trace_times: bool = False  #: send each request at its ``at_s``
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise UsageError(f"--request-rate {self.request_rate:g} must be above 0, or inf")
        if not self.burstiness > 0:
            raise UsageError(f"--burstiness {self.burstiness:g} must be above 0")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise UsageError(f"--max-concurrency {self.max_concurrency} must be 1 or more")
        if self.num_warmups < 0:
            raise UsageError(f"--num-warmups {self.num_warmups} must be 0 or more")
        if self.ramp is not None and math.isfinite(self.request_rate):
            raise UsageError("--ramp-up-strategy sets the rate itself; leave --request-rate out")

    @property
    def is_open_loop(self) -> bool:
        """Whether arrivals follow a clock of their own."""
        return self.use_trace_times or self.ramp is not None or math.isfinite(self.request_rate)


def arrival_times(requests: Sequence[Request], load: Load) -> list[float]:
    """Seconds after the start at which each request arrives, never falling.

    Gaps are gamma distributed with shape ``burstiness`` and mean 1/rate; without a ramp they are
    scaled so that the last request arrives after N/rate seconds.
    """
    if load.use_trace_times:
        return [request.at_s or 0.0 for request in requests]
    if not load.is_open_loop:
        return [0.0] * len(requests)
    # The legacy generator, because vLLM seeds and uses NumPy's global one.
    generator = np.random.RandomState(load.seed)
    times: list[float] = []
    now = 0.0
    for index in range(len(requests)):
        now += _gap(generator, load, index / max(len(requests) - 1, 1))
        times.append(now)
    if load.ramp is None and now > 0:
        scale = len(requests) / load.request_rate / now
        times = [time * scale for time in times]
    return times


def _gap(generator: np.random.RandomState, load: Load, progress: float) -> float:
    rate = load.request_rate if load.ramp is None else load.ramp.rate(progress)
    if rate <= 0:
        raise UsageError("a linear ramp from 0 never sends its first request; start above 0")
    if math.isinf(load.burstiness):
        return 1.0 / rate
    return float(generator.gamma(shape=load.burstiness, scale=1.0 / (rate * load.burstiness)))


def conversations(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests that one user sends in turn: a list of one for a lone request."""
    groups: list[list[int]] = []
    of_conversation: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        key = request.conversation
        if key is not None and key in of_conversation:
            of_conversation[key].append(index)
            continue
        groups.append([index])
        if key is not None:
            of_conversation[key] = groups[-1]
    return groups
