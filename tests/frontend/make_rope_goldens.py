"""Regenerate rope_goldens.json with Hugging Face transformers (needs torch and transformers).

Run as ``python tests/frontend/make_rope_goldens.py`` where they are installed.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}

#: name -> (changes to the config, sequence length or None)
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "default": ({}, None),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None),
    "llama3": (
        {
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        None,
    ),
    "yarn": (
        {
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
        None,
    ),
    "yarn_mscale": (
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40.0,
                "mscale": 0.707,
                "mscale_all_dim": 1.5,
                "beta_fast": 16,
                "beta_slow": 2,
                "original_max_position_embeddings": 4096,
            },
        },
        None,
    ),
    "yarn_no_truncate": (
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "attention_factor": 1.25,
                "original_max_position_embeddings": 4096,
            },
        },
        None,
    ),
    "dynamic_short": (
        {
            "max_position_embeddings": 2048,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        2048,
    ),
    "dynamic_long": (
        {
            "max_position_embeddings": 2048,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        8192,
    ),
}


def main() -> None:
    """Write what transformers computes for every case."""
    goldens = {}
    for name, (changes, length) in CASES.items():
        data = BASE | changes
        config = LlamaConfig(**copy.deepcopy(data))
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=length)
        goldens[name] = {
            "config": data,
            "max_model_len": length,
            "inv_freq": [float(f) for f in inv_freq],
            "attention_factor": float(factor),
        }
    text = json.dumps(goldens, indent=1) + "\n"
    (Path(__file__).parent / "rope_goldens.json").write_text(text)


if __name__ == "__main__":
    main()
