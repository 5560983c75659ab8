"""``sinterlm bench recompute``: the statistics of a run once more, from its raw timestamps."""

from __future__ import annotations

import argparse
from pathlib import Path

from sinterlm.commands.bench.serve import add_statistics_flags, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("raw", metavar="FILE", type=Path, help="made by --save-raw")
    add_statistics_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the statistics. Raises UsageError for a file that is no raw record."""
    from sinterlm.bench.raw import read_raw

    return report(args, read_raw(args.raw))
