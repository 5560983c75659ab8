"""Where every weight lies in the packed file: panels for GEMMs, rows for an untied embedding,
fp32 vectors for norms and biases, in the order of use. See ``ir/plan.py`` for the layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import (
    DownResidual,
    EmbedNorm,
    NormGateUpAct,
    NormLmHeadSample,
    NormQkvRopeKv,
    OResidual,
)
from sinterlm.ir.plan import (
    Kind,
    MatrixOrder,
    PackedTensor,
    Segment,
    WeightLayout,
    pitch_of,
)
from sinterlm.ir.quant import PANEL_COLUMNS, GemmFormat, PanelShape

LANES = 16  #: columns that a kernel finishes together
PANEL = PANEL_COLUMNS
VECTOR_ALIGN = 64  #: bytes
PANEL_ALIGN = 4096  #: bytes


def round_up(n: int, to: int) -> int:
    """The smallest multiple of ``to`` that is at least ``n``."""
    return -(-n // to) * to


def hidden_width(graph: Graph) -> int:
    """Padded width of the residual stream: whole vectors, or whole groups of activations where any
    are quantised."""
    in_codes = any(form.act == "int8" for form in graph.formats.values())
    return round_up(graph.config.hidden_size, PANEL if in_codes else LANES)


def layout_weights(graph: Graph, order: MatrixOrder = "panels") -> WeightLayout:
    """Lay out the weights of a fused graph, GEMM operands in ``order``."""
    return _Layout(graph, order).build()


def layout_hash(tensors: Sequence[PackedTensor], nbytes: int) -> int:
    """The first 8 bytes of the SHA-256 of the layout as text, one tensor per line."""
    lines = [f"weights {nbytes}"]
    for t in tensors:
        parts = (f"{s.weight}[{s.start}:{s.stop}]@{s.at}" for s in t.segments)
        sizes = f"n={t.n} k={t.k} k_real={t.k_real} offset={t.offset} nbytes={t.nbytes}"
        form = f"{t.dtype} {t.format}" if t.format else t.dtype
        lines.append(f"{t.name} {t.kind} {form} {sizes} {' '.join(parts)}")
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return int.from_bytes(digest[:8], "big")


class _Layout:
    """Places tensors one after the other."""

    def __init__(self, graph: Graph, order: MatrixOrder) -> None:
        self.graph, self.order = graph, order
        self.config = graph.config
        self.hidden = hidden_width(graph)
        self.tensors: list[PackedTensor] = []
        self.end = 0

    def build(self) -> WeightLayout:
        """Walk the ops in order of use."""
        for op in self.graph.ops:
            if isinstance(op, EmbedNorm):
                self.embed(op)
            elif isinstance(op, NormQkvRopeKv):
                self.qkv(op)
            elif isinstance(op, OResidual):
                self.residual(op, f"layers.{op.layer}.o", op.weight, op.bias)
                self.norm(f"layers.{op.layer}.mlp_norm", op.norm_weight)
            elif isinstance(op, NormGateUpAct):
                self.gate_up(op)
            elif isinstance(op, DownResidual):
                self.residual(op, f"layers.{op.layer}.down", op.weight, op.bias)
                last = op.layer == self.config.num_layers - 1
                name = "final_norm" if last else f"layers.{op.layer + 1}.attn_norm"
                self.norm(name, op.norm_weight)
            elif isinstance(op, NormLmHeadSample):
                vocab = self.config.vocab_size
                self.panels("lm_head", [Segment(op.weight, 0, vocab, 0)], vocab, self.hidden)
        tensors = tuple(self.tensors)
        nbytes = round_up(self.end, PANEL_ALIGN)
        return WeightLayout(tensors, nbytes, layout_hash(tensors, nbytes))

    def embed(self, op: EmbedNorm) -> None:
        """The embedding table, unless it is lm_head's panels; the first norm."""
        if not self.config.tie_word_embeddings:
            vocab = self.config.vocab_size
            segments = [Segment(op.table, 0, vocab, 0)]
            if op.table in self.graph.formats:
                self.panels("embed", segments, vocab, self.hidden)
            else:
                real = self.config.hidden_size
                self.place("embed", "rows", vocab, self.hidden, real, segments)
        self.norm("layers.0.attn_norm", op.norm_weight)

    def qkv(self, op: NormQkvRopeKv) -> None:
        """Per KV head: its group of query heads, k, v; every head padded to 16 columns."""
        group, dim = op.num_heads // op.num_kv_heads, op.head_dim
        pitch = round_up(dim, LANES)
        weights, biases = [], []
        for kv_head in range(op.num_kv_heads):
            heads = [(op.q_weight, op.q_bias, kv_head * group + g) for g in range(group)]
            heads += [(op.k_weight, op.k_bias, kv_head), (op.v_weight, op.v_bias, kv_head)]
            for i, (weight, bias, head) in enumerate(heads):
                at = (kv_head * (group + 2) + i) * pitch
                weights.append(Segment(weight, head * dim, (head + 1) * dim, at))
                if bias is not None:
                    biases.append(Segment(bias, head * dim, (head + 1) * dim, at))
        width = op.num_kv_heads * (group + 2) * pitch
        name = f"layers.{op.layer}.qkv"
        self.panels(name, weights, width, self.hidden)
        if biases:
            self.vector(f"{name}_bias", round_up(width, PANEL), biases)
        for which, norm in (("q_norm", op.q_norm), ("k_norm", op.k_norm)):
            if norm is not None:
                segment = Segment(norm, 0, dim, 0)
                self.vector(f"layers.{op.layer}.{which}", pitch, [segment])

    def gate_up(self, op: NormGateUpAct) -> None:
        """64 gate columns, 64 up columns, and so on."""
        width = self.config.intermediate_size
        weights, biases = [], []
        for panel in range(round_up(width, PANEL) // PANEL):
            first, last = panel * PANEL, min(width, (panel + 1) * PANEL)
            pair = ((op.gate_weight, op.gate_bias), (op.up_weight, op.up_bias))
            for half, (weight, bias) in enumerate(pair):
                at = (2 * panel + half) * PANEL
                weights.append(Segment(weight, first, last, at))
                if bias is not None:
                    biases.append(Segment(bias, first, last, at))
        name, columns = f"layers.{op.layer}.gate_up", 2 * round_up(width, PANEL)
        self.panels(name, weights, columns, self.hidden)
        if biases:
            self.vector(f"{name}_bias", columns, biases)

    def residual(
        self, op: OResidual | DownResidual, name: str, weight: str, bias: str | None
    ) -> None:
        """A projection back to the residual stream; its operand's padding decides K."""
        hidden, depth = self.graph.weights[weight].shape
        padded = round_up(depth, PANEL if isinstance(op, DownResidual) else LANES)
        self.panels(name, [Segment(weight, 0, hidden, 0)], hidden, padded)
        if bias is not None:
            self.vector(f"{name}_bias", round_up(hidden, PANEL), [Segment(bias, 0, hidden, 0)])

    def norm(self, name: str, weight: str) -> None:
        """A norm's weight, as wide as the residual stream's rows."""
        self.vector(name, self.hidden, [Segment(weight, 0, self.config.hidden_size, 0)])

    def panels(self, name: str, segments: Sequence[Segment], columns: int, depth: int) -> None:
        """A GEMM operand of ``columns`` columns and padded depth."""
        k_real = self.graph.weights[segments[0].weight].shape[1]
        form = self.graph.formats.get(segments[0].weight)
        kind: Kind = self.order
        if kind == "pitched" and (form is not None or not name.startswith("layers.")):
            kind = "tiles"
        self.place(name, kind, round_up(columns, PANEL), depth, k_real, segments, form)

    def vector(self, name: str, n: int, segments: Sequence[Segment]) -> None:
        """fp32 [n]."""
        self.place(name, "vector", n, 1, 1, segments)

    def place(
        self,
        name: str,
        kind: Kind,
        n: int,
        k: int,
        k_real: int,
        segments: Sequence[Segment],
        form: GemmFormat | None = None,
    ) -> None:
        """Append one tensor at the next aligned offset."""
        dtype: Literal["bf16", "fp32", "int8", "int4", "fp8"]
        if form is not None:
            dtype = "fp8" if form.is_fp8 else "int8" if form.bits == 8 else "int4"
            nbytes = n // PANEL * PanelShape(form, k).nbytes
        else:
            dtype = "bf16" if kind != "vector" and self.graph.dtype == "bf16" else "fp32"
            pitch = pitch_of(k) if kind == "pitched" else k
            nbytes = n * pitch * (2 if dtype == "bf16" else 4)
        offset = round_up(self.end, VECTOR_ALIGN if kind == "vector" else PANEL_ALIGN)
        parts = tuple(segments)
        tensor = PackedTensor(name, kind, dtype, n, k, k_real, parts, offset, nbytes, form)
        self.tensors.append(tensor)
        self.end = offset + nbytes
