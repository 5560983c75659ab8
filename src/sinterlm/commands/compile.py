"""``sinterlm compile``: a checkpoint becomes a bundle in the cache, or in a folder with ``-o``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from sinterlm.commands.flags import add_option_flags, options_from, parse_folder
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions

if TYPE_CHECKING:
    from sinterlm.artifact.bundle import Bundle

MODEL_HELP = (
    "Hugging Face directory, .gguf file, Hub id, bundle, `smollm2`, or with --load-format dummy "
    "the name of a known config"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "-o",
        "--output",
        type=parse_folder,
        metavar="DIR",
        help="also write a self-contained copy of the bundle here",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    add_option_flags(parser, CompileOptions)


def run(args: argparse.Namespace) -> int:
    """Compile and say what was made. Raises what ``compile_model`` and ``export_bundle`` raise."""
    from sinterlm.artifact.bundle import export_bundle
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.compile import compile_model

    start, options = time.perf_counter(), options_from(args, CompileOptions)
    with TerminalProgress() as progress:
        bundle = compile_model(options, progress)
        have = bundle.manifest.max_model_len
        if options.max_model_len not in (None, have):  # only a finished bundle can disagree
            raise UsageError(
                f"--max-model-len {options.max_model_len}, and this bundle was compiled with "
                f"{have}; compile the checkpoint again, or give a shorter context to `sinterlm run`"
            )
        if args.output is not None:
            progress.stage("copy the bundle")
            bundle = export_bundle(bundle, args.output)
    facts = describe(bundle)
    facts["seconds"] = round(time.perf_counter() - start, 3)
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts, args.output if args.output is not None else args.model)
    return 0


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a bundle is, in a few facts; sizes in bytes."""
    manifest = bundle.manifest
    return {
        "model": manifest.model,
        "bundle": str(bundle.root),
        "bundle_sha256": bundle.manifest_sha256,
        "target": manifest.target,
        "isa": manifest.isa,
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "kv_cache_dtype": manifest.kv_cache_dtype,
        "max_model_len": manifest.max_model_len,
        "library_bytes": manifest.library.nbytes,
        "weights_bytes": manifest.weights.nbytes if manifest.weights is not None else 0,
    }


def _print(facts: dict[str, Any], name: object) -> None:
    from sinterlm.artifact.manifest import show_dtypes
    from sinterlm.artifact.storage import show_bytes

    dtypes = show_dtypes(facts["dtype"], facts["quantization"], facts["kv_cache_dtype"])
    print(
        f"{facts['model']}: {dtypes} for {facts['target']} "
        f"({facts['isa']}), "
        f"context {facts['max_model_len']} tokens"
    )
    print(
        f"library {show_bytes(facts['library_bytes'])}, weights "
        f"{show_bytes(facts['weights_bytes'])}, {facts['seconds']:.1f} s"
    )
    print(f"bundle  {facts['bundle']}\nsha256  {facts['bundle_sha256']}")
    if facts["weights_bytes"] and facts["target"] == "cpu":
        print(f"run it with: sinterlm run {name} --chat", file=sys.stderr)
