"""What ``sinterlm bench serve`` shows. "no data" stands where nothing was measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sinterlm.commands.ui import print_table

if TYPE_CHECKING:
    from sinterlm.bench.raw import RawRun
    from sinterlm.bench.serve_stats import ServeStats

_TITLES = {
    "ttft": "TTFT: time to first token",
    "tpot": "TPOT: time per output token after the first",
    "itl": "ITL: between chunks",
    "e2el": "E2EL: end to end",
    "client_queue_time": "waiting in this client",
    "e2el_including_client_queue": "E2EL with that wait",
}

#: A client that takes more of a CPU than this may be what is measured.
_BUSY = 0.9


def print_serve(raw: RawRun, stats: ServeStats, metrics: Sequence[str]) -> None:
    """Two tables on stdout, warnings on stderr."""
    rows: list[tuple[str, str]] = [
        ("successful requests", str(stats.completed)),
        ("failed requests", str(stats.failed)),
        ("duration s", f"{stats.duration_s:.2f}"),
        ("input tokens", str(stats.total_input_tokens)),
        ("output tokens", str(stats.total_output_tokens)),
        ("requests/s", f"{stats.request_throughput:.2f}"),
        ("output tokens/s", f"{stats.output_throughput:.2f}"),
        ("total tokens/s", f"{stats.total_token_throughput:.2f}"),
        ("most chunks in one second", _number(stats.max_output_tokens_per_s, ".0f")),
        ("client CPU", f"{stats.client_cpu:.0%} of one"),
    ]
    if stats.request_goodput is not None:
        rows.append(("requests/s that meet the goals", f"{stats.request_goodput:.2f}"))
    if stats.window is not None:
        rate = _number(stats.window.output_throughput, ".2f")
        rows.append(("output tokens/s in the steady state", rate))
    print_table(raw.run.facts.get("url", "serving"), ["", ""], rows, (1,))
    shown = [name for name in stats.spreads if name in metrics or name not in _TITLES]
    shown += [
        n for n in ("client_queue_time", "e2el_including_client_queue") if stats.spreads.get(n)
    ]
    percentiles = next((list(s.percentiles) for s in stats.spreads.values() if s), [])
    columns = ["milliseconds", "mean", "median", "std", *(f"P{p:g}" for p in percentiles), "max"]
    print_table("latency", columns, [_row(stats, name, percentiles) for name in shown],
                range(1, len(columns)))  # fmt: skip
    for line in warnings_of(raw, stats):
        print(f"sinterlm: warning: {line}", file=sys.stderr)


def _row(stats: ServeStats, name: str, percentiles: Sequence[float]) -> tuple[str, ...]:
    spread = stats.spreads[name]
    title = _TITLES.get(name, name)
    if spread is None:
        return (title, *["no data"] * (len(percentiles) + 4))
    values = (spread.mean, spread.median, spread.std,
              *(spread.percentiles[p] for p in percentiles), spread.maximum)  # fmt: skip
    return (title, *(f"{value:.2f}" for value in values))


def warnings_of(raw: RawRun, stats: ServeStats) -> list[str]:
    """What a reader must know before believing the figures."""
    lines = []
    if stats.failed:
        first = next(r.error for r in raw.requests if not r.is_success)
        lines.append(f"{stats.failed} requests failed and are in no figure; the first: {first}")
    if stats.short_outputs:
        lines.append(f"{stats.short_outputs} outputs are shorter than asked for")
    if stats.chunks_per_token is not None and abs(stats.chunks_per_token - 1) > 0.05:
        lines.append(
            f"{1 / stats.chunks_per_token:.2f} tokens per chunk: ITL is per chunk, TPOT per token"
        )
    if stats.client_cpu > _BUSY:
        lines.append(f"this client used {stats.client_cpu:.0%} of a CPU: it may be what is slow")
    jump = raw.run.clock_jump_s
    if jump is not None:
        lines.append(
            f"the system's clock was set by {jump:+.1f} s during the run; the figures do not use it"
        )
    return lines


def _number(value: float | None, spec: str) -> str:
    return "no data" if value is None else format(value, spec)
