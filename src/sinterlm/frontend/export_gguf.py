"""Writes a checkpoint as GGUF in bf16, q8_0 or q4_0, for engines that read nothing else.

Block formats are those of the ``gguf`` package: round to nearest, no importance matrix. In q4_0 the
embedding and the head stay q8_0, and vectors are always fp32. Refuses scaled rope.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.artifact.progress import Progress
from sinterlm.artifact.storage import require_space
from sinterlm.artifact.text import TextAssets
from sinterlm.errors import UnsupportedModelError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.frontend.export_hf import config_contents
from sinterlm.frontend.gguf import gguf_name, redo_interleave
from sinterlm.frontend.numeric import fp32_to_bf16

if TYPE_CHECKING:
    from gguf import GGUFWriter

GgufFormat = Literal["bf16", "q8_0", "q4_0"]
GGUF_FORMATS: tuple[GgufFormat, ...] = ("bf16", "q8_0", "q4_0")

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  #: kinds of tokens


def write_gguf(
    path: Path, checkpoint: Checkpoint, text: TextAssets, kind: GgufFormat, progress: Progress
) -> None:
    """Write ``checkpoint`` with the tokenizer of ``text`` at ``path``.

    Raises UnsupportedModelError for scaled rope, ResourceError for want of room.
    """
    from gguf import GGUFWriter

    architecture = _ARCHITECTURES[checkpoint.config.architecture]
    writer = GGUFWriter(path, architecture)
    _add_config(writer, checkpoint)
    _add_tokens(writer, text, checkpoint.config.vocab_size)
    names = sorted(checkpoint.tensors)
    total = sum(_add_info(writer, checkpoint, name, kind) for name in names)
    require_space(path.parent, total)
    progress.stage(f"write {kind} GGUF", total, "B")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        data = _encoded(checkpoint, name, kind, architecture)
        writer.write_tensor_data(data)
        progress.advance(data.nbytes)
    writer.close()


def _add_config(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    contents = config_contents(config)  # refuses scaled rope
    writer.add_name(checkpoint.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(contents["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokens(writer: GGUFWriter, text: TextAssets, vocab_size: int) -> None:
    """The byte-level vocabulary, filled up to the rows of the embedding."""
    assert text.tokenizer_json is not None, "a benchmark's checkpoint has a tokenizer"
    data: dict[str, Any] = json.loads(text.tokenizer_json)
    model = data["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(data["decoder"]):
        raise UnsupportedModelError("only byte-level BPE tokenizers are written as GGUF")
    by_id = {index: token for token, index in model["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in data.get("added_tokens", [])}
    by_id |= special
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [
        _CONTROL if i in special else _NORMAL if i in by_id else _UNUSED for i in range(vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_add_bos_token(bool(text.add_bos_token))
    if text.bos_token_id is not None:
        writer.add_bos_token_id(text.bos_token_id)
    for eos in text.eos_token_ids[:1]:
        writer.add_eos_token_id(eos)
    if text.chat_template is not None:
        writer.add_chat_template(text.chat_template)


def _stored_as(checkpoint: Checkpoint, name: str, kind: GgufFormat) -> str:
    """Format of one tensor."""
    shape = checkpoint.tensors[name].shape
    if len(shape) == 1:
        return "fp32"
    if kind == "bf16" or shape[-1] % 32:
        return "bf16"
    is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
    return "q8_0" if is_table else kind


def _add_info(writer: GGUFWriter, checkpoint: Checkpoint, name: str, kind: GgufFormat) -> int:
    """Announce a tensor; returns its bytes."""
    from gguf import GGMLQuantizationType, quants

    shape = checkpoint.tensors[name].shape
    stored = _stored_as(checkpoint, name, kind)
    number = GGMLQuantizationType["F32" if stored == "fp32" else stored.upper()]
    if stored == "fp32":
        nbytes = 4 * int(np.prod(shape))
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes)
        return nbytes
    row_bytes = quants.quant_shape_to_byte_shape(shape, number)
    nbytes = int(np.prod(row_bytes))
    writer.add_tensor_info(gguf_name(name), row_bytes, np.dtype(np.uint8), nbytes, number)
    return nbytes


def _encoded(
    checkpoint: Checkpoint, name: str, kind: GgufFormat, architecture: str
) -> NDArray[Any]:
    """Bytes of one tensor; llama files interleave the rows of q and k."""
    from gguf import GGMLQuantizationType, quants

    stored = _stored_as(checkpoint, name, kind)
    values = checkpoint.read(name, "fp32")
    config = checkpoint.config
    if architecture == "llama" and ".self_attn.q_proj." in name:
        values = redo_interleave(values, config.num_heads)
    if architecture == "llama" and ".self_attn.k_proj." in name:
        values = redo_interleave(values, config.num_kv_heads)
    if stored == "fp32":
        return np.asarray(values, np.float32)
    if stored == "bf16":
        return fp32_to_bf16(values).view(np.uint8)
    number = GGMLQuantizationType[stored.upper()]
    parts = [quants.quantize(part, number) for part in _row_groups(values)]
    return np.concatenate(parts)


def _row_groups(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Rows in groups of some megabytes: the package makes several copies of what it is given."""
    step = max(1, (1 << 22) // values.shape[1])
    for first in range(0, values.shape[0], step):
        yield np.ascontiguousarray(values[first : first + step])
