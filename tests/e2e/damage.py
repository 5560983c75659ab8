"""Ways to damage a checkpoint folder, each by name, and what the error message must say.

All work on a copy of ``llama-llama3-gqa4`` (two shards with an index, fp16, no tokenizer).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
NORM = "model.norm.weight"

Damage = Callable[[Path], None]
Arrays = dict[str, NDArray[np.generic]]


def edit_config(**changes: object) -> Damage:
    """Set fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config.pop(key, None)
            if value is not None:
                config[key] = value
        path.write_text(json.dumps(config))

    return damage


def delete(name: str) -> Damage:
    """Remove one file."""
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Damage:
    """Replace one file's content."""
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(name: str, keep: float) -> Damage:
    """Cut a file to this fraction of its length."""

    def damage(folder: Path) -> None:
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return damage


def edit_tensors(change: Callable[[Arrays], None]) -> Damage:
    """Rewrite the shard that holds the final norm's weight."""

    def damage(folder: Path) -> None:
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)

    return damage


def _wrong_shape(arrays: Arrays) -> None:
    arrays[NORM] = np.zeros(71, np.float16)


def _wrong_dtype(arrays: Arrays) -> None:
    arrays[NORM] = np.zeros(72, np.int32)


def _missing(arrays: Arrays) -> None:
    del arrays[NORM]


def _no_safetensors(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def _pickle_only(folder: Path) -> None:
    _no_safetensors(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def _absent_shard_in_index(folder: Path) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "../secret.safetensors"
    path.write_text(json.dumps(index))


_HUGE_HEADER = struct.pack("<Q", 2**63) + b"{}"

#: name -> (damage, words the message must hold)
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no-config": (delete("config.json"), ("config.json",)),
    "config-not-json": (overwrite("config.json", b'{"hidden_size": '), ("config.json",)),
    "config-a-list": (overwrite("config.json", b"[1]"), ("config.json",)),
    "config-too-deep": (overwrite("config.json", b"[" * 100_000), ("config.json",)),
    "no-hidden-size": (edit_config(hidden_size=None), ("hidden_size",)),
    "hidden-size-a-text": (edit_config(hidden_size="big"), ("hidden_size", "big")),
    "negative-layers": (edit_config(num_hidden_layers=-1), ("num_hidden_layers", "-1")),
    "uneven-heads": (edit_config(num_key_value_heads=3), ("num_key_value_heads", "3")),
    "unknown-architecture": (
        edit_config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ("gpt2", "LlamaForCausalLM"),
    ),
    "unknown-activation": (edit_config(hidden_act="gelu_new"), ("gelu_new", "silu")),
    "unknown-rope": (
        edit_config(rope_scaling={"rope_type": "spiral", "factor": 2.0}), ("spiral", "yarn"),
    ),
    "partial-rotary": (edit_config(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
    "quantized": (
        edit_config(quantization_config={"quant_method": "aqlm"}), ("aqlm", "awq"),
    ),
    "no-shard": (delete(FIRST), (FIRST,)),
    "no-weights": (_no_safetensors, ("safetensors",)),
    "pickle-only": (_pickle_only, ("safetensors",)),
    "half-a-shard": (truncate(FIRST, 0.5), (FIRST,)),
    "half-a-header": (truncate(FIRST, 0.001), (FIRST,)),
    "empty-shard": (truncate(FIRST, 0.0), (FIRST,)),
    "huge-header": (overwrite(FIRST, _HUGE_HEADER), (FIRST,)),
    "index-not-json": (truncate(INDEX, 0.5), (INDEX,)),
    "index-leads-out": (_absent_shard_in_index, ("secret",)),
    "wrong-shape": (edit_tensors(_wrong_shape), (NORM, "71", "72")),
    "wrong-dtype": (edit_tensors(_wrong_dtype), (NORM, "I32")),
    "missing-tensor": (edit_tensors(_missing), (NORM,)),
    "smaller-vocabulary": (edit_config(vocab_size=130), ("131", "130")),
}  # fmt: skip
