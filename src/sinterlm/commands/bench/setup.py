"""``sinterlm bench setup``: install a peer into an environment of its own."""

from __future__ import annotations

import argparse

from sinterlm.commands.bench.sweep import add_home_flags, home_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("name", metavar="ENGINE",
                        help="vllm, vllm+zentorch, vllm+sinterlm or llama.cpp")  # fmt: skip
    add_home_flags(parser.add_argument_group("place"))


def run(args: argparse.Namespace) -> int:
    """Install and print where. Raises UsageError, RuntimeFault."""
    from sinterlm.bench.engines import install

    print(install(args.name, home_of(args)))
    return 0
