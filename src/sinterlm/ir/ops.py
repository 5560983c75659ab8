"""The op table: every op, plain and fused, as a frozen dataclass of names and numbers.

``reads``/``writes`` are value names in order, ``weights`` checkpoint tensor names (None where an
optional one is absent). Shapes and dtypes of each op are in ``shapes.py``, bytes and flops in
``cost.py``, its meaning in ``reference_ops.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Op:
    """Base of all ops. Fields holding value names are listed in ``_reads``/``_writes`` and fields
    holding checkpoint tensor names in ``_weights`` (in the order of the docstring). A fused op with
    a GEMM or a table lists its matrices in ``_matrices`` and the value they multiply in
    ``_operand``."""

    kind: ClassVar[str] = ""
    _reads: ClassVar[tuple[str, ...]] = ()
    _writes: ClassVar[tuple[str, ...]] = ()
    _weights: ClassVar[tuple[str, ...]] = ()
    _matrices: ClassVar[tuple[str, ...]] = ()
    _operand: ClassVar[str | None] = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices that this op's GEMM multiplies by, or whose rows it gathers."""
        return tuple(getattr(self, f) for f in self._matrices)

    @property
    def operand(self) -> str | None:
        """Name of the value that the matrices multiply."""
        return None if self._operand is None else str(getattr(self, self._operand))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values this op reads, in order."""
        return tuple(getattr(self, f) for f in self._reads if getattr(self, f) is not None)

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the values this op writes, in order."""
        return tuple(getattr(self, f) for f in self._writes if getattr(self, f) is not None)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors this op uses, in order."""
        return tuple(getattr(self, f) for f in self._weights if getattr(self, f) is not None)


# ---------------------------------------------------------------- plain ops (what frontend builds)


@dataclass(frozen=True)
class Embed(Op):
    """y[T, H] fp32 = table[token_ids]."""

    kind: ClassVar[str] = "embed"
    _reads: ClassVar[tuple[str, ...]] = ("tokens",)
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    _weights: ClassVar[tuple[str, ...]] = ("table",)
    tokens: str
    y: str
    table: str


@dataclass(frozen=True)
class RmsNorm(Op):
    """y[T, H] = x * rsqrt(mean(x²) + eps) * weight."""

    kind: ClassVar[str] = "rmsnorm"
    _reads: ClassVar[tuple[str, ...]] = ("x",)
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    _weights: ClassVar[tuple[str, ...]] = ("weight",)
    x: str
    y: str
    weight: str
    eps: float


@dataclass(frozen=True)
class MatMul(Op):
    """y[T, N] = x[T, K] @ weight[N, K]ᵀ (+ bias[N]); operands in the graph's dtype, fp32 sums."""

    kind: ClassVar[str] = "matmul"
    _reads: ClassVar[tuple[str, ...]] = ("x",)
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    _weights: ClassVar[tuple[str, ...]] = ("weight", "bias")
    x: str
    y: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class QkNorm(Op):
    """RMSNorm over each head: y[T, heads·D] from x[T, heads·D] with weight[D]."""

    kind: ClassVar[str] = "qk_norm"
    _reads: ClassVar[tuple[str, ...]] = ("x",)
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    _weights: ClassVar[tuple[str, ...]] = ("weight",)
    x: str
    y: str
    weight: str
    eps: float
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class RotaryEmbedding(Op):
    """Rotate pairs (i, i + D/2) of each head by position · inv_freq[i] (NeoX order)."""

    kind: ClassVar[str] = "rope"
    _reads: ClassVar[tuple[str, ...]] = ("x", "positions")
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    x: str
    positions: str
    y: str
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class KvAppend(Op):
    """Store this step's k and v rows in the layer's pages; writes the token ``kv`` so that
    attention is ordered after it."""

    kind: ClassVar[str] = "kv_append"
    _reads: ClassVar[tuple[str, ...]] = ("k", "v", "positions")
    _writes: ClassVar[tuple[str, ...]] = ("kv",)
    k: str
    v: str
    positions: str
    kv: str
    layer: int


@dataclass(frozen=True)
class Attention(Op):
    """Causal GQA attention over the pages: y[T, Hq·D]. ``window`` 0 = full, else a query at
    position p sees keys in (p - window, p]."""

    kind: ClassVar[str] = "attention"
    _reads: ClassVar[tuple[str, ...]] = ("q", "kv")
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    q: str
    kv: str
    y: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0


@dataclass(frozen=True)
class SiluMul(Op):
    """y = silu(gate) * up."""

    kind: ClassVar[str] = "silu_mul"
    _reads: ClassVar[tuple[str, ...]] = ("gate", "up")
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    gate: str
    up: str
    y: str


@dataclass(frozen=True)
class Add(Op):
    """y = a + b, fp32 (the residual stream)."""

    kind: ClassVar[str] = "add"
    _reads: ClassVar[tuple[str, ...]] = ("a", "b")
    _writes: ClassVar[tuple[str, ...]] = ("y",)
    a: str
    b: str
    y: str


@dataclass(frozen=True)
class LmHead(Op):
    """logits[R, V] fp32 = x[sample_rows] @ weight[V, H]ᵀ (+ bias)."""

    kind: ClassVar[str] = "lm_head"
    _reads: ClassVar[tuple[str, ...]] = ("x", "rows")
    _writes: ClassVar[tuple[str, ...]] = ("logits",)
    _weights: ClassVar[tuple[str, ...]] = ("weight",)
    x: str
    rows: str
    logits: str
    weight: str


@dataclass(frozen=True)
class Sample(Op):
    """ids[R] i32 from logits[R, V] by each row's sampling parameters."""

    kind: ClassVar[str] = "sample"
    _reads: ClassVar[tuple[str, ...]] = ("logits",)
    _writes: ClassVar[tuple[str, ...]] = ("ids",)
    logits: str
    ids: str


# ---------------------------------------------------------------- fused ops (what a backend emits)
#
# The norm is folded into its neighbours: whoever writes the residual x also writes
#   xw[T, H]     = cast(x * next_norm_weight)            (graph dtype: the next GEMM's operand)
#   ssq[T, H/16] = sum of x² over each 16 columns        (fp32)
# and the GEMM that reads xw multiplies its sums by rstd = 1 / sqrt(sum(ssq) / H + eps). So a norm
# costs no pass and no barrier, and rounding happens once, as it would after a plain norm.


@dataclass(frozen=True)
class SplitNorm(Op):
    """xw, ssq of x: what the producer of x has yet to take over. Lives between passes only."""

    kind: ClassVar[str] = "split_norm"
    _reads: ClassVar[tuple[str, ...]] = ("x",)
    _writes: ClassVar[tuple[str, ...]] = ("xw", "ssq")
    _weights: ClassVar[tuple[str, ...]] = ("norm_weight",)
    x: str
    xw: str
    ssq: str
    norm_weight: str


@dataclass(frozen=True)
class EmbedNorm(Op):
    """x = table[tokens]; xw, ssq of x for the first layer's norm."""

    kind: ClassVar[str] = "embed_norm"
    _reads: ClassVar[tuple[str, ...]] = ("tokens",)
    _writes: ClassVar[tuple[str, ...]] = ("x", "xw", "ssq")
    _weights: ClassVar[tuple[str, ...]] = ("table", "norm_weight")
    _matrices: ClassVar[tuple[str, ...]] = ("table",)
    tokens: str
    x: str
    xw: str
    ssq: str
    table: str
    norm_weight: str


@dataclass(frozen=True)
class NormQkvRopeKv(Op):
    """q, k, v = (xw @ W{q,k,v}ᵀ) * rstd + bias; optional per-head norm of q and k; rope;
    k and v go to the pages; q[T, Hq·D] in the graph's dtype comes out."""

    kind: ClassVar[str] = "norm_qkv_rope_kv"
    _reads: ClassVar[tuple[str, ...]] = ("xw", "ssq", "positions")
    _writes: ClassVar[tuple[str, ...]] = ("q", "kv")
    _weights: ClassVar[tuple[str, ...]] = (
        "q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm",
    )  # fmt: skip
    _matrices: ClassVar[tuple[str, ...]] = ("q_weight", "k_weight", "v_weight")
    _operand: ClassVar[str | None] = "xw"
    xw: str
    ssq: str
    positions: str
    q: str
    kv: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float  #: of the folded RMSNorm
    q_weight: str
    k_weight: str
    v_weight: str
    q_bias: str | None = None
    k_bias: str | None = None
    v_bias: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    qk_eps: float = 0.0


@dataclass(frozen=True)
class OResidual(Op):
    """x' = x + y @ Woᵀ (+ bias); xw, ssq of x' for the next norm."""

    kind: ClassVar[str] = "o_residual"
    _reads: ClassVar[tuple[str, ...]] = ("y", "x")
    _writes: ClassVar[tuple[str, ...]] = ("x_out", "xw", "ssq")
    _weights: ClassVar[tuple[str, ...]] = ("weight", "bias", "norm_weight")
    _matrices: ClassVar[tuple[str, ...]] = ("weight",)
    _operand: ClassVar[str | None] = "y"
    y: str
    x: str
    x_out: str
    xw: str
    ssq: str
    layer: int
    weight: str
    norm_weight: str
    bias: str | None = None


@dataclass(frozen=True)
class NormGateUpAct(Op):
    """h[T, F] = silu(g) * u in the graph's dtype; g, u = (xw @ W{gate,up}ᵀ) * rstd (+ bias)."""

    kind: ClassVar[str] = "norm_gate_up_act"
    _reads: ClassVar[tuple[str, ...]] = ("xw", "ssq")
    _writes: ClassVar[tuple[str, ...]] = ("h",)
    _weights: ClassVar[tuple[str, ...]] = ("gate_weight", "up_weight", "gate_bias", "up_bias")
    _matrices: ClassVar[tuple[str, ...]] = ("gate_weight", "up_weight")
    _operand: ClassVar[str | None] = "xw"
    xw: str
    ssq: str
    h: str
    layer: int
    eps: float
    gate_weight: str
    up_weight: str
    gate_bias: str | None = None
    up_bias: str | None = None


@dataclass(frozen=True)
class DownResidual(Op):
    """x' = x + h @ Wdownᵀ (+ bias); xw, ssq of x' for the next norm (next layer's or the final)."""

    kind: ClassVar[str] = "down_residual"
    _reads: ClassVar[tuple[str, ...]] = ("h", "x")
    _writes: ClassVar[tuple[str, ...]] = ("x_out", "xw", "ssq")
    _weights: ClassVar[tuple[str, ...]] = ("weight", "bias", "norm_weight")
    _matrices: ClassVar[tuple[str, ...]] = ("weight",)
    _operand: ClassVar[str | None] = "h"
    h: str
    x: str
    x_out: str
    xw: str
    ssq: str
    layer: int
    weight: str
    norm_weight: str
    bias: str | None = None


@dataclass(frozen=True)
class NormLmHeadSample(Op):
    """logits = (xw[rows] @ Wᵀ) * rstd; ids by each row's sampling parameters."""

    kind: ClassVar[str] = "norm_lm_head_sample"
    _reads: ClassVar[tuple[str, ...]] = ("xw", "ssq", "rows")
    _writes: ClassVar[tuple[str, ...]] = ("ids",)
    _weights: ClassVar[tuple[str, ...]] = ("weight",)
    _matrices: ClassVar[tuple[str, ...]] = ("weight",)
    _operand: ClassVar[str | None] = "xw"
    xw: str
    ssq: str
    rows: str
    ids: str
    eps: float
    weight: str
