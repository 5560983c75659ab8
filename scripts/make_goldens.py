"""Regenerate ``tests/goldens`` with Hugging Face transformers in float32 (``make goldens``).

Needs torch, transformers, safetensors, tokenizers, gguf and the demo model; nothing else in the
project does. Running it twice gives the same bytes; other versions of torch move the last bits.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import goldens_smollm2
import goldens_tiny
from goldens_cases import CASES

ROOT = Path(__file__).resolve().parent.parent / "tests" / "goldens"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="tiny, smollm2, or the name of one tiny checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write (tests/goldens)")
    return parser.parse_args()


def main() -> None:
    """Write every golden, then manifest.json with the versions that made them."""
    args = _arguments()
    torch.set_num_threads(1)  # one thread, one order of sums
    torch.manual_seed(0)
    text = (ROOT / "text.txt").read_text(encoding="utf-8")
    for case in CASES:
        if args.only in (None, "tiny", case.name):
            print(goldens_tiny.make(case, args.out / "models", text), flush=True)
    if args.only in (None, "smollm2"):
        goldens_smollm2.make(args.out, text)
    if args.only is None:
        manifest = {
            "made_by": "scripts/make_goldens.py",
            "python": platform.python_version(),
            "machine": platform.machine(),
            "packages": {name: version(name) for name in PACKAGES},
            "models": [case.name for case in CASES],
        }
        path = args.out / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
