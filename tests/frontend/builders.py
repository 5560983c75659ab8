"""Small checkpoints, written byte by byte so that tests can also write wrong ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.hf_config import read_config, with_tensors

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

_CODES = {"<u2": "BF16", "<f2": "F16", "<f4": "F32", "|i1": "I8", "<i4": "I32",
          "<i8": "I64", "|u1": "F8_E4M3"}  # fmt: skip
Arrays = dict[str, "np.ndarray[Any, Any]"]


def tiny_config(**changes: Any) -> dict[str, Any]:
    """TINY with changes; None removes a key."""
    return {k: v for k, v in (TINY | changes).items() if v is not None}


def tiny_arrays(data: dict[str, Any], seed: int = 0, extra: tuple[str, ...] = ()) -> Arrays:
    """float32 weights for a config; ``extra`` names bias tensors that its config does not imply."""
    rng = np.random.default_rng(seed)
    graph = build_graph(with_tensors(read_config(data), extra), "fp32")
    return {
        name: rng.standard_normal(weight.shape).astype(np.float32)
        for name, weight in graph.weights.items()
    }


def safetensors_bytes(arrays: Arrays) -> bytes:
    """A well-formed file; uint16 arrays are bf16, uint8 arrays fp8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": _CODES[array.dtype.newbyteorder("<").str.replace("=", "<")],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return frame(json.dumps(header).encode(), data)


def frame(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file around any header."""
    return struct.pack("<Q", len(header)) + header + data


def write_directory(folder: Path, data: dict[str, Any], arrays: Arrays) -> Path:
    """A Hugging Face directory with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays))
    return folder


def write_shards(folder: Path, data: dict[str, Any], arrays: Arrays, num_shards: int = 2) -> Path:
    """The same, spread over shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    weight_map = {}
    for n in range(num_shards):
        shard = f"model-{n + 1:05}-of-{num_shards:05}.safetensors"
        names = list(arrays)[n::num_shards]
        (folder / shard).write_bytes(safetensors_bytes({name: arrays[name] for name in names}))
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ------------------------------------------------------------------------------------------- GGUF

U8, I8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 5, 6, 7, 8, 9, 10
_FORMATS = {U8: "<B", I8: "<b", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
Metadata = dict[str, tuple[Any, ...]]  #: key -> (type, value) or (ARRAY, element type, values)
GgufTensors = dict[str, tuple[tuple[int, ...], int, bytes]]  #: name -> (shape, type number, data)


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    return gguf_string(value) if kind == STRING else struct.pack(_FORMATS[kind], value)


def gguf_bytes(metadata: Metadata, tensors: GgufTensors, alignment: int = 32) -> bytes:
    """A well-formed GGUF file, version 3."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, *rest) in metadata.items():
        out += gguf_string(key) + struct.pack("<I", kind)
        if kind == ARRAY:
            element, values = rest
            out += struct.pack("<IQ", element, len(values))
            out += b"".join(_value(element, value) for value in values)
        else:
            out += _value(kind, rest[0])
    data = b""
    for name, (shape, number, raw) in tensors.items():
        out += gguf_string(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", number, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return out + bytes(-len(out) % alignment) + data


def gguf_metadata(data: dict[str, Any], architecture: str = "llama") -> Metadata:
    """Metadata of a config."""
    a = architecture
    return {
        "general.architecture": (STRING, a),
        f"{a}.block_count": (U32, data["num_hidden_layers"]),
        f"{a}.context_length": (U32, data["max_position_embeddings"]),
        f"{a}.embedding_length": (U32, data["hidden_size"]),
        f"{a}.feed_forward_length": (U32, data["intermediate_size"]),
        f"{a}.attention.head_count": (U32, data["num_attention_heads"]),
        f"{a}.attention.head_count_kv": (U32, data["num_key_value_heads"]),
        f"{a}.attention.layer_norm_rms_epsilon": (F32, data["rms_norm_eps"]),
        f"{a}.rope.freq_base": (F32, data["rope_theta"]),
    }


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{suffix}"
    return f"{_NAMES[stem]}.{suffix}"


def gguf_tensors(arrays: Arrays, data: dict[str, Any], interleave: bool = True) -> GgufTensors:
    """float32 tensors in llama.cpp's names and, where ``interleave``, its order of q and k rows."""
    tensors: GgufTensors = {}
    heads = {"q_proj": data["num_attention_heads"], "k_proj": data["num_key_value_heads"]}
    for name, array in arrays.items():
        which = next((p for p in heads if f".{p}." in name), None)
        if interleave and which:  # as llama.cpp's converter does
            split = array.reshape(heads[which], 2, -1, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        tensors[gguf_name(name)] = (array.shape, 0, array.astype("<f4").tobytes())
    return tensors
