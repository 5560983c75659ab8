"""A W8A8 twin of a Hugging Face folder, in compressed-tensors' int-quantized format.

    python scripts/w8a8_checkpoint.py build/bench/smollm2/hf build/bench/smollm2-w8a8/hf

Projections become int8 with one scale per output channel (largest magnitude / 127); activations are
declared as dynamic int8 per token. SinterLM and vLLM load the same folder, to compare speed at
equal precision. Rounded to nearest, so for speed, not for quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.frontend.source import resolve_model

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                "dynamic": True,
            },
        }
    },
}  # fmt: skip


def main() -> None:
    """Write the twin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("output", type=Path, help="folder to make")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    with resolve_model(str(args.source)) as checkpoint:
        tensors = quantised(checkpoint)
    save_file(tensors, args.output / "model.safetensors", {"format": "pt"})
    config = json.loads((args.source / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": QUANTIZATION}, indent=2)
    (args.output / "config.json").write_text(text + "\n")
    for file in args.source.glob("*.json"):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, args.output)


def quantised(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    """Projections [N, K] as int8 and their scales [N, 1] float32; other tensors float32."""
    found: dict[str, NDArray[Any]] = {}
    for name in checkpoint.tensors:
        value = np.asarray(checkpoint.read(name, "fp32"))
        if name.endswith("_proj.weight"):
            scale = np.maximum(np.abs(value).max(axis=1, keepdims=True), 1e-12) / 127
            found[name] = np.rint(value / scale).astype(np.int8)
            found[name + "_scale"] = scale.astype(np.float32)
        else:
            found[name] = np.ascontiguousarray(value, np.float32)
    return found


if __name__ == "__main__":
    main()
