"""Configurations known by name, for dummy weights: ``config.json`` contents at the real shapes."""

from __future__ import annotations

from typing import Any


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **changes: Any
) -> dict[str, Any]:
    """What the Qwen2.5 family has in common, with the given changes."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 152064,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    } | changes


def named_configs() -> dict[str, dict[str, Any]]:
    """A fresh table: name -> contents of the model's ``config.json``."""
    small = {"tie_word_embeddings": True, "vocab_size": 151936}
    return {
        "qwq-32b": _qwen2(5120, 27648, 64, 40, 8, max_position_embeddings=40960, rms_norm_eps=1e-5),
        "llama-3.1-8b": _llama_3_1_8b(),
        "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, **small),
        "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, **small),
        "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4),
    }


def _llama_3_1_8b() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }
