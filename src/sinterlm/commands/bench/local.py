"""What the benchmarks of this process share: their flags, their bundle, and a line of progress.

Weights of named configs are random: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sinterlm.commands.bench.flags import parse_count
from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import add_option_flags, flag_of
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from sinterlm.artifact.bundle import Bundle
    from sinterlm.bench.results import KernelsReport, StartupReport, ThroughputReport


def add_model_flags(parser: argparse.ArgumentParser, model_help: str | None = None) -> None:
    """MODEL, ``--json``, ``--rounds`` and the options of compiling and of the engine."""
    help_text = model_help or f"{MODEL_HELP} (which needs no --load-format here)"
    parser.add_argument("model", metavar="MODEL", help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--rounds", type=parse_count, default=5, metavar="N", help="rounds (default: 5)"
    )
    add_option_flags(parser, CompileOptions, EngineOptions)


def refuse_code_only(args: argparse.Namespace) -> None:
    """Raises UsageError for the one compile option that leaves nothing to measure."""
    if args.code_only:
        raise UsageError("--code-only leaves nothing to run; it belongs to `sinterlm compile`")


def show(
    args: argparse.Namespace,
    benchmark: str,
    report: ThroughputReport | KernelsReport | StartupReport,
) -> int:
    """Print ``report`` as tables or JSON; returns the exit code."""
    from sinterlm.commands.bench import view

    if args.json:
        print(json.dumps({"benchmark": benchmark, **asdict(report)}))
    else:
        view.print_report(report)
    return 0


def at_least(
    args: argparse.Namespace, engine: EngineOptions, name: str, needed: int
) -> EngineOptions:
    """``engine`` with ``name`` raised to what is measured. Raises UsageError where the flag was
    given, and says less."""
    given = getattr(args, name)
    if given is not None:
        if given < needed:
            raise UsageError(f"{flag_of(name)} {given} is less than the {needed} this needs")
        return engine
    changes: dict[str, Any] = {name: max(needed, getattr(engine, name) or 0)}
    return replace(engine, **changes)


def bundle_of(options: CompileOptions, engine: EngineOptions) -> Bundle:
    """The bundle of ``options``; random weights where the model is a named config."""
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.compile import compile_model
    from sinterlm.engine.memory import check_options

    check_options(engine)
    with TerminalProgress() as progress:
        return compile_model(with_dummy_weights(options), progress)


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """What is measured, on stderr: one line of a terminal, or a line each in a log. No bar: the
    thread that draws one would take its time from what is measured."""
    clear = "\r\x1b[2K" if sys.stderr.isatty() else None

    def tell(text: str) -> None:
        if clear is not None:
            print(f"{clear}{text}", end="", file=sys.stderr, flush=True)
        elif text:
            print(text, file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        tell("")


def with_dummy_weights(options: CompileOptions) -> CompileOptions:
    """``options``, with ``load_format`` dummy where the model is but a name of a shape."""
    from pathlib import Path

    from sinterlm.frontend.named_configs import named_configs

    is_name = options.model in named_configs() and not Path(options.model).exists()
    return replace(options, load_format="dummy") if is_name else options
