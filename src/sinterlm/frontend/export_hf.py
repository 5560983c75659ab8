"""Writes a checkpoint as a Hugging Face folder: config, bf16 safetensors, tokenizer.

For benchmarks, where every engine must load the same bytes. Refuses what is no plain decoder with
default rope, unless its ``config.json`` is brought along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.artifact.progress import Progress
from sinterlm.artifact.storage import require_space
from sinterlm.artifact.text import TextAssets
from sinterlm.errors import UnsupportedModelError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.ir.graph import DecoderConfig

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def write_hf_folder(
    folder: Path,
    checkpoint: Checkpoint,
    text: TextAssets,
    progress: Progress,
    config_json: Mapping[str, Any] | None = None,
) -> None:
    """Write ``checkpoint`` with the tokenizer of ``text`` into the existing, empty ``folder``.

    ``config_json``: contents of its ``config.json``; None = made from the config. Raises
    UnsupportedModelError, ResourceError.
    """
    config = dict(config_json or config_contents(checkpoint.config))
    config["bos_token_id"] = text.bos_token_id
    config["eos_token_id"] = text.eos_token_ids[0] if text.eos_token_ids else None
    _write_json(folder / "config.json", config)
    _write_text(folder, text)
    write_safetensors(folder / "model.safetensors", checkpoint, progress)


def config_contents(config: DecoderConfig) -> dict[str, Any]:
    """``config.json`` of a decoder with default rope. Raises UnsupportedModelError for another."""
    rope = config.rope
    if rope.kind != "default" or any(config.sliding_windows):
        raise UnsupportedModelError(
            f"{config.architecture} with {rope.kind} rope or sliding windows is not written; "
            "supported: default rope and full attention"
        )
    theta = (1.0 / rope.inv_freq[1]) ** (config.head_dim / 2)
    return {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": float(f"{config.rms_norm_eps:.6g}"),
        "rope_theta": float(f"{theta:.9g}"),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }


def _write_text(folder: Path, text: TextAssets) -> None:
    assert text.tokenizer_json is not None, "a benchmark's checkpoint has a tokenizer"
    (folder / "tokenizer.json").write_text(text.tokenizer_json, encoding="utf-8")
    settings: dict[str, Any] = {
        **text.special_tokens,
        "add_bos_token": bool(text.add_bos_token),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if text.chat_template is not None:
        settings["chat_template"] = text.chat_template
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", dict(text.special_tokens))
    eos = list(text.eos_token_ids)
    _write_json(
        folder / "generation_config.json",
        {**text.generation, "bos_token_id": text.bos_token_id, "eos_token_id": eos},
    )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, checkpoint: Checkpoint, progress: Progress) -> None:
    """All tensors of ``checkpoint`` in bf16, sorted by name, one file. Raises ResourceError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(checkpoint.tensors):
        shape = checkpoint.tensors[name].shape
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    require_space(path.parent, at)
    progress.stage("write safetensors", at, "B")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(checkpoint.tensors):
            data = np.ascontiguousarray(checkpoint.read(name, "bf16"), np.dtype("<u2"))
            file.write(data.data.cast("B"))
            progress.advance(data.nbytes)
