"""How each fused op becomes a kernel call: its kernel, its argument struct, what fills the fields,
and which packed weights it reads. The left-hand sides are the fields of ``args.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

from sinterlm.errors import CompileError
from sinterlm.ir.ops import (
    Attention,
    DownResidual,
    EmbedNorm,
    NormGateUpAct,
    NormLmHeadSample,
    NormQkvRopeKv,
    Op,
    OResidual,
)
from sinterlm.ir.quant import GemmFormat

#: What each op computes, as a comment; {} are shapes.
MEANING = {
    "embed_norm": "x[T, {H}] = table[tokens]; xw, ssq for the first norm",
    "norm_qkv_rope_kv": "q[T, {Hq}*{D}], k and v[T, {Hkv}*{D}] = rope((xw @ qkv) * rstd)",
    "attention": "y[T, {Hq}*{D}] = softmax(scale * q k) v over the pages",
    "o_residual": "x[T, {H}] += y[T, {Hq}*{D}] @ o; xw, ssq for the next norm",
    "norm_gate_up_act": "h[T, {F}] = silu(g) * u; g, u = (xw @ gate_up) * rstd",
    "down_residual": "x[T, {H}] += h[T, {F}] @ down; xw, ssq for the next norm",
    "norm_lm_head_sample": "logits[R, {V}] = (xw[rows] @ lm_head) * rstd; then the draw",
}

#: Kernel and argument struct of each op. {F} is the format of its own GEMM (or table), {Next} that
#: of the GEMM which reads what it writes; Kv is what KV pages hold.
KERNELS = {
    "embed_norm": ("embed_norm", "EmbedArgs<{F}, {Next}>"),
    "norm_qkv_rope_kv": ("norm_qkv_rope_kv<E, D>", "QkvArgs<E, Kv, {F}>"),
    "attention": ("attention<E, D>", "AttentionArgs<E, Kv, {Next}>"),
    "o_residual": ("residual_matmul", "ResidualArgs<{F}, {Next}>"),
    "norm_gate_up_act": ("norm_gate_up_act", "GateUpArgs<{F}, {Next}>"),
    "down_residual": ("residual_matmul", "ResidualArgs<{F}, {Next}>"),
    "norm_lm_head_sample": ("lm_head", "LmHeadArgs<{F}>"),
}

#: The kernel where the op's sum is shared out among ranks, and what else it takes.
KERNELS_OF_RANKS = dict.fromkeys(("o_residual", "down_residual"), ("reduced_residual", "s.ranks"))

_STREAM = "s.stream<{Next}, Hp, pitch::xw>(buf::x, buf::xw, buf::ssq)"
_XW = "s.rows_of<{F}, Hp, pitch::xw>(buf::xw)"
_Y = "s.rows_of<{F}, Qp, pitch::y>(buf::y)"
_H = "s.rows_of<{F}, Fp, pitch::h>(buf::h)"

#: Fields of each argument struct that depend on nothing but the op's kind.
FIXED = {
    "embed_norm": (("out", _STREAM), ("H", "H"), ("Hp", "Hp")),
    "norm_qkv_rope_kv": (
        ("xw", _XW), ("ssq", "s.buffer<float>(buf::ssq)"),
        ("cos", "s.cos"), ("sin", "s.sin"), ("q", "s.buffer<E>(buf::q)"), ("pages", "pages"),
        ("eps", "s.eps"), ("qk_eps", "s.qk_eps"), ("H", "H"), ("Hp", "Hp"), ("Hq", "Hq"),
        ("Hkv", "Hkv"), ("Qp", "Qp"),
    ),
    "attention": (
        ("q", "s.buffer<E>(buf::q)"), ("y", _Y.format(F="{Next}")), ("pages", "pages"),
        ("scale", "s.scale"), ("window", "s.windows[i]"), ("Hq", "Hq"), ("Hkv", "Hkv"),
        ("Qp", "Qp"), ("parts", "s.parts"), ("parts_floats", "s.parts_floats"),
    ),
    "o_residual": (
        ("a", _Y), ("x", "s.buffer<float>(buf::x)"), ("out", _STREAM),
        ("K", "Qp"), ("Hp", "Hp"),
    ),
    "norm_gate_up_act": (
        ("xw", _XW), ("ssq", "s.buffer<float>(buf::ssq)"),
        ("h", _H.format(F="{Next}")), ("eps", "s.eps"), ("H", "H"), ("Hp", "Hp"), ("Fp", "Fp"),
    ),
    "down_residual": (
        ("a", _H), ("x", "s.buffer<float>(buf::x)"), ("out", _STREAM),
        ("K", "Fp"), ("Hp", "Hp"),
    ),
    "norm_lm_head_sample": (
        ("xw", _XW), ("ssq", "s.buffer<float>(buf::ssq)"), ("rows", "s.rows"),
        ("num_rows", "s.num_rows"), ("logits", "s.row_buffer<float>(buf::logits)"),
        ("gathered", "s.gathered<{F}, Hp, pitch::gathered>(buf::gathered)"),
        ("eps", "s.head_eps"), ("H", "H"), ("Hp", "Hp"), ("V", "V"), ("Vp", "Vp"),
        ("sampler", "s.sampler"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class WeightField:
    """A weight an op reads: the field of its struct, the column of the offset table, the packed
    tensor, and the checkpoint tensor that must lie in it (None = the model has none)."""

    field: str
    column: str
    tensor: str
    source: str | None


def weight_fields(op: Op, num_layers: int, tied: bool) -> list[WeightField]:
    """The weights an op reads, in the order of the offset table. Raises CompileError for an op
    that no kernel computes."""
    if isinstance(op, EmbedNorm):
        return [
            WeightField("table", "table", "lm_head" if tied else "embed", op.table),
            WeightField("norm_weight", "first_norm", "layers.0.attn_norm", op.norm_weight),
        ]
    if isinstance(op, NormQkvRopeKv):
        at = f"layers.{op.layer}"
        bias = op.q_bias or op.k_bias or op.v_bias
        return [
            WeightField("weight", "qkv", f"{at}.qkv", op.q_weight),
            WeightField("bias", "qkv_bias", f"{at}.qkv_bias", bias),
            WeightField("q_norm", "q_norm", f"{at}.q_norm", op.q_norm),
            WeightField("k_norm", "k_norm", f"{at}.k_norm", op.k_norm),
        ]
    if isinstance(op, Attention):
        return []
    if isinstance(op, NormGateUpAct):
        at = f"layers.{op.layer}"
        return [
            WeightField("weight", "gate_up", f"{at}.gate_up", op.gate_weight),
            WeightField("bias", "gate_up_bias", f"{at}.gate_up_bias", op.gate_bias or op.up_bias),
        ]
    if isinstance(op, OResidual):
        return _residual(op, "o", f"layers.{op.layer}.mlp_norm", "mlp_norm")
    if isinstance(op, DownResidual):
        last = op.layer == num_layers - 1
        norm = "final_norm" if last else f"layers.{op.layer + 1}.attn_norm"
        return _residual(op, "down", norm, "next_norm")
    if isinstance(op, NormLmHeadSample):
        return [WeightField("weight", "lm_head_panels", "lm_head", op.weight)]
    raise fault(f"op {op.kind} has no CPU kernel")


def _residual(
    op: OResidual | DownResidual, column: str, norm: str, norm_column: str
) -> list[WeightField]:
    """Weights of a projection back to the residual stream."""
    at = f"layers.{op.layer}.{column}"
    return [
        WeightField("weight", column, at, op.weight),
        WeightField("bias", f"{column}_bias", f"{at}_bias", op.bias),
        WeightField("norm_weight", norm_column, norm, op.norm_weight),
    ]


def format_type(form: GemmFormat | None) -> str:
    """The C++ type of a format (``formats.h``); None: wide."""
    if form is None:
        return "Wide<E>"
    weights = f"{form.bits}, {form.group}, {'false' if form.symmetric else 'true'}"
    if form.act == "graph":
        return f"WeightOnly<E, {weights}>"
    return f"Coded<{weights}, {form.act_group}>"


def op_name(kind: str) -> str:
    """``norm_lm_head_sample`` -> ``kNormLmHeadSample``."""
    return "k" + "".join(part.capitalize() for part in kind.split("_"))


def fault(what: str) -> CompileError:
    """The error for a plan that contradicts itself."""
    return CompileError(
        f"the CPU emitter cannot express this plan: {what}; this is a fault of SinterLM, please "
        "report it with the files of `sinterlm compile MODEL --dump-dir DIR`"
    )
