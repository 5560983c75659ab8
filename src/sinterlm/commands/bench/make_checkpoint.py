"""``sinterlm bench make-checkpoint``: one set of weights in every engine's file format.

A named config gets seeded random weights at its shape and SmolLM2's tokenizer; ``smollm2`` is
itself, in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from sinterlm.errors import UsageError

if TYPE_CHECKING:
    from sinterlm.artifact.text import TextAssets
    from sinterlm.frontend.checkpoint import Checkpoint

_FORMATS = ("safetensors", "bf16", "q8_0", "q4_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument(
        "name", metavar="NAME", help="smollm2, or a named config: qwen2.5-0.5b, ..."
    )
    parser.add_argument("--output", type=Path, metavar="DIR", required=True,
                        help="folder to make: DIR/hf and DIR/NAME-*.gguf")  # fmt: skip
    parser.add_argument("--formats", type=_parse_formats, default=_FORMATS, metavar="LIST",
                        help=f"of {','.join(_FORMATS)} (default: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights")


def _parse_formats(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    wrong = next((name for name in names if name not in _FORMATS), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r} is none of {', '.join(_FORMATS)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Write what is not there yet and print where it lies."""
    for path in make_checkpoint(args.name, args.output, args.formats, args.seed):
        print(path)
    return 0


def make_checkpoint(
    name: str, output: Path, formats: tuple[str, ...] = _FORMATS, seed: int = 0
) -> list[Path]:
    """Paths of the files, made unless they are there. Raises UsageError, UnsupportedModelError,
    ResourceError."""
    from sinterlm.artifact.storage import commit, disk_errors, staging
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.frontend.export_gguf import write_gguf
    from sinterlm.frontend.export_hf import write_hf_folder
    from sinterlm.frontend.named_configs import named_configs

    config_json = named_configs().get(name)
    stem = name if name == "smollm2" else f"{name}-seed{seed}"
    made = []
    advice = "give another --output"
    with TerminalProgress() as progress, disk_errors(output, advice):
        checkpoint, text = _source(name, seed)
        with checkpoint:
            for kind in formats:
                is_folder = kind == "safetensors"
                final = output / ("hf" if is_folder else f"{stem}-{kind}.gguf")
                made.append(final)
                if final.exists():
                    continue
                output.mkdir(parents=True, exist_ok=True)
                with staging(output) as folder:
                    if is_folder:
                        write_hf_folder(folder, checkpoint, text, progress, config_json)
                        commit(folder, final)
                    else:
                        write_gguf(folder / final.name, checkpoint, text, kind, progress)  # type: ignore[arg-type]
                        (folder / final.name).replace(final)
    with contextlib.suppress(OSError):
        (output / "tmp").rmdir()  # where files were prepared; another run may still use it
    return made


def _source(name: str, seed: int) -> tuple[Checkpoint, TextAssets]:
    """The weights, and the text of SmolLM2."""
    from sinterlm.frontend.named_configs import named_configs
    from sinterlm.frontend.source import SMOLLM2, resolve_model

    smollm2 = resolve_model(SMOLLM2)
    if name == SMOLLM2:
        return smollm2, smollm2.text
    if name not in named_configs():
        smollm2.close()
        raise UsageError(f"{name!r} is none of {SMOLLM2}, {', '.join(named_configs())}")
    with smollm2:
        return resolve_model(name, load_format="dummy", seed=seed), smollm2.text
