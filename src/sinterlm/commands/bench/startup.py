"""``sinterlm bench startup``: process start to first token, cold and warm."""

from __future__ import annotations

import argparse
from dataclasses import fields

from sinterlm.commands.bench.local import add_model_flags, refuse_code_only, show, telling
from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import NO_FLAG, flag_of
from sinterlm.options import CompileOptions, EngineOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    add_model_flags(parser, MODEL_HELP)
    parser.epilog = "--cache-dir: where the temporary caches are made; each starts empty"


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises RuntimeFault where the measured command fails."""
    from sinterlm.bench.startup import measure_startup

    refuse_code_only(args)
    with telling() as tell:
        report = measure_startup(run_words(args), args.rounds, args.cache_dir, tell)
    return show(args, "startup", report)


def run_words(args: argparse.Namespace) -> list[str]:
    """The model and the options that were given, as ``sinterlm run`` takes them."""
    words: list[str] = [args.model]
    names = {field.name for cls in (CompileOptions, EngineOptions) for field in fields(cls)}
    for name in sorted(names - {*NO_FLAG, "cache_dir"}):
        value = getattr(args, name)
        if value is None:
            continue
        words.append(flag_of(name))
        if isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return words
