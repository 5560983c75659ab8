"""The tables of a report, as rows of text; Markdown and HTML only draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sinterlm.artifact.storage import show_bytes
from sinterlm.bench.bootstrap import Ratio, verdict
from sinterlm.bench.report.data import Estimate, ReportData
from sinterlm.bench.sweep_plan import AGAIN

NO_DATA = "no data"


@dataclass(frozen=True)
class Table:
    """A title, columns, rows, and a remark below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def all_tables(data: ReportData) -> list[Table]:
    """In the order of the report; those without a row are left out."""
    tables = [headline(data)]
    tables += [throughput(data, arm) for arm in data.arms]
    if data.plan.mode == "serve":
        tables += [latency(data, arm) for arm in data.arms]
    tables += [speed_up(data, equal=True), speed_up(data, equal=False), noise(data)]
    tables += [footprint(data), accuracy(data), cost(data), answers(data), failures(data)]
    return [table for table in tables if table.rows]


def headline(data: ReportData) -> Table:
    """Output tokens/s of every engine at every batch size."""
    rows = [
        (
            str(size),
            *(_estimate(data.estimate(arm, size, "output_throughput")) for arm in data.arms),
        )
        for size in data.plan.batch_sizes
    ]
    return Table(
        "Output tokens/s", ("batch size", *data.arms), tuple(rows),
        "Mean over rounds [95 % interval of it].",
    )  # fmt: skip


def throughput(data: ReportData, arm: str) -> Table:
    """One system."""
    rows = []
    for size in data.sizes(arm):
        share = data.roof_share(arm, size)
        rows.append((
            str(size),
            _estimate(data.estimate(arm, size, "request_throughput")),
            _estimate(data.estimate(arm, size, "output_throughput")),
            _estimate(data.estimate(arm, size, "total_token_throughput")),
            "no fraction" if share is None else f"{share:.1%}",
            _share(data.estimate(arm, size, "client_cpu")),
            *_divergence(data, arm),
        ))  # fmt: skip
    columns = ("batch size", "requests/s", "output tok/s", "total tok/s", "of the roof",
               "client CPU", "KL to fp32", "top-1")  # fmt: skip
    note = (
        "No fraction of the roof: no probe, a precision that we do not compile, or beyond belief. "
        f"KL and top-1: of {data.precision(arm)} weights, by `sinterlm eval`."
    )
    return Table(f"Throughput: {arm} ({data.precision(arm)})", columns, tuple(rows), note)


def _divergence(data: ReportData, arm: str) -> tuple[str, str]:
    """KL and top-1 agreement of an engine's precision, where they were measured."""
    precision = data.precision(arm)
    for score in data.accuracy:
        if score["dtype"] == precision:
            found = score.get("divergence")
            if found is None:
                return "reference", "reference"
            return f"{found['kl']:.1e}", f"{found['top1_agreement']:.1%}"
    return "not measured", "not measured"


def latency(data: ReportData, arm: str) -> Table:
    """One system: mean, median and tail of the four metrics, in milliseconds."""
    rows = []
    for size in data.sizes(arm):
        cells = [str(size)]
        for metric in ("ttft", "tpot", "itl", "e2el"):
            cells.append(_plain(data.estimate(arm, size, f"mean_{metric}_ms")))
            cells.append(_plain(data.estimate(arm, size, f"median_{metric}_ms")))
            tail = data.tail(arm, size, metric)
            cells.append(
                NO_DATA if tail is None
                else f"{tail.value:.1f}" if tail.name == "P99"
                else f"{tail.value:.1f} / {tail.maximum:.1f}"
            )  # fmt: skip
        rows.append(tuple(cells))
    metrics = ("TTFT", "TPOT", "ITL", "E2EL")
    named = [f"{metric} {part}" for metric in metrics for part in ("mean", "median", "tail")]
    columns = ("batch size", *named)
    note = (
        "Milliseconds. Tail: P99 over all rounds with at least 300 requests, else P90 / maximum. "
        "TTFT, TPOT and E2EL have one sample per request, ITL one per gap between chunks."
    )
    return Table(f"Latency: {arm} ({data.precision(arm)})", columns, tuple(rows), note)


def speed_up(data: ReportData, *, equal: bool) -> Table:
    """Ours over each peer, output tokens/s: equal widths of weights, or unequal ones."""
    rows: list[tuple[str, ...]] = []
    ours = [arm for arm in data.arms if arm.startswith("sinterlm")]
    peers = [arm for arm in data.arms if not arm.startswith("sinterlm")]
    pairs = [(a, b) for a in ours for b in peers if data.same_width(a, b) == equal]
    if not equal:
        pairs += [(a, b) for i, b in enumerate(ours) for a in ours[i + 1 :]]
    for first, second in pairs:
        for size in data.plan.batch_sizes:
            ratio = data.ratio(first, second, size, "output_throughput")
            if ratio is not None:
                rows.append((f"{first} / {second}", str(size), f"{ratio.value:.2f}",
                             _interval(ratio), verdict(ratio, data.band(size))))  # fmt: skip
    title = "Speed-up, output tokens/s"
    if not equal:
        title = "NOT the same precision: narrower against wider weights, output tokens/s"
    return Table(
        title, ("engines", "batch size", "ratio", "95 % interval", "beyond noise"), tuple(rows),
        "Geometric mean over rounds, bootstrap of the log ratio; 'no difference' inside the noise "
        "band of the A/A arm; 'no data' with a single round.",
    )  # fmt: skip


def noise(data: ReportData) -> Table:
    """The A/A arm: the same engine against itself."""
    again = data.plan.again
    rows: list[tuple[str, ...]] = []
    for size in data.plan.batch_sizes if again else ():
        ratio = data.ratio(str(again), f"{again}{AGAIN}", size, "output_throughput")
        band = data.band(size)
        if ratio is not None:
            shown = NO_DATA if band is None else f"{band - 1:.1%}"
            rows.append((str(size), f"{ratio.value:.3f}", _interval(ratio), shown))
    columns = ("batch size", "ratio", "95 % interval", "noise band ±")
    return Table(f"Noise: {again} against itself", columns, tuple(rows))


def footprint(data: ReportData) -> Table:
    """Start-up, memory and size on disk."""
    rows = []
    for arm in data.arms:
        size = data.facts.engines[arm].installed_bytes if arm in data.facts.engines else None
        memory = data.peak_memory(arm)
        rows.append((
            arm,
            _seconds(data.startup(arm, cold=True)),
            _seconds(data.startup(arm, cold=False)),
            NO_DATA if memory is None else show_bytes(memory),
            NO_DATA if size is None else show_bytes(size),
        ))  # fmt: skip
    columns = ("engine", "cold start s", "warm start s", "peak memory", "installed")
    note = (
        "Start: launch to the first useful answer, cold with empty caches. Memory: sum of the "
        "processes' peaks, shared pages counted in each. Installed: the package and all it "
        "requires, the model left out."
    )
    return Table("Start-up and footprint", columns, tuple(rows), note)


def accuracy(data: ReportData) -> Table:
    """What `sinterlm eval` found, for each dtype or file."""
    rows = []
    for score in data.accuracy:
        divergence = score.get("divergence")
        kl = NO_DATA if divergence is None else f"{divergence['kl']:.2e}"
        top1 = NO_DATA if divergence is None else f"{divergence['top1_agreement']:.2%}"
        rows.append((str(score["dtype"]), f"{score['perplexity']:.4f}", kl, top1))
    measured = {str(score["dtype"]) for score in data.accuracy}
    for arm in data.arms:
        if data.precision(arm) not in measured:
            rows.append((f"{data.precision(arm)} ({arm})", "not measured", "not measured",
                         "not measured"))  # fmt: skip
    columns = ("precision", "perplexity", "KL to fp32, nats", "top-1 agreement")
    return Table("Accuracy of each precision (`sinterlm eval`)", columns, tuple(rows))


def cost(data: ReportData) -> Table:
    """Of a million output tokens at the stated price of this machine."""
    price = data.price_per_hour
    rows = []
    for size in data.plan.batch_sizes if price is not None else ():
        cells = [str(size)]
        for arm in data.arms:
            got = data.estimate(arm, size, "output_throughput")
            cells.append(NO_DATA if got is None or price is None
                         else f"{price / 3600 / got.value * 1e6:.3f}")  # fmt: skip
        rows.append(tuple(cells))
    title = f"Cost of a million output tokens at {price:g} an hour" if price is not None else ""
    return Table(title, ("batch size", *data.arms), tuple(rows))


def answers(data: ReportData) -> Table:
    """What each engine said to one question: a look at sanity, not a measurement."""
    rows, seen = [], set()
    for launch in data.launches:
        if launch.answer and launch.arm not in seen and not launch.arm.endswith(AGAIN):
            seen.add(launch.arm)
            rows.append((launch.arm, " ".join(launch.answer.split())))
    for point in data.points:
        rows += [
            (f"{point.arm}, batch size {point.batch_size}", remark) for remark in point.remarks
        ]
    title = "First answers, to “The capital of France is”, and remarks on others"
    return Table(title, ("engine", "answer or remark"), tuple(rows))


def failures(data: ReportData) -> Table:
    """Every point that failed."""
    rows = [
        (point.arm, point.variant, str(point.batch_size), str(point.round_number),
         " ".join(point.failure.split())[:300])
        for point in data.points
        if point.failure is not None
    ]  # fmt: skip
    return Table("Failed points", ("engine", "flags", "batch size", "round", "why"), tuple(rows))


def setting(data: ReportData) -> Table:
    """Machine, method and versions."""
    plan, machine = data.plan, data.facts.machine
    rows: list[tuple[str, str]] = [
        ("model", plan.model),
        ("machine", f"{machine['cpu']}, {machine['num_cpus']} CPUs, "
                    f"{show_bytes(machine['memory_bytes'])}, {machine['system']}"),
        ("instruction sets", ", ".join(data.facts.isa) or "none of those that matter"),
        ("measured peaks", _peaks(data)),
        ("requests", f"{plan.input_len} tokens in, {plan.output_len} out, forced in every engine; "
                     f"greedy; prompts as token ids, the same for all, drawn anew for each point"),
        ("requests of a point", ", ".join(
            f"{plan.num_requests(size)} at batch size {size}" for size in plan.batch_sizes)),
        ("rounds", f"{plan.rounds}, randomised and interleaved; one launch each"),
        ("flags", _flags(data)),
        ("measured on", ", ".join(data.facts.dates)),
    ]  # fmt: skip
    for name, engine in data.facts.engines.items():
        versions = ", ".join(f"{k} {v}" for k, v in engine.versions.items())
        rows.append((name, versions or NO_DATA))
    return Table("Setting", ("", ""), tuple(rows))


def _peaks(data: ReportData) -> str:
    if data.peaks is None:
        return NO_DATA
    return (
        f"{data.peaks.bytes_per_s / 1e9:.1f} GB/s, {data.peaks.flops_per_s / 1e9:.0f} GFLOP/s "
        "(best probe between launches)"
    )


def _flags(data: ReportData) -> str:
    used = sorted({(p.arm, p.variant) for p in data.points if p.round_number >= 0})
    other = [f"{arm}: {variant}" for arm, variant in used if variant != "default"]
    tuned = "tuned per batch size" if data.plan.tunes else "default set of each, not tuned"
    return f"peers {tuned}" + (f" ({'; '.join(other)})" if other else "")


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return NO_DATA
    if found.interval is None:
        return f"{found.value:.4g}"
    return f"{found.value:.4g} [{found.interval[0]:.4g}, {found.interval[1]:.4g}]"


def _plain(found: Estimate | None) -> str:
    return NO_DATA if found is None else f"{found.value:.1f}"


def _share(found: Estimate | None) -> str:
    return NO_DATA if found is None else f"{found.value:.0%}"


def _seconds(value: float | None) -> str:
    return NO_DATA if value is None else f"{value:.2f}"


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return "one round"
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def commands(data: ReportData) -> Sequence[tuple[str, str]]:
    """(what, command line): each sweep, and each engine's server as it was started first."""
    lines = [("sweep", command) for command in data.facts.commands]
    seen = set()
    for launch in data.launches:
        key = (launch.arm, launch.variant)
        if launch.command and key not in seen and not launch.arm.endswith(AGAIN):
            seen.add(key)
            env = " ".join(f"{k}={v}" for k, v in launch.env.items())
            name = launch.arm if launch.variant == "default" else f"{launch.arm} {launch.variant}"
            lines.append((name, f"{env} {' '.join(launch.command)}".strip()))
    return lines
