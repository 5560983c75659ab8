"""``sinterlm bench throughput``: equal requests through ``LLM``, against this machine's roof."""

from __future__ import annotations

import argparse

from sinterlm.commands.bench.flags import parse_batch_sizes, parse_count
from sinterlm.commands.bench.local import (
    add_model_flags,
    at_least,
    bundle_of,
    refuse_code_only,
    show,
    telling,
)
from sinterlm.commands.session import options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    add_model_flags(parser)
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


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises as compiling, loading and running do."""
    from sinterlm.bench.throughput import Workload, measure_throughput

    refuse_code_only(args)
    counts = args.batch_sizes if args.num_prompts is None else (args.num_prompts,)
    work = Workload(counts, args.input_len, args.output_len, args.rounds, args.seed or 0)
    compile_options, engine = options_of(args)
    if args.num_prompts is None:
        engine = at_least(args, engine, "max_num_seqs", max(counts))
    engine = at_least(args, engine, "max_num_batched_tokens", engine.max_num_seqs)
    engine = at_least(args, engine, "max_model_len", args.input_len + args.output_len)
    bundle = bundle_of(compile_options, engine)
    with telling() as tell:
        report = measure_throughput(bundle, engine, work, tell)
    return show(args, "throughput", report)
