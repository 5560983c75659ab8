"""``sinterlm bench predict``: what a device allows a model to do, by its bytes and flops alone.

Nothing is compiled for another device. On this one the prediction is checked against measurements.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from sinterlm.commands.bench.flags import parse_batch_sizes, parse_count
from sinterlm.commands.bench.local import at_least, bundle_of, telling, with_dummy_weights
from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import parse_dtype
from sinterlm.commands.ui import print_table
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from sinterlm.bench.predict import Prediction
    from sinterlm.bench.results import Peaks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--device", choices=("mi300x", "h200", "this"), default="this")
    parser.add_argument("--dtype", type=parse_dtype, default="bf16", metavar="{bf16,fp32}")
    parser.add_argument("--quantization", choices=("int8", "int4", "fp8"),
                        help="weights in codes, on a device that is not this one")  # fmt: skip
    parser.add_argument("--batch", type=parse_batch_sizes, metavar="LIST",
                        default=(1, 2, 4, 8, 16, 32, 64, 128), help="default: 1,2,4..")  # fmt: skip
    parser.add_argument("--context", type=parse_count, default=160, metavar="N",
                        help="tokens in the cache of each sequence (default: 160)")  # fmt: skip
    parser.add_argument("--rounds", type=parse_count, default=3, metavar="N",
                        help="of the measurement on this device (default: 3)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Predict, measure where the device is this one, and print. Raises as compiling does."""
    from sinterlm.bench.predict import (
        DEVICES_BY_NAME,
        SHARES,
        predict,
        published_shares,
        with_launches,
    )
    from sinterlm.bench.published import MODEL, SOURCE, TITLES
    from sinterlm.commands.inspect import look

    options = with_dummy_weights(CompileOptions(args.model, dtype=args.dtype))
    launches: int | None = None
    if args.device != "this":
        options = replace(options, quantization=args.quantization)
        options, launches = _launches(options, DEVICES_BY_NAME[args.device].target)
    elif args.quantization is not None:
        raise UsageError("--quantization goes with --device mi300x or h200")
    subject = look(options)
    measured: dict[int, float] = {}
    if args.device == "this":
        peaks, measured = _measure(args, options)
        shares, source = SHARES["cpu"], "measured by the library itself, just now"
    else:
        device = DEVICES_BY_NAME[args.device]
        peaks, source, shares = device.peaks(subject.dtype), device.source, SHARES["gpu"]
    found = predict(subject.ops, subject.windows, peaks, shares, args.batch, args.context, measured)
    is_published = args.model == MODEL and args.quantization is None
    others = published_shares(args.device, found) if is_published else []
    if args.json:
        print(json.dumps({
            "kind": "prediction", "model": args.model, "device": args.device,
            "dtype": subject.dtype, "quantization": subject.quantization, "launches": launches,
            "peaks": asdict(peaks), "peaks_source": source,
            "shares": asdict(shares),
            "predictions": [
                {**asdict(p), "error": p.error,
                 "with_launches_s": launches and with_launches(p.roof_s, launches)}
                for p in found
            ],
            "published": [{**asdict(p), "share": p.share} for p in others],
        }))  # fmt: skip
        return 0
    title = (
        f"PREDICTION of a decode step: {args.model}, {subject.quantization or subject.dtype}, "
        f"{args.device} "
        f"({peaks.bytes_per_s / 1e9:.4g} GB/s, {peaks.flops_per_s / 1e12:.4g} TFLOP/s: {source})"
    )
    _show(title, found)
    why = shares.why if args.quantization is None else f"{shares.why}, which are of bf16"
    print(f"expected: the roof divided by {shares.least:.0%} to {shares.most:.0%} ({why})")
    if launches is not None:
        _show_launches(launches, found[0])
    if others:
        rows = [(TITLES[p.system], p.batch_size, f"{p.output_tokens_per_s:.1f}",
                 f"{p.roof_tokens_per_s:.0f}", f"{p.share:.1%}") for p in others]  # fmt: skip
        columns = ("system", "batch size", "published output tok/s", "roof tok/s (prediction)",
                   "share")  # fmt: skip
        print_table(f"{SOURCE}; bursts that drain, so shares are lower bounds", columns, rows,
                    (1, 2, 3, 4))  # fmt: skip
    return 0


def _show(title: str, found: list[Prediction]) -> None:
    rows = [
        (
            p.batch_size, f"{p.roof_s * 1e3:.3f}", f"{p.tokens_per_s:.0f}", p.bound,
            f"{p.expected_s[1] * 1e3:.3f}",
            f"{p.expected_s[0] * 1e3:.3f} to {p.expected_s[2] * 1e3:.3f}",
            "not measured" if p.measured_s is None else f"{p.measured_s * 1e3:.3f}",
            "" if p.error is None else f"{p.error:+.1%}",
        )
        for p in found
    ]  # fmt: skip
    columns = ("batch size", "roof ms", "roof tok/s", "bound", "expected ms", "interval ms",
               "measured ms", "error")  # fmt: skip
    print_table(title, columns, rows, (0, 1, 2, 4, 5, 6, 7))


def _launches(options: CompileOptions, target: str) -> tuple[CompileOptions, int | None]:
    """The options for ``target`` and the launches of a step there, None for a shape without GPU
    kernels; unchanged, and None, for a dtype without, and for a bundle, which has its target."""
    from sinterlm.artifact.bundle import is_bundle
    from sinterlm.backends.gpu.devices import DEVICES
    from sinterlm.backends.gpu.launch import launch_table
    from sinterlm.commands.inspect import look
    from sinterlm.errors import UnsupportedModelError

    if options.dtype == "fp32" or is_bundle(options.model):
        return options, None
    there = replace(options, target=target)
    plan = look(there).plan
    assert plan is not None, "what is no bundle has a plan"
    try:
        return there, launch_table(plan, DEVICES[target]).per_step
    except UnsupportedModelError:
        return there, None


def _show_launches(launches: int, first: Prediction) -> None:
    from sinterlm.bench.predict import LAUNCH_GAPS, LAUNCH_GAPS_SOURCE, with_launches

    least, most = with_launches(first.roof_s, launches)
    size = first.batch_size
    print(
        f"launches: our table has {launches}; at {LAUNCH_GAPS[0] * 1e6:.1f} to "
        f"{LAUNCH_GAPS[1] * 1e6:.1f} µs from one to the next ({LAUNCH_GAPS_SOURCE}) the roof at "
        f"batch size {size} is {size / most:.1f} to {size / least:.1f} tok/s. No device has "
        "confirmed any of this"
    )


def _measure(args: argparse.Namespace, options: CompileOptions) -> tuple[Peaks, dict[int, float]]:
    """Best probe, and the measured decode step of each batch size. Raises UsageError."""
    from sinterlm.bench.kernels import Plan, Shape, measure_kernels
    from sinterlm.bench.results import Peaks

    if args.context < 2:
        raise UsageError(f"--context {args.context} must be at least 2")
    steps = 8
    start = max(1, args.context - steps // 2)  # so that the middle step has that context
    plan = Plan(tuple(Shape(size, start) for size in args.batch), steps, args.rounds)
    most = max(args.batch)
    engine = replace(EngineOptions(), max_num_seqs=most, max_num_batched_tokens=max(512, most))
    lengths = argparse.Namespace(max_model_len=None)
    engine = at_least(lengths, engine, "max_model_len", max(map(plan.longest, plan.shapes)))
    bundle = bundle_of(options, engine)
    with telling() as tell:
        report = measure_kernels(bundle, engine, plan, tell)
    return Peaks.best(report.probes), {case.num_seqs: case.step_s for case in report.cases}
