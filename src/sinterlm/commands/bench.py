"""``sinterlm bench throughput | kernels | startup``: measured here, against this machine's roof.

Weights of named configs are random: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import add_option_flags, flag_of
from sinterlm.commands.session import options_of
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from sinterlm.artifact.bundle import Bundle
    from sinterlm.bench.results import KernelsReport, StartupReport, ThroughputReport

_MOST = 4096  #: sequences an engine takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    # The same metavar as for commands: a mistyped name is answered in the same words.
    benchmarks = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(benchmarks, "throughput", "offline throughput of equal requests", _throughput_flags)
    _add(benchmarks, "kernels", "each fused op and the budget of a step", _kernels_flags)
    _add(benchmarks, "startup", "process start to first token, cold and warm", _startup_flags)


def _add(
    benchmarks: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    add_flags: Callable[[argparse.ArgumentParser], None],
) -> None:
    parser = benchmarks.add_parser(name, help=text, description=text, allow_abbrev=False)
    help_text = f"{MODEL_HELP} (which needs no --load-format here)"
    if name == "startup":
        help_text = MODEL_HELP
    parser.add_argument("model", metavar="MODEL", help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--rounds", type=parse_count, default=5, metavar="N", help="rounds (default: 5)"
    )
    add_flags(parser)
    add_option_flags(parser, CompileOptions, EngineOptions)
    parser.set_defaults(benchmark=name, parser=parser)


def _throughput_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests (random tokens, greedy, equal lengths)")
    for flag, default, text in (
        ("--input-len", 128, "tokens of each prompt"),
        ("--output-len", 64, "tokens drawn for each prompt"),
    ):
        group.add_argument(
            flag,
            type=parse_count,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    count = group.add_mutually_exclusive_group()
    count.add_argument(
        "--num-prompts",
        type=parse_count,
        metavar="N",
        help="this many prompts at once, --max-num-seqs of them in a step",
    )
    count.add_argument(
        "--batch-sizes",
        type=parse_batch_sizes,
        default=(1, 8, 32),
        metavar="LIST",
        help="one case for each number of prompts, all in one step (default: 1,8,32)",
    )


def _kernels_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps")
    group.add_argument(
        "--batch-sizes",
        type=parse_batch_sizes,
        default=(1, 2, 4, 8, 16, 32, 64, 128),
        metavar="LIST",
        help="decode steps of so many sequences (default: 1,2,4,8,16,32,64,128)",
    )
    group.add_argument(
        "--context",
        type=parse_count,
        default=128,
        metavar="N",
        help="tokens in the cache of each sequence before it decodes (default: 128)",
    )
    group.add_argument(
        "--prefill",
        type=parse_counts,
        default=(),
        metavar="LIST",
        help="also prefill steps of one prompt of so many tokens, e.g. 128,512,2048",
    )
    group.add_argument(
        "--steps",
        type=parse_count,
        default=16,
        metavar="N",
        help="decode steps timed per round (default: 16)",
    )


def _startup_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "--cache-dir: where the temporary caches are made; each starts empty"


def parse_count(text: str) -> int:
    """A whole number, 1 or more, of at most nine digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def parse_counts(text: str) -> tuple[int, ...]:
    """Numbers from ``128,512``, each once."""
    counts = tuple(parse_count(part) for part in text.split(","))
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return counts


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Numbers of sequences from ``1,8,32``."""
    sizes = parse_counts(text)
    if max(sizes) > _MOST:
        raise argparse.ArgumentTypeError(f"{max(sizes)} is more than {_MOST} sequences")
    return sizes


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises as compiling, loading and running do."""
    from sinterlm.commands import bench_view

    if args.code_only:
        raise UsageError("--code-only leaves nothing to run; it belongs to `sinterlm compile`")
    report: ThroughputReport | KernelsReport | StartupReport
    if args.benchmark == "startup":
        report = _startup(args)
    elif args.benchmark == "kernels":
        report = _kernels(args)
    else:
        report = _throughput(args)
    if args.json:
        print(json.dumps({"benchmark": args.benchmark, **asdict(report)}))
    else:
        bench_view.print_report(report)
    return 0


# -- throughput and kernels ------------------------------------------------------------------------


def _throughput(args: argparse.Namespace) -> ThroughputReport:
    from sinterlm.bench.throughput import Workload, measure_throughput

    counts = args.batch_sizes if args.num_prompts is None else (args.num_prompts,)
    work = Workload(counts, args.input_len, args.output_len, args.rounds, args.seed or 0)
    compile_options, engine = options_of(args)
    if args.num_prompts is None:
        engine = _at_least(args, engine, "max_num_seqs", max(counts))
    engine = _at_least(args, engine, "max_num_batched_tokens", engine.max_num_seqs)
    engine = _at_least(args, engine, "max_model_len", args.input_len + args.output_len)
    bundle = _bundle(compile_options, engine)
    with _telling() as tell:
        return measure_throughput(bundle, engine, work, tell)


def _kernels(args: argparse.Namespace) -> KernelsReport:
    from sinterlm.bench.kernels import Plan, Shape, measure_kernels

    shapes = [Shape(size, args.context) for size in args.batch_sizes]
    shapes += [Shape(1, length, is_prefill=True) for length in args.prefill]
    plan = Plan(tuple(shapes), args.steps, args.rounds)
    compile_options, engine = options_of(args)
    engine = _at_least(args, engine, "max_num_seqs", max(args.batch_sizes))
    tokens = max((*args.prefill, engine.max_num_seqs))
    engine = _at_least(args, engine, "max_num_batched_tokens", tokens)
    engine = _at_least(args, engine, "max_model_len", max(map(plan.longest, plan.shapes)))
    bundle = _bundle(compile_options, engine)
    with _telling() as tell:
        return measure_kernels(bundle, engine, plan, tell)


def _at_least(
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


def _bundle(options: CompileOptions, engine: EngineOptions) -> Bundle:
    """The bundle of ``options``; random weights where the model is a named config."""
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.compile import compile_model
    from sinterlm.engine.memory import check_options

    check_options(engine)
    with TerminalProgress() as progress:
        return compile_model(_with_dummy_weights(options), progress)


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """One line on a terminal's stderr that says what is measured. No bar: the thread that draws
    one would take its time from what is measured."""
    clear = "\r\x1b[2K" if sys.stderr.isatty() else None

    def tell(text: str) -> None:
        if clear is not None:
            print(f"{clear}{text}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        tell("")


def _with_dummy_weights(options: CompileOptions) -> CompileOptions:
    """``options``, with ``load_format`` dummy where the model is but a name of a shape."""
    from pathlib import Path

    from sinterlm.frontend.named_configs import named_configs

    is_name = options.model in named_configs() and not Path(options.model).exists()
    return replace(options, load_format="dummy") if is_name else options


# -- start-up --------------------------------------------------------------------------------------


def _startup(args: argparse.Namespace) -> StartupReport:
    from sinterlm.bench.startup import measure_startup

    with _telling() as tell:
        return measure_startup(run_words(args), args.rounds, args.cache_dir, tell)


def run_words(args: argparse.Namespace) -> list[str]:
    """The model and the options that were given, as ``sinterlm run`` takes them."""
    words: list[str] = [args.model]
    names = {field.name for cls in (CompileOptions, EngineOptions) for field in fields(cls)}
    for name in sorted(names - {"model", "cache_dir"}):
        value = getattr(args, name)
        if value is None:
            continue
        words.append(flag_of(name))
        if isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return words
