"""The nouns of the compiler: what a decoder is (DecoderConfig), and a Graph of typed ops over it.

A Graph is straight-line SSA: each op is a frozen dataclass (``ops.py``) that names the values it
reads and writes and the checkpoint tensors it uses. Nothing here computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinterlm.ir.ops import Op
    from sinterlm.ir.quant import GemmFormat


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, reduced to data: angle(p, i) = p * inv_freq[i] (computed in float64)."""

    inv_freq: tuple[float, ...]  #: length head_dim / 2
    attention_factor: float = 1.0  #: multiplies cos and sin (yarn's mscale)
    kind: str = "default"  #: default | linear | dynamic | llama3 | yarn (for people, not for code)


@dataclass(frozen=True)
class DecoderConfig:
    """One parametric decoder covers Llama, Qwen2, Qwen3 and Mistral. Set by the frontend."""

    architecture: str  #: e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int  #: tokens
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    qk_norm: bool = False  #: Qwen3: RMSNorm over each head of q and k, before rope
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_windows: tuple[int, ...] = ()  #: per layer, tokens; 0 = full attention

    @property
    def attention_scale(self) -> float:
        """Factor on q·k: head_dim ** -0.5."""
        return math.pow(self.head_dim, -0.5)

    @property
    def group_size(self) -> int:
        """Query heads per KV head (GQA)."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Value:
    """A tensor between ops. ``shape`` may hold the symbols "T" (tokens in the step), "R" (rows
    sampled); every other dimension is an int. dtype: "fp32" | "bf16" | "i32"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Weight:
    """A checkpoint tensor by its Hugging Face name, shape [out, in] (or [n] for vectors)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Ops in execution order plus the tables of values and weights they name."""

    config: DecoderConfig
    dtype: str  #: dtype of GEMM operands, q, and KV unless it is int8 or fp8: "bf16" | "fp32"
    ops: tuple[Op, ...]
    values: dict[str, Value] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    #: Matrices that are stored in codes, by name; one that is not here is wide (``dtype``). Set by
    #: ``passes.formats``. Weights that one GEMM reads together have one format.
    formats: dict[str, GemmFormat] = field(default_factory=dict)
    kv_in_codes: bool = False  #: KV is int8, one scale per token and KV head for K and one for V
    #: KV is fp8, e4m3: what numbers of k, and of v, are times in each layer; () = it is not.
    kv_scales: tuple[tuple[float, float], ...] = ()
    #: Ranks that share the model out; config, shapes and weights are those of one of them, and the
    #: projections back to the residual stream end in a sum over all.
    num_ranks: int = 1

    @property
    def kv_dtype(self) -> str:
        """What KV is stored in: ``dtype``, "int8" or "fp8"."""
        return "int8" if self.kv_in_codes else "fp8" if self.kv_scales else self.dtype
