"""Configs of models that people run inside vLLM, at a tiny width, and random weights for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sinterlm.frontend.source import resolve_model

_TINY: dict[str, Any] = {
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 515,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _qwen2(**changes: Any) -> dict[str, Any]:
    shape = {name: value for name, value in _TINY.items() if name != "head_dim"}
    return {
        **shape, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e6,
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2, **changes,
    }  # fmt: skip


def _llama(**changes: Any) -> dict[str, Any]:
    return {
        **_TINY, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE, "rms_norm_eps": 1e-5,
        "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, **changes,
    }  # fmt: skip


#: The spelling of each model's own config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5": _qwen2(tie_word_embeddings=True),
    "deepseek-r1-distill-qwen": _qwen2(rope_theta=10000, use_mrope=False),
    "deepseek-r1-distill-llama": _llama(),
    "llama-3.2": _llama(tie_word_embeddings=True, rope_scaling={**_LLAMA3_ROPE, "factor": 32.0}),
    "mistral": {
        **_TINY, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "rope_theta": 1e6, "sliding_window": None,
    },
    "qwen3": {
        **_TINY, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6,
        "attention_bias": False, "use_sliding_window": False, "tie_word_embeddings": True,
    },
}  # fmt: skip


def write_tiny(name: str, folder: Path) -> Path:
    """The model ``name`` as a Hugging Face folder without a tokenizer; its matrices are large
    enough that what a token attends to decides what follows."""
    made = folder / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    with resolve_model(str(made), load_format="dummy", seed=7) as checkpoint:
        arrays = {tensor: checkpoint.read(tensor, "fp32") for tensor in checkpoint.tensors}
    wide = {tensor: a * np.float32(6 if a.ndim == 2 else 1) for tensor, a in arrays.items()}
    save_file(wide, made / "model.safetensors")
    return made
