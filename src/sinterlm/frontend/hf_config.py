"""A Hugging Face ``config.json`` becomes a DecoderConfig, by typed reads.

Reads Llama, Qwen2, Qwen3 and Mistral in both spellings in use (transformers 4 and 5). Refuses by
name whatever would change the mathematics: other architectures and activations, quantised
checkpoints, experts, softcapping, partial rotation, scaling multipliers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.fields import MAX_INT, Fields, show
from sinterlm.frontend.quantization_config import read_quantization
from sinterlm.frontend.rope import RopeLimits, read_rope
from sinterlm.ir.graph import DecoderConfig


@dataclass(frozen=True)
class Family:
    """What an architecture implies beyond its config keys (defaults as in transformers)."""

    model_type: str
    qkv_bias: bool = False  #: always there, whatever the config says
    has_attention_bias_key: bool = False  #: ``attention_bias`` governs q, k, v and o
    has_mlp_bias_key: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  #: when the key is absent; None = hidden_size / heads
    window: str = "none"  #: none | all ("sliding_window" alone) | layers (Qwen's three keys)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", has_attention_bias_key=True, has_mlp_bias_key=True),
    "MistralForCausalLM": Family("mistral", window="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window="layers"),
    "Qwen3ForCausalLM": Family(
        "qwen3", has_attention_bias_key=True, qk_norm=True, head_dim=128, window="layers"
    ),
}

#: Upper bounds: several times the largest model of each kind in existence.
MAX_VOCAB, MAX_HIDDEN, MAX_LAYERS, MAX_HEADS = 1 << 22, 1 << 17, 1 << 10, 1 << 12
MAX_HEAD_DIM, MAX_INTERMEDIATE = 1 << 10, 1 << 20

#: Window in tokens that transformers assumes where the key is absent (null means none).
_DEFAULT_WINDOW = 4096

#: Keys that change the mathematics, with the values that leave it alone.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "clip_qkv": (None, 0),
    "alibi": (None, False),
    "use_qk_norm": (None, False),
    "use_mrope": (None, False),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "dual_chunk_attention_config": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "moe_intermediate_size": (None, 0),
    "kv_lora_rank": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "is_causal": (None, True),
    "vision_config": (None,),
    "text_config": (None,),
}


def read_config(
    data: Mapping[str, Any], max_model_len: int | None = None, *, what: str = "config.json"
) -> DecoderConfig:
    """Config of a decoder from the contents of ``config.json``.

    ``max_model_len`` (tokens) matters to dynamic rope alone: its NTK base is fixed for sequences of
    that length (None, or up to ``max_position_embeddings``: the frequencies are left unchanged).
    ``what`` names the file in errors. Raises CheckpointError, UnsupportedModelError.
    """
    fields = Fields(data, what)
    architecture = _architecture(fields)
    family = FAMILIES[architecture]
    _refuse_unsupported(fields)
    hidden = fields.integer("hidden_size", high=MAX_HIDDEN)
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    head_dim = _head_dim(fields, family, hidden, heads)
    positions = fields.integer("max_position_embeddings", high=MAX_INT)
    rope, positions = read_rope(fields, RopeLimits(head_dim, positions, max_model_len))
    attention_bias = family.has_attention_bias_key and fields.boolean("attention_bias", False)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", high=MAX_INTERMEDIATE),
        max_position_embeddings=positions,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.has_mlp_bias_key and fields.boolean("mlp_bias", False),
        sliding_windows=_windows(fields, family, layers),
    )


def with_tensors(config: DecoderConfig, names: Collection[str]) -> DecoderConfig:
    """Config with every bias the checkpoint holds switched on, whatever ``config.json`` says. Which
    of them are missing is found by ``check_tensors``."""

    def present(*projections: str) -> bool:
        suffixes = tuple(f".{projection}.bias" for projection in projections)
        return any(name.startswith("model.layers.") and name.endswith(suffixes) for name in names)

    return replace(
        config,
        qkv_bias=config.qkv_bias or present("q_proj", "k_proj", "v_proj"),
        o_bias=config.o_bias or present("o_proj"),
        mlp_bias=config.mlp_bias or present("gate_proj", "up_proj", "down_proj"),
    )


def _architecture(fields: Fields) -> str:
    """The one architecture named, or that of ``model_type`` when none is."""
    named = fields.data.get("architectures")
    model_type = None if fields.absent("model_type") else fields.text("model_type")
    if named is None:
        named = [a for a, family in FAMILIES.items() if family.model_type == model_type]
        named = named or [f"model_type {model_type}"]
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise fields.error("architectures", named, "a list of one name")
    name = named[0]
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{fields.what}: architecture {show(name)} is not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    if model_type not in (None, FAMILIES[name].model_type):
        raise UnsupportedModelError(
            f"{fields.what}: model_type {show(model_type)} does not belong to architecture {name}; "
            f"supported: {FAMILIES[name].model_type!r}"
        )
    return name


def _refuse_unsupported(fields: Fields) -> None:
    read_quantization(fields)
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{fields.what}: hidden_act {show(activation)} is not supported; supported: silu"
        )
    for key, neutral in _NEUTRAL.items():
        value = fields.data.get(key)
        if value not in neutral:
            raise UnsupportedModelError(
                f"{fields.what}: {key!r} is {show(value)}, a feature that is not supported; "
                f"supported: leaving it out ({', '.join(FAMILIES)} do not use it)"
            )


def _head_dim(fields: Fields, family: Family, hidden: int, heads: int) -> int:
    head_dim = fields.optional_integer("head_dim", high=MAX_HEAD_DIM) or family.head_dim
    if head_dim is None:
        if hidden % heads:
            raise CheckpointError(
                f"{fields.what}: hidden_size {hidden} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        head_dim = hidden // heads
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise fields.error("head_dim", head_dim, f"an even number up to {MAX_HEAD_DIM}")
    return head_dim


def _num_kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads", heads, high=MAX_HEADS)
    if heads % kv_heads:
        raise CheckpointError(
            f"{fields.what}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    return kv_heads


def _windows(fields: Fields, family: Family, layers: int) -> tuple[int, ...]:
    """Per layer, tokens (0 = full attention); empty when no layer has a window."""
    if family.window == "none":
        return ()
    if "sliding_window" in fields.data:
        window = fields.optional_integer("sliding_window", low=0, high=MAX_INT) or 0
    else:
        window = _DEFAULT_WINDOW
    if family.window == "all":
        return (window,) * layers if window else ()
    if not fields.boolean("use_sliding_window", False):
        window = 0
    kinds = fields.data.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, low=0, high=MAX_INT)
        windows = tuple(window if i >= first else 0 for i in range(layers))
    else:
        windows = _windows_of_kinds(fields, kinds, layers, window)
    return windows if any(windows) else ()


def _windows_of_kinds(fields: Fields, kinds: object, layers: int, window: int) -> tuple[int, ...]:
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.error("layer_types", kinds, f"a list of {layers} names")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise UnsupportedModelError(
                f"{fields.what}: layer type {show(kind)} is not supported; supported: "
                f"{', '.join(known)}"
            )
        if kind == "sliding_attention" and not window:
            raise fields.error("use_sliding_window", False, "true, as layer_types has sliding ones")
    return tuple(known[kind] for kind in kinds)
