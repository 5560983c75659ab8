"""GGUF metadata becomes a DecoderConfig, by way of the ``config.json`` it corresponds to.

Reads the architectures llama (which Mistral models also carry), qwen2 and qwen3. Refuses by name
other architectures, split files, and metadata that changes the mathematics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.fields import MAX_INT, MAX_NUMBER, Fields, show
from sinterlm.frontend.hf_config import MAX_HEAD_DIM, read_config
from sinterlm.ir.graph import DecoderConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

#: Keys after the architecture's prefix that change the mathematics, with the values that do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
}


def read_gguf_config(
    path: Path,
    metadata: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    max_model_len: int | None = None,
) -> DecoderConfig:
    """Config of a GGUF file; ``shapes`` are its tensors' by the file's own names.

    Raises CheckpointError, UnsupportedModelError.
    """
    general = Fields(metadata, str(path))
    name = architecture_of(path, metadata)
    if general.integer("split.count", 1, low=0, high=MAX_INT) > 1:
        raise UnsupportedModelError(
            f"{path}: one part of a split GGUF is not supported; supported: a single file (merge "
            "the parts with `llama-gguf-split --merge`)"
        )
    prefix = f"{name}."
    keys = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    fields = Fields(keys, f"{path}: {name}")
    for key, neutral in _NEUTRAL.items():
        if key in keys and keys[key] not in neutral:
            raise UnsupportedModelError(
                f"{path}: {prefix}{key} is {show(keys[key])}, a feature that is not supported; "
                f"supported: {', '.join(str(value) for value in neutral)}"
            )
    data = _shape_keys(fields, shapes) | _rope_keys(fields)
    data["architectures"] = [_ARCHITECTURES[name]]
    _add_window(fields, name, data)
    head_dim = data["head_dim"]
    if fields.integer("rope.dimension_count", head_dim, high=MAX_HEAD_DIM) != head_dim:
        raise UnsupportedModelError(
            f"{path}: {prefix}rope.dimension_count is {keys['rope.dimension_count']}: rotating "
            f"only part of each head is not supported; supported: head size ({head_dim})"
        )
    return read_config(data, max_model_len, what=str(path))


def architecture_of(path: Path, metadata: dict[str, Any]) -> str:
    """The file's architecture: llama, qwen2 or qwen3; any other is refused by name."""
    name = Fields(metadata, str(path)).text("general.architecture")
    if name not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: GGUF architecture {show(name)} is not supported; supported: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    return name


def _shape_keys(fields: Fields, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    hidden = fields.integer("embedding_length", high=MAX_INT)
    heads = _per_layer(fields, "attention.head_count")
    kv_heads = _per_layer(fields, "attention.head_count_kv", heads)
    if hidden % heads and fields.absent("attention.key_length"):
        raise CheckpointError(
            f"{fields.what}: embedding_length {hidden} is not a multiple of attention.head_count "
            f"{heads}, and there is no attention.key_length"
        )
    head_dim = fields.integer("attention.key_length", hidden // heads, high=MAX_HEAD_DIM)
    if fields.integer("attention.value_length", head_dim, high=MAX_HEAD_DIM) != head_dim:
        raise UnsupportedModelError(
            f"{fields.what}: attention.value_length differs from attention.key_length {head_dim}; "
            "supported: equal lengths"
        )
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise CheckpointError(f"{fields.what}: tensor 'token_embd.weight' of shape [vocabulary, "
                              f"{hidden}] is missing")  # fmt: skip
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": fields.integer("block_count", high=MAX_INT),
        "intermediate_size": _per_layer(fields, "feed_forward_length"),
        "max_position_embeddings": fields.integer("context_length", high=MAX_INT),
        "rms_norm_eps": shortest(fields.number("attention.layer_norm_rms_epsilon")),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _per_layer(fields: Fields, key: str, default: int | None = None) -> int:
    """An integer, which may also be given as a list of equal ones, one per layer."""
    value = fields.data.get(key)
    if isinstance(value, list):
        if not value or any(item != value[0] for item in value):
            raise UnsupportedModelError(
                f"{fields.what}: {key} differs between layers ({show(value)}); supported: one "
                "value for all layers"
            )
        fields = Fields({key: value[0]}, fields.what)
    return fields.integer(key, default, high=MAX_INT)


def _rope_keys(fields: Fields) -> dict[str, Any]:
    """``rope_parameters`` as in config.json."""
    params: dict[str, Any] = {"rope_theta": shortest(fields.number("rope.freq_base", 10_000.0))}
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", 1.0, low=0.0)
    if fields.absent("rope.scaling.type") and not fields.absent("rope.scale_linear"):
        kind, factor = "linear", fields.number("rope.scale_linear")
    factor = shortest(factor)
    params["rope_type"] = "default" if kind == "none" else kind
    if kind == "linear" and factor in (0.0, 1.0):
        params["rope_type"] = "default"
    elif kind == "linear":
        params["factor"] = factor
    elif kind == "yarn":
        params |= _yarn_keys(fields, factor)
    return {"rope_parameters": params}


def _yarn_keys(fields: Fields, factor: float) -> dict[str, Any]:
    """llama.cpp's yarn keys; its ``attn_factor`` multiplies the factor that yarn implies."""
    keys: dict[str, Any] = {"factor": factor}
    if not fields.absent("rope.scaling.original_context_length"):
        key = "rope.scaling.original_context_length"
        keys["original_max_position_embeddings"] = fields.integer(key, high=MAX_INT)
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if not fields.absent(f"rope.scaling.{theirs}"):
            keys[ours] = shortest(fields.number(f"rope.scaling.{theirs}"))
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if not fields.absent(key) and factor > 0:
            implied = 0.1 * float(np.log(max(factor, 1.0))) + 1.0
            keys["attention_factor"] = implied * shortest(fields.number(key))
    return keys


def _add_window(fields: Fields, name: str, data: dict[str, Any]) -> None:
    """A window makes a llama file a Mistral; Qwen files do not say which layers it applies to."""
    window = fields.optional_integer("attention.sliding_window", low=0, high=MAX_INT) or 0
    if not window or window >= data["max_position_embeddings"]:
        return
    if name != "llama":
        raise UnsupportedModelError(
            f"{fields.what}: attention.sliding_window is {window}; supported: a window in llama "
            "files, none in qwen files"
        )
    data["architectures"] = ["MistralForCausalLM"]
    data["sliding_window"] = window


def shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for: 9.99999974e-06 was written as 1e-05."""
    if not abs(value) <= MAX_NUMBER:
        return value
    return float(np.format_float_positional(np.float32(value), unique=True))
