"""The six figures of the published comparison, from our own measurements, and theirs apart.

Drawn by matplotlib without a display. Raises UsageError where it is not installed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinterlm.bench.published import SOURCE, TITLES, published_rows
from sinterlm.bench.report.data import ReportData
from sinterlm.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALL = 8  #: largest batch size of the figure of small ones
_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Drawing:
    """One figure, ready to be written."""

    name: str  #: of its files
    title: str
    figure: Figure

    def svg(self) -> str:
        """As SVG, to stand inside a page."""
        text = io.StringIO()
        self.figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        whole = text.getvalue()
        return whole[whole.index("<svg") :]

    def write(self, folder: Path) -> None:
        """``NAME.svg`` and ``NAME.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(folder / f"{self.name}.svg", bbox_inches="tight",
                            metadata={"Date": None})  # fmt: skip
        self.figure.savefig(folder / f"{self.name}.png", dpi=150, bbox_inches="tight")


def all_drawings(data: ReportData) -> list[Drawing]:
    """Six of ours (fewer for offline runs) and the published one."""
    drawings = []
    serve = data.plan.mode == "serve"
    if serve:
        drawings.append(_lines(data, "requests", "Requests/s by batch size", "requests/s",
                               "request_throughput"))  # fmt: skip
        drawings.append(_lines(data, "ttft", "TTFT by batch size", "mean TTFT, ms", "mean_ttft_ms",
                               log=True))  # fmt: skip
        drawings.append(_lines(data, "e2el", "End-to-end latency by batch size",
                               "mean E2EL, ms", "mean_e2el_ms", log=True))  # fmt: skip
        drawings.append(_small_batches(data))
    drawings.append(_lines(data, "total", "Total token throughput by batch size",
                           "tokens/s, input and output", "total_token_throughput"))  # fmt: skip
    if serve:
        drawings.append(_tails(data))
    return [*drawings, _published()]


def _lines(
    data: ReportData, name: str, title: str, label: str, metric: str, *, log: bool = False
) -> Drawing:
    """One line per engine, with the interval over rounds."""
    figure, axes = _axes(title, "batch size (requests in flight)", label)
    for number, arm in enumerate(data.arms):
        points = [(size, data.estimate(arm, size, metric)) for size in data.sizes(arm)]
        have = [(size, one) for size, one in points if one is not None]
        values = [one.value for _, one in have]
        below = [
            v - one.interval[0] if one.interval else 0
            for v, (_, one) in zip(values, have, strict=True)
        ]
        above = [
            one.interval[1] - v if one.interval else 0
            for v, (_, one) in zip(values, have, strict=True)
        ]
        axes.errorbar([size for size, _ in have], values, yerr=[below, above], label=arm,
                      marker=_MARKERS[number % len(_MARKERS)], capsize=3)  # fmt: skip
    _batch_axis(axes, data.plan.batch_sizes)
    if log:
        _log_axis(axes)
    return _finished(name, title, figure, axes)


def _small_batches(data: ReportData) -> Drawing:
    """Requests/s against end-to-end latency, batch sizes 1 to 8."""
    title = f"Requests/s against end-to-end latency, batch sizes up to {_SMALL}"
    figure, axes = _axes(title, "mean E2EL, ms", "requests/s")
    for number, arm in enumerate(data.arms):
        xs, ys, names = [], [], []
        for size in data.sizes(arm):
            x = data.estimate(arm, size, "mean_e2el_ms")
            y = data.estimate(arm, size, "request_throughput")
            if size <= _SMALL and x is not None and y is not None:
                xs.append(x.value)
                ys.append(y.value)
                names.append(str(size))
        axes.plot(xs, ys, label=arm, marker=_MARKERS[number % len(_MARKERS)])
        for x_value, y_value, text in zip(xs, ys, names, strict=True):
            axes.annotate(text, (x_value, y_value), textcoords="offset points", xytext=(4, 4))
    return _finished("small", title, figure, axes)


def _tails(data: ReportData) -> Drawing:
    """P99 end-to-end latency; hollow where too few requests allow P90 only."""
    title = "P99 end-to-end latency by batch size"
    figure, axes = _axes(
        title, "batch size (requests in flight)", "E2EL, ms (hollow: P90, under 300 requests)"
    )
    for number, arm in enumerate(data.arms):
        found = [(size, data.tail(arm, size, "e2el")) for size in data.sizes(arm)]
        have = [(size, one) for size, one in found if one is not None]
        (line,) = axes.plot([s for s, _ in have], [one.value for _, one in have], label=arm)
        for size, one in have:
            face = line.get_color() if one.name == "P99" else "white"
            axes.plot([size], [one.value], marker=_MARKERS[number % len(_MARKERS)],
                      color=line.get_color(), markerfacecolor=face)  # fmt: skip
    _batch_axis(axes, data.plan.batch_sizes)
    _log_axis(axes)
    return _finished("p99", title, figure, axes)


def _published() -> Drawing:
    """Theirs, and theirs alone: QwQ-32B on MI300X and H200."""
    title = "QwQ-32B on MI300X and H200: PUBLISHED BY OTHERS, not measured here"
    figure, axes = _axes(title, "prompts in one burst (mixed lengths)", "total tokens/s")
    rows = published_rows()
    for number, (system, label) in enumerate(TITLES.items()):
        mine = [row for row in rows if row.system == system]
        axes.plot([row.batch_size for row in mine], [row.total_tokens_per_s for row in mine],
                  label=label, marker=_MARKERS[number])  # fmt: skip
    _batch_axis(axes, sorted({row.batch_size for row in rows}))
    figure.text(0.01, -0.03, SOURCE, fontsize=7)
    return _finished("published", title, figure, axes)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure_class = _figure_class()
    figure = figure_class(figsize=(7.2, 4.4))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.3)
    return figure, axes


def _batch_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [str(size) for size in sizes])


def _log_axis(axes: Axes) -> None:
    """Logarithmic, with plain numbers, also between powers of ten where there are few."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))


def _finished(name: str, title: str, figure: Figure, axes: Axes) -> Drawing:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return Drawing(name, title, figure)


def _figure_class() -> Callable[..., Any]:
    """matplotlib's Figure, which needs no display. Raises UsageError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "figures need matplotlib; run: pip install 'sinterlm[bench]', or give --no-figures"
        ) from None
    return Figure
