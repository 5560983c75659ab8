"""``sinterlm bench report``: a sweep as Markdown, one HTML page, figures, and a baseline."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinterlm.errors import SinterError, UsageError

if TYPE_CHECKING:
    from sinterlm.bench.report.data import Costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("sweep", metavar="DIR", type=Path, help="made by `sinterlm bench sweep`")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: DIR/report")
    parser.add_argument("--weights", type=Path, metavar="DIR",
                        help="of make-checkpoint: fractions of the roof need the model's shape"
                        )  # fmt: skip
    parser.add_argument("--accuracy", type=Path, action="append", default=[], metavar="FILE",
                        help="written by `sinterlm eval ... --json`; several times")  # fmt: skip
    parser.add_argument("--price-per-hour", type=_parse_price, metavar="X",
                        help="of this machine, for the cost of a million tokens")  # fmt: skip
    parser.add_argument("--baseline", type=Path, metavar="FILE",
                        help="also write the figures that `bench compare` reads")  # fmt: skip
    parser.add_argument("--no-figures", action="store_true", help="tables alone")


def _parse_price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Write the report and print where; 1 where the sweep has not come to what it measures.

    Raises UsageError, ResourceError.
    """
    from sinterlm.bench.baseline import baseline_of, write_baseline
    from sinterlm.bench.report.data import load_data
    from sinterlm.bench.report.figures import all_drawings
    from sinterlm.bench.report.render import write_report
    from sinterlm.bench.sweep_store import SweepStore

    costs = {} if args.weights is None else costs_of(args.weights)
    data = load_data(args.sweep, costs, scores_of(args.accuracy), args.price_per_hour)
    if not data.arms and any(point.is_good for point in SweepStore(args.sweep).points()):
        print(f"{args.sweep} has warm-ups and tries of flags so far: go on with the sweep",
              file=sys.stderr)  # fmt: skip
        return 1
    if not data.arms:
        raise UsageError(f"{args.sweep} has no point that succeeded; see its launches.jsonl")
    drawings = [] if args.no_figures else all_drawings(data)
    for path in write_report(args.output or args.sweep / "report", data, drawings):
        print(path)
    if args.baseline is not None:
        write_baseline(args.baseline, baseline_of(args.sweep))
        print(args.baseline)
    return 0


def costs_of(weights: Path) -> dict[str, Costs]:
    """Bytes and flops by precision, for those that this version compiles."""
    from sinterlm.bench.engines.base import Weights
    from sinterlm.bench.report.data import Costs
    from sinterlm.commands.inspect import look
    from sinterlm.options import CompileOptions

    model = str(Weights(weights.resolve().name, weights).hf)
    options = {
        "bf16": CompileOptions(model, dtype="bf16"),
        "fp32": CompileOptions(model, dtype="fp32"),
        "int8": CompileOptions(model, quantization="int8"),
        "int4": CompileOptions(model, quantization="int4"),
    }
    found = {}
    for precision, chosen in options.items():
        try:
            subject = look(chosen)
        except SinterError:
            if precision == "bf16":
                raise
            continue  # a precision that this version does not compile has no roof to show
        found[precision] = Costs(subject.ops, subject.windows)
    return found


def scores_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Scores of `sinterlm eval --json`. Raises UsageError for another file."""
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
            found += [{**score, "perplexity": float(score["perplexity"])} for score in scores]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise UsageError(f"{path} was not written by `sinterlm eval --json` ({exc})") from exc
    return found
