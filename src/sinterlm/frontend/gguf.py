"""GgufCheckpoint: a ``.gguf`` file under Hugging Face's tensor names, as floats or as codes.

Blocks are decoded by the ``gguf`` package, after ``gguf_header`` has checked where they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.frontend.gguf_codes import FORMATS, read_blocks
from sinterlm.frontend.gguf_config import architecture_of, read_gguf_config
from sinterlm.frontend.gguf_header import BLOCK_TYPES, BlockType, GgufTensor, read_gguf_header
from sinterlm.frontend.gguf_tokenizer import read_gguf_text
from sinterlm.frontend.hf_config import with_tensors
from sinterlm.frontend.numeric import CHUNK, STORAGE, Array, ReadDType, convert, fp32_to_bf16
from sinterlm.frontend.rope import divide_rope
from sinterlm.frontend.weights import MappedFiles
from sinterlm.ir.quant import CodedMatrix, GemmFormat

_ROPE_FACTORS = "rope_freqs.weight"
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufCheckpoint(Checkpoint):
    """One GGUF file. Opening it checks the header and reads the config, not the weights.

    Llama files store the rows of q and k so that rotated pairs are neighbours; they are handed out
    in Hugging Face's order, where pairs are half a head apart.
    """

    def __init__(
        self, path: Path, *, name: str | None = None, max_model_len: int | None = None
    ) -> None:
        self.path, self.files = path, (path,)
        self.name = name or path.stem
        header = read_gguf_header(path)
        self._metadata = header.metadata
        self._architecture = architecture_of(path, header.metadata)
        self._maps = MappedFiles()
        shapes = {name: tensor.info.shape for name, tensor in header.tensors.items()}
        config = read_gguf_config(path, header.metadata, shapes, max_model_len)
        self._stored = {
            hugging_face_name(name): tensor
            for name, tensor in header.tensors.items()
            if name != _ROPE_FACTORS
        }
        self.tensors = {name: tensor.info for name, tensor in self._stored.items()}
        self.config = with_tensors(config, self.tensors)
        if _ROPE_FACTORS in header.tensors:
            self._scale_rope(header.tensors[_ROPE_FACTORS])

    @cached_property
    def _assets(self) -> TextAssets:
        assert self.path is not None
        assets = read_gguf_text(self.path, self._metadata, self._architecture)
        num_tokens = len(self._metadata.get("tokenizer.ggml.tokens", []))
        if num_tokens > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: {num_tokens} tokens, but the embedding has only "
                f"{self.config.vocab_size} rows"
            )
        return assets

    @property
    def text(self) -> TextAssets:
        """Tokenizer and chat template from the file's metadata."""
        return self._assets

    def read(self, name: str, dtype: ReadDType) -> Array:
        """See Checkpoint.read; dequantised to fp32 and from there rounded once."""
        self._info(name)
        values = self._values(self._stored[name], dtype)
        heads = self._interleaved_heads(name)
        return _undo_interleave(values, heads) if heads else values

    @property
    def stored_formats(self) -> dict[str, GemmFormat]:
        """See Checkpoint.stored_formats: every matrix of Q4_0, Q4_1 or Q8_0."""
        return {
            name: FORMATS[info.dtype]
            for name, info in self.tensors.items()
            if info.dtype in FORMATS and len(info.shape) == 2
        }

    def read_coded(self, name: str, form: GemmFormat) -> CodedMatrix | None:
        """See Checkpoint.read_coded."""
        if not self.keeps(name, form):
            return None
        assert self.path is not None
        info = self._info(name)
        raw = self._maps.bytes_at(self.path, self._stored[name].offset, info.nbytes)
        found, heads = read_blocks(raw, info.dtype, info.shape), self._interleaved_heads(name)
        if not heads:
            return found
        return CodedMatrix(
            codes=_undo_interleave(found.codes, heads),
            scales=_undo_interleave(found.scales, heads),
            offsets=None if found.offsets is None else _undo_interleave(found.offsets, heads),
            bits=found.bits,
            group=found.group,
        )

    def close(self) -> None:
        """Drop the file map."""
        self._maps.close()

    def _values(self, tensor: GgufTensor, dtype: ReadDType) -> Array:
        assert self.path is not None
        info = tensor.info
        raw = self._maps.bytes_at(self.path, tensor.offset, info.nbytes)
        if info.dtype in STORAGE:
            return convert(raw.view(STORAGE[info.dtype]).reshape(info.shape), info.dtype, dtype)
        out = np.empty(info.shape, np.uint16 if dtype == "bf16" else np.float32)
        flat = out.reshape(-1)
        number, block = next((n, b) for n, b in BLOCK_TYPES.items() if b.name == info.dtype)
        step = CHUNK // block.elements
        for first in range(0, info.nbytes // block.nbytes, step):
            part = raw[first * block.nbytes : (first + step) * block.nbytes]
            values = _dequantize(part, number, block)
            at = first * block.elements
            flat[at : at + values.size] = fp32_to_bf16(values) if dtype == "bf16" else values
        return out

    def _stored_bytes(self, name: str) -> Iterator[memoryview]:
        assert self.path is not None
        tensor = self._stored[name]
        return self._maps.pieces(self.path, tensor.offset, tensor.info.nbytes)

    def _digest_prefix(self) -> str:
        """The order of q and k rows depends on the architecture and the heads."""
        config = self.config
        return f"gguf {self._architecture} {config.num_heads} {config.num_kv_heads}"

    def _interleaved_heads(self, name: str) -> int:
        """Number of heads whose rows this tensor interleaves; 0 when it does not."""
        if self._architecture != "llama" or not name.startswith("model.layers."):
            return 0
        if ".self_attn.q_proj." in name:
            return self.config.num_heads
        return self.config.num_kv_heads if ".self_attn.k_proj." in name else 0

    def _scale_rope(self, tensor: GgufTensor) -> None:
        factors = self._values(tensor, "fp32")
        what = f"{self.path}: tensor {_ROPE_FACTORS!r}"
        self.config = replace(self.config, rope=divide_rope(self.config.rope, factors, what))


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name with no counterpart is returned unchanged."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.(weight|bias)", name, re.ASCII)
    if match is None or match[2] not in _PER_LAYER:
        return name
    return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """Inverse of ``hugging_face_name``; a name with no counterpart is returned unchanged."""
    for stored, ours in _GLOBAL.items():
        if ours == name:
            return stored
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name, re.ASCII)
    theirs = {ours: theirs for theirs, ours in _PER_LAYER.items()}
    if match is None or match[2] not in theirs:
        return name
    return f"blk.{match[1]}.{theirs[match[2]]}.{match[3]}"


def _dequantize(raw: Array, number: int, block: BlockType) -> NDArray[np.float32]:
    """float32 [elements] of whole blocks, uint8 [n * block.nbytes]."""
    from gguf import GGMLQuantizationType, quants  # here: it takes 0.3 s to import

    with np.errstate(all="ignore"):  # a block may hold an infinite scale; it stays what it is
        # one row per call: the package loops over groups of rows in Python
        values = quants.dequantize(raw.reshape(1, -1), GGMLQuantizationType(number))
    assert values.size == raw.size // block.nbytes * block.elements
    return np.asarray(values, np.float32).reshape(-1)


def _undo_interleave(rows: Array, heads: int) -> Array:
    """Rows (or bias entries) of each head from order (pair, half) to order (half, pair)."""
    if rows.shape[0] % (2 * heads):
        return rows  # a wrong shape, which check_tensors reports
    pairs = rows.shape[0] // heads // 2
    split = rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(split.reshape(rows.shape))


def redo_interleave(rows: Array, heads: int) -> Array:
    """Inverse of ``_undo_interleave``: rows of each head from (half, pair) to (pair, half)."""
    pairs = rows.shape[0] // heads // 2
    split = rows.reshape(heads, 2, pairs, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(split.reshape(rows.shape))
