"""``sinterlm vllm ...``: an installed vLLM's own command with SinterLM switched on.

Everything after ``vllm`` is vLLM's; this process becomes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from sinterlm.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument(
        "words", metavar="...", nargs=argparse.REMAINDER, help="of vLLM: serve MODEL ..."
    )


def run(args: argparse.Namespace) -> int:
    """Become vLLM. Raises UsageError where it is not installed."""
    from sinterlm.plugin.switch import read_switch

    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed beside SinterLM; install SinterLM into vLLM's environment, or "
            "run `sinterlm serve MODEL`, which needs no vLLM"
        )
    read_switch()  # refuses a word that is none
    os.environ.setdefault("SINTERLM_VLLM", "on")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *args.words]
    os.execv(sys.executable, command)
