"""The raw record of a load: what was sent and the time of every chunk that came back, as JSONL.

The first line tells the run, each further one a request. Times are seconds of one monotonic clock,
counted from the first dispatch. Statistics are made from this alone, now or later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sinterlm.artifact.storage import disk_errors
from sinterlm.errors import UsageError

FORMAT = 1

#: A wall clock that differs from the monotonic one by more than this was set during the run.
CLOCK_SLACK_S = 1.0


@dataclass(frozen=True)
class RunRecord:
    """The run: what decides its statistics, and what a reader wants to know of it."""

    duration_s: float  #: from just before the first dispatch to the end of the last request
    wall_s: float  #: the same by the system's clock, which somebody may set
    client_cpu_s: float  #: CPU seconds of this process during ``duration_s``
    started_at: str  #: date and time, UTC
    max_concurrency: int | None
    request_rate: float | None  #: None = all at once
    #: The monotonic clock when the run began: other processes of the machine share it.
    zero_s: float = 0.0
    is_complete: bool = True  #: False when it was interrupted
    facts: dict[str, Any] = field(default_factory=dict)  #: command, model, machine, versions
    format: int = FORMAT

    @property
    def clock_jump_s(self) -> float | None:
        """By how much the system's clock was set during the run; None if it was not."""
        jump = self.wall_s - self.duration_s
        return jump if abs(jump) > CLOCK_SLACK_S + 0.01 * self.duration_s else None


@dataclass(frozen=True)
class RequestRecord:
    """One request."""

    index: int
    request_id: str
    prompt_len: int  #: tokens; the server's own count where it gave one
    asked_len: int  #: tokens asked for
    arrival_s: float  #: handed to the client's queue
    start_s: float  #: just before the POST
    events_s: tuple[float, ...] = ()  #: since start_s, of each chunk that has choices
    usage_tokens: int | None = None  #: completion_tokens by the server
    told_tokens: int | None = None  #: the same, also where it stood beside choices
    text_tokens: int | None = None  #: of the text by our tokenizer, where the server does not count
    finish_reason: str | None = None
    status: int | None = None  #: of HTTP
    error: str | None = None  #: why it failed
    text: str = ""

    @property
    def is_success(self) -> bool:
        """HTTP 200, at least one counted chunk, and no error on the way."""
        return self.error is None and bool(self.events_s)

    @property
    def output_len(self) -> int:
        """Tokens received: the server's count, else of the text, else 1; 0 for a failure."""
        if not self.is_success:
            return 0
        return self.usage_tokens or (1 if self.text_tokens is None else self.text_tokens)

    def as_told(self) -> RequestRecord:
        """With the server's count wherever it stood: llama-server puts it beside the last choice,
        where vLLM's client does not look, and text cannot be counted back to the tokens drawn."""
        return self if self.usage_tokens else replace(self, usage_tokens=self.told_tokens)

    @property
    def ttft_s(self) -> float:
        """To the first chunk."""
        return self.events_s[0]

    @property
    def latency_s(self) -> float:
        """To the last chunk (E2EL)."""
        return self.events_s[-1]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        count = self.output_len
        return (self.latency_s - self.ttft_s) / (count - 1) if count > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Between successive chunks (ITL)."""
        return [b - a for a, b in zip(self.events_s, self.events_s[1:], strict=False)]

    @property
    def end_s(self) -> float:
        """Of the last chunk, since the start of the run."""
        return self.start_s + self.latency_s


@dataclass(frozen=True)
class RawRun:
    """Everything a run left behind."""

    run: RunRecord
    requests: tuple[RequestRecord, ...]


def write_raw(path: Path, raw: RawRun) -> None:
    """Write ``raw`` as JSONL, whole or not at all. Raises ResourceError on a full disk."""
    lines = [asdict(raw.run), *(asdict(request) for request in raw.requests)]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """``text`` at ``path``, which until then keeps what it had. Raises ResourceError, BundleError
    as ``disk_errors`` does."""
    with disk_errors(path.parent, "write the results elsewhere"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_raw(path: Path) -> RawRun:
    """Inverse of ``write_raw``. Raises UsageError for anything else, and for times that fall."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        data = [json.loads(line) for line in lines if line.strip()]
        run = _build(RunRecord, data[0])
        requests = tuple(_build(RequestRecord, _as_tuple(line)) for line in data[1:])
    except (ValueError, TypeError, KeyError, IndexError) as exc:
        raise UsageError(f"{path} is not a raw record of `sinterlm bench serve` ({exc})") from exc
    if run.format != FORMAT:
        raise UsageError(f"{path} has format {run.format}; this version reads {FORMAT}")
    check_times(requests, str(path))
    return RawRun(run, requests)


def check_times(requests: Iterable[RequestRecord], what: str) -> None:
    """Raises UsageError where a request's chunks go back in time."""
    for request in requests:
        if any(gap < 0 for gap in [*request.events_s[:1], *request.gaps_s]):
            raise UsageError(
                f"{what}: the clock goes backwards within request {request.request_id}; "
                "no statistic of this record can be trusted"
            )


_Record = TypeVar("_Record", RunRecord, RequestRecord)


def _build(cls: type[_Record], data: dict[str, Any]) -> _Record:
    unknown = set(data) - {one.name for one in fields(cls)}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    return cls(**data)


def _as_tuple(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "events_s": tuple(float(time) for time in line["events_s"])}
