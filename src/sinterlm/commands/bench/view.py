"""What ``sinterlm bench`` shows: tables of a report. Nothing here measures."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sinterlm.commands.ui import print_table

if TYPE_CHECKING:
    from sinterlm.bench.results import (
        KernelsReport,
        MachineFacts,
        ModelFacts,
        Peaks,
        StartupReport,
        StepCase,
        ThroughputReport,
    )


def print_report(report: ThroughputReport | KernelsReport | StartupReport) -> None:
    """Tables on stdout, and on stderr why a fraction is missing."""
    from sinterlm.bench.results import KernelsReport, ThroughputReport

    if isinstance(report, ThroughputReport):
        _print_throughput(report)
        unknown = any(case.fraction is None for case in report.cases)
    elif isinstance(report, KernelsReport):
        for case in report.cases:
            _print_step(case)
        print(_where(report.machine, report.model, report.probes))
        unknown = any(op.fraction is None for case in report.cases for op in case.ops)
    else:
        _print_startup(report)
        unknown = False
    if unknown:
        print(
            "no fraction: faster than the roof that was measured, so caches held what the roof "
            "takes from memory, or the probes were disturbed",
            file=sys.stderr,
        )


def _print_throughput(report: ThroughputReport) -> None:
    rows = [
        (
            case.num_prompts,
            f"{case.input_len} + {case.output_len}",
            f"{case.total_tokens_per_s:.1f}",
            f"{case.output_tokens_per_s:.1f}",
            _ms(case.median_ttft_s),
            "no data" if case.median_decode_step_s is None else _ms(case.median_decode_step_s),
            _share(case.fraction),
        )
        for case in report.cases
    ]
    columns = ["prompts", "tokens in + out", "total tok/s", "output tok/s", "TTFT ms",
               "decode step ms", "of the roof"]  # fmt: skip
    num_rounds = len(report.cases[0].elapsed_s)
    print_table(f"offline throughput, medians of {num_rounds} rounds", columns, rows, range(7))
    print(_where(report.machine, report.model, report.probes))


def _print_step(case: StepCase) -> None:
    what = f"prefill of {case.num_tokens} tokens"
    if case.kind == "decode":
        what = f"decode of {case.num_seqs} sequences at {case.context_len} tokens"
    title = f"{what}: {_ms(case.step_s)} ms a step, {_share(case.fraction)} of the roof"
    rows = [
        (
            op.name,
            f"{op.calls:.0f}",
            _ms(op.seconds),
            f"{op.seconds / case.step_s:.1%}",
            f"{op.nbytes / 1e6:.2f}",
            f"{op.bytes_per_s / 1e9:.1f}",
            f"{op.flops_per_s / 1e9:.0f}",
            op.bound,
            _share(op.fraction),
            _ms(op.lost_s),
        )
        for op in case.ops
    ]
    for part in case.budget[len(case.ops) :]:
        share = f"{part.seconds / case.step_s:.1%}"
        rows.append((part.name, "", _ms(part.seconds), share, "", "", "", "", "", ""))
    rows.append(("step", "", _ms(case.step_s), "100.0%", "", "", "", "", _share(case.fraction), ""))
    columns = ["op, worst first", "calls", "ms", "share", "MB", "GB/s", "GFLOP/s", "bound",
               "of its roof", "lost ms"]  # fmt: skip
    print_table(title, columns, rows, (1, 2, 3, 4, 5, 6, 8, 9))


def _print_startup(report: StartupReport) -> None:
    rows = [
        ("cold: nothing compiled yet", f"{report.median_cold_s:.2f}", len(report.cold_s)),
        ("warm: found in the cache", f"{report.median_warm_s:.2f}", len(report.warm_s)),
    ]
    print_table("process start to first token", ["", "median s", "runs"], rows, (1, 2))
    print(_machine(report.machine))


def _where(machine: MachineFacts, model: ModelFacts, probes: list[Peaks]) -> str:
    """Two lines: model and machine, and the spread of the probes."""
    bandwidths = sorted(one.bytes_per_s / 1e9 for one in probes)
    peaks = sorted(one.flops_per_s / 1e9 for one in probes)
    return (
        f"{model.model}, {model.dtype}, {model.isa}, {model.num_threads} threads; "
        f"{_machine(machine)}\n"
        f"this machine reads {bandwidths[0]:.1f} to {bandwidths[-1]:.1f} GB/s and computes "
        f"{peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s ({len(probes)} probes)"
    )


def _machine(machine: MachineFacts) -> str:
    return f"{machine.cpu}, {machine.num_cpus} CPUs, sinterlm {machine.versions['sinterlm']}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _share(share: float | None) -> str:
    return "no fraction" if share is None else f"{share:.1%}"
