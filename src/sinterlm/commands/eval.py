"""``sinterlm eval``: perplexity of each dtype, and how far it lies from fp32, on a text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinterlm.commands.flags import add_option_flags, parse_dtype
from sinterlm.commands.session import options_of
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions, DTypeName, EngineOptions

if TYPE_CHECKING:
    from sinterlm.artifact.progress import Progress
    from sinterlm.bench.eval import EvalReport, Score, Scorer

_REFERENCE = "fp32"
_DTYPES = ("fp32", "bf16", "int8", "int4")
_KV8 = "+kv8"  #: behind a dtype: with the KV cache in int8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face directory, .gguf file, Hub id, or `smollm2`; no bundle, which has but "
        "one dtype",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--dtypes",
        type=parse_dtypes,
        default=("fp32", "bf16"),
        metavar="LIST",
        help="what to score, of fp32, bf16, int8 and int4 (default: fp32,bf16); bf16+kv8 is bf16 "
        "with --kv-cache-dtype int8; fp32 runs in any case, as the reference; --quant-group and "
        "--act-dtype say more of int8 and int4",
    )
    parser.add_argument(
        "--server", metavar="URL", help="score this vLLM, llama.cpp or SinterLM server as well"
    )
    parser.add_argument(
        "--server-model", metavar="NAME", help="of the server (default: its only one)"
    )
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", metavar="FILE", help="UTF-8 text (default: public-domain prose of the package)"
    )
    group.add_argument(
        "--max-tokens-per-window",
        type=int,
        metavar="N",
        help="tokens a prediction can look back on at most (default: the context, at most 512)",
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window to the next; each token is scored once (default: half a "
        "window)",
    )
    add_option_flags(parser, CompileOptions, EngineOptions)


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Dtypes from ``fp32,int8,bf16+kv8``, each once."""
    names: list[str] = []
    for part in text.split(","):
        weights = part.removesuffix(_KV8)
        name = weights if weights in _DTYPES else parse_dtype(weights)
        if name not in _DTYPES:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no dtype by itself; name {', '.join(_DTYPES)}"
            )
        names.append(name + part[len(weights) :])
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a dtype twice")
    return tuple(names)


def run(args: argparse.Namespace) -> int:
    """Score and print. Raises UsageError, and as compiling, loading and running do."""
    from sinterlm.bench.eval import evaluate
    from sinterlm.bench.eval_server import find_server
    from sinterlm.bench.eval_text import read_text, shipped_text
    from sinterlm.commands.ui import TerminalProgress

    _check(args)
    server = find_server(args.server, args.server_model) if args.server else None
    text = shipped_text() if args.text is None else read_text(Path(args.text))
    options, engine = options_of(args)
    if args.max_num_seqs is None:
        engine = replace(engine, max_num_seqs=1)  # one window at a time: no more KV cache than that
    with TerminalProgress() as progress:
        openers = {
            dtype: _opener(dtype, options, engine, progress) for dtype in {_REFERENCE, *args.dtypes}
        }
        report = evaluate(
            openers,
            args.dtypes,
            text,
            progress,
            window=args.max_tokens_per_window,
            stride=args.stride,
            server=server,
        )
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, **asdict(report)}))
    else:
        print_report(args.model, report)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that eval decides itself, and bundles. Raises UsageError."""
    from sinterlm.artifact.bundle import is_bundle

    if args.dtype is not None:
        raise UsageError("eval compares dtypes; name them with --dtypes instead of --dtype")
    if args.quantization is not None:
        raise UsageError("eval compares; name int8 or int4 in --dtypes instead of --quantization")
    if args.kv_cache_dtype is not None:
        raise UsageError("eval compares; name bf16+kv8 in --dtypes instead of --kv-cache-dtype")
    if args.server_model is not None and args.server is None:
        raise UsageError("--server-model names a model of --server, which is not given")
    if args.code_only:
        raise UsageError("--code-only leaves nothing to run; it belongs to `sinterlm compile`")
    if args.bundle_sha256 is not None:
        raise UsageError("--bundle-sha256 pins one bundle, and eval compares several")
    if is_bundle(args.model):
        raise UsageError(
            f"{args.model} is a bundle, which has but one dtype; give the checkpoint it was "
            "compiled from"
        )


def _opener(
    dtype: str, options: CompileOptions, engine: EngineOptions, progress: Progress
) -> Callable[[], AbstractContextManager[Scorer]]:
    """Opens the model in ``dtype``; groups and activations matter to codes alone."""
    if dtype.endswith(_KV8):
        options = replace(options, kv_cache_dtype="int8")
    weights = dtype.removesuffix(_KV8)
    if weights in ("int8", "int4"):
        options = replace(options, quantization="int8" if weights == "int8" else "int4")
    else:
        wide: DTypeName = "fp32" if weights == "fp32" else "bf16"
        options = replace(options, dtype=wide, quant_group=None, act_dtype=None)

    @contextmanager
    def open_model() -> Iterator[Scorer]:
        from sinterlm.compile import compile_model
        from sinterlm.engine.llm import LLM
        from sinterlm.engine.memory import check_options

        check_options(engine)
        bundle = compile_model(options, progress)
        progress.stage(f"load {dtype}")
        with LLM.from_bundle(bundle, engine) as llm:
            yield llm

    return open_model


def print_report(model: str, report: EvalReport) -> None:
    """The table on stdout: one row per dtype."""
    from sinterlm.commands.ui import print_table

    columns = ["dtype", "tokens", "perplexity", "KL, nats", "95 % interval", "same top-1",
               "max |Δ| p50", "p99", "p99.9"]  # fmt: skip
    rows = [_row(score) for score in report.scores]
    print_table(
        f"{model}: KL({report.reference}‖dtype) and logits' Δ to it",
        columns,
        rows,
        right=range(1, 9),
    )
    print(
        f"{report.text_tokens} tokens of text in {report.num_windows} windows of at most "
        f"{report.window_tokens}, stride {report.stride}; text sha256 {report.text_sha256[:12]}"
    )


def _row(score: Score) -> list[str]:
    told = "not told" if score.perplexity is None else f"{score.perplexity:.4f}"
    head = [score.dtype, str(score.tokens), told]
    far = score.divergence
    if far is None:
        return [*head, "reference", *[""] * 5]
    between = far.kl_interval
    interval = "one window" if between is None else f"{between[0]:.2e} … {between[1]:.2e}"
    deltas = [f"{delta:.4f}" for delta in far.max_logit_delta.values()]
    return [*head, f"{far.kl:.3e}", interval, f"{far.top1_agreement:.2%}", *deltas]
