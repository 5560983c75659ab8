"""``sinterlm bench kernels``: each fused op and the budget of a step, against the roof."""

from __future__ import annotations

import argparse

from sinterlm.commands.bench.flags import parse_batch_sizes, parse_count, parse_counts
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


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises as compiling, loading and running do."""
    from sinterlm.bench.kernels import Plan, Shape, measure_kernels

    refuse_code_only(args)
    shapes = [Shape(size, args.context) for size in args.batch_sizes]
    shapes += [Shape(1, length, is_prefill=True) for length in args.prefill]
    plan = Plan(tuple(shapes), args.steps, args.rounds)
    compile_options, engine = options_of(args)
    engine = at_least(args, engine, "max_num_seqs", max(args.batch_sizes))
    tokens = max((*args.prefill, engine.max_num_seqs))
    engine = at_least(args, engine, "max_num_batched_tokens", tokens)
    engine = at_least(args, engine, "max_model_len", max(map(plan.longest, plan.shapes)))
    bundle = bundle_of(compile_options, engine)
    with telling() as tell:
        report = measure_kernels(bundle, engine, plan, tell)
    return show(args, "kernels", report)
