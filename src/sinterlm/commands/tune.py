"""``sinterlm tune``: candidates for the tiles of a model's GEMMs and attention, timed on the
GPU at hand, and the best of them as a tile table, which ``sinterlm compile`` takes from then on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sinterlm.commands.bench.flags import parse_count, parse_counts
from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import add_option_flags, options_from, parse_file
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions

if TYPE_CHECKING:
    from sinterlm.tune.session import Outcome


def parse_names(text: str) -> tuple[str, ...]:
    """Names from ``o_residual,down_residual``."""
    return tuple(part for part in text.split(",") if part)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    from sinterlm.tune.catalogue import Sizes
    from sinterlm.tune.session import TuneOptions

    start, limits = Sizes(), TuneOptions()
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP.replace(" bundle,", ""))
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--ops", type=parse_names, default=(), metavar="LIST",
        help="what to tune, e.g. norm_gate_up_act,attention (default: all GEMMs, and attention)",
    )  # fmt: skip
    group.add_argument(
        "--batch-sizes", type=parse_counts, default=start.batch, metavar="LIST",
        help="rows of the steps that are timed, for attention of decoding rows their sequences; a "
        f"kernel is chosen by all that it serves (default: {','.join(map(str, start.batch))})",
    )  # fmt: skip
    group.add_argument(
        "--context-lens", type=parse_counts, default=start.contexts, metavar="LIST",
        help="keys of each decoding row when attention is timed "
        f"(default: {','.join(map(str, start.contexts))})",
    )  # fmt: skip
    group.add_argument(
        "--prompt-lens", type=parse_counts, default=start.prompts, metavar="LIST",
        help="tokens of the prompts whose attention is timed "
        f"(default: {','.join(map(str, start.prompts))})",
    )  # fmt: skip
    group.add_argument(
        "--time-limit", type=float, metavar="MINUTES",
        help="end after this; a later run goes on (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--max-candidates", type=parse_count, default=limits.max_candidates, metavar="N",
        help=f"tiles tried per kernel (default: {limits.max_candidates})",
    )  # fmt: skip
    group.add_argument(
        "--candidate-timeout", type=float, default=limits.candidate_limit_s, metavar="SECONDS",
        help="a candidate that takes longer has failed, and is not tried again "
        f"(default: {limits.candidate_limit_s:.0f})",
    )  # fmt: skip
    group.add_argument(
        "--output", type=parse_file, metavar="FILE",
        help="tile table to write, its journal beside it (default: in the cache, where `sinterlm "
        "compile` finds it)",
    )  # fmt: skip
    add_option_flags(parser, CompileOptions)


def run(args: argparse.Namespace) -> int:
    """Tune and say what was chosen. Raises what ``tune`` raises."""
    from sinterlm.artifact.bundle import is_bundle
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.tune.catalogue import Sizes
    from sinterlm.tune.session import TuneOptions, named, to_json, tune

    options = options_from(args, CompileOptions)
    if is_bundle(options.model):
        raise UsageError(f"{options.model} is a bundle; give the checkpoint that it was made from")
    if options.bundle_sha256 is not None:
        raise UsageError("--bundle-sha256 has no meaning here: no bundle is made")
    wanted = TuneOptions(
        ops=args.ops,
        sizes=Sizes(args.batch_sizes, args.context_lens, args.prompt_lens),
        max_candidates=args.max_candidates,
        candidate_limit_s=args.candidate_timeout,
        output=args.output,
        **({} if args.time_limit is None else {"time_limit_s": 60 * args.time_limit}),
    )
    with TerminalProgress() as progress:
        outcome = tune(named(options), wanted, progress)
    if args.json:
        print(to_json(outcome))
    else:
        _print(outcome, args.output is None)
    return 0


def _print(outcome: Outcome, is_found: bool) -> None:
    from sinterlm.commands.ui import print_table

    rows = []
    for row in outcome.rows:
        for size, us in row["us"].items():
            cut = " ".join(f"{name}={value}" for name, value in row["cut"].items())
            start = row["start_us"]
            rows.append((row["task"], size, f"{start[size]:.1f}" if start else "no data",
                         f"{us:.1f}", f"{rate:.0f}" if (rate := row["gb_per_s"].get(size)) else "–",
                         cut))  # fmt: skip
    tried = ", ".join(f"{count} {state}" for state, count in outcome.counts.items())
    print_table(f"{outcome.device}, {outcome.driver}: {tried}",
                ("kernel", "rows", "start us", "best us", "GB/s", "tile"), rows,
                right=range(1, 5))  # fmt: skip
    if not outcome.is_complete:
        print("the time was up before all candidates were tried; run it again to go on")
    print(f"tiles   {outcome.output}")
    if not is_found:
        print(f"compile with: sinterlm compile MODEL --tiles {outcome.output}")
