"""``sinterlm bench COMMAND``: a module per subcommand, named as it is; nothing here measures."""

from __future__ import annotations

import argparse
import importlib

#: Subcommand -> what it does; its module in this package has the same name, with underscores.
_BENCHMARKS: dict[str, str] = {
    "serve": "load an OpenAI-compatible server and measure what its users would see",
    "recompute": "the statistics of a `bench serve` run once more, from its raw timestamps",
    "make-checkpoint": "one set of weights in every engine's file format",
    "setup": "install a peer into an environment of its own",
    "sweep": "measure every engine at every batch size, round after round",
    "report": "a sweep as Markdown, one HTML page and figures",
    "compare": "one sweep or baseline against another, for regressions",
    "predict": "what a device allows a model to do, by bytes and flops alone",
    "throughput": "offline throughput of equal requests",
    "kernels": "each fused op and the budget of a step",
    "startup": "process start to first token, cold and warm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what each subcommand takes."""
    # The same metavar as for commands: a mistyped name is answered in the same words.
    benchmarks = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in _BENCHMARKS.items():
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        added = benchmarks.add_parser(name, help=text, description=text, allow_abbrev=False)
        module.add_arguments(added)
        added.set_defaults(run_benchmark=module.run, parser=added)


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; returns the exit code."""
    return int(args.run_benchmark(args))
