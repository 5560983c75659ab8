"""``sinterlm bench compare``: B against A, for regressions; exit code 1 when B is slower."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from sinterlm.commands.ui import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    text = "a baseline of `bench report --baseline`, or the folder of a sweep"
    parser.add_argument("a", metavar="A", type=Path, help=f"before: {text}")
    parser.add_argument("b", metavar="B", type=Path, help="after: the same")
    parser.add_argument("--tolerance", type=_parse_share, default=0.03, metavar="X",
                        help="share of throughput that may be lost (default: 0.03)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _parse_share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 up to below 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Compare and print; 1 for a regression. Raises UsageError where nothing compares."""
    from sinterlm.bench.baseline import changes, read_baseline

    a, b = read_baseline(args.a), read_baseline(args.b)
    found = changes(a, b)
    worse = [change for change in found if change.is_regression(args.tolerance)]
    if a.machine.get("cpu") != b.machine.get("cpu"):
        print(f"sinterlm: warning: A ran on {a.machine.get('cpu')} and B on "
              f"{b.machine.get('cpu')}", file=sys.stderr)  # fmt: skip
    if args.json:
        rows = [{**asdict(c), "is_regression": c in worse} for c in found]
        print(json.dumps({"tolerance": args.tolerance, "changes": rows}))
    else:
        _show(found, worse)
    return 1 if worse else 0


def _show(found: list, worse: list) -> None:  # type: ignore[type-arg]
    rows = []
    for change in found:
        low, high = change.ratio.low, change.ratio.high
        interval = "one round: no interval" if low is None else f"{low:.3f} to {high:.3f}"
        rows.append((change.arm, change.batch_size, f"{change.ratio.value:.3f}", interval,
                     "SLOWER" if change in worse else ""))  # fmt: skip
    columns = ("engine", "batch size", "output tok/s, B / A", "95 % interval", "")
    print_table("B against A", columns, rows, (1, 2, 3))
