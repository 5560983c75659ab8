"""The arguments of every GPU kernel that are not constants, with their types, in order.

Pointers are ``*type``, scalars ``i32``, ``i64`` or ``fp32``; ``*weight`` and ``*scale`` are what
the matrix is stored in, ``*kv`` what pages hold (``Signature.types``). All else in a kernel's
signature is a constant that it is compiled for. One table for the compiler, the launch table, the
interpreter and the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signature:
    """A kernel of ``kernels/<module>.py``; without a module the vendor's GEMM (``vendor.py``)."""

    name: str
    module: str
    args: dict[str, str]  #: type by name, in order

    def types(self, constants: Mapping[str, Any]) -> dict[str, str]:
        """``args`` of a kernel compiled for ``constants``: codes and fp8 are bytes, scales of codes
        fp16, or fp32 where a column has one or codes are fp8."""
        in_codes = constants.get("BITS", 16) != 16
        in_fp16 = constants.get("W_GROUP", 0) and not constants.get("FP8", "")
        found = {
            "*weight": "*u8" if in_codes else "*bf16",
            "*scale": "*fp16" if in_fp16 else "*fp32",
            "*kv": "*u8" if constants.get("KV_FP8", "") else "*bf16",
        }
        return {name: found.get(kind, kind) for name, kind in self.args.items()}

    def is_aligned(self, arg: str) -> bool:
        """Whether the caller promises a multiple of 16 (bytes, or elements of a stride)."""
        return self.args[arg].startswith("*") or arg in STRIDES

    def is_below_2gb(self, arg: str) -> bool:
        """Whether all that a pointer leads to lies within 2 GB: offsets then take 32 bits."""
        return self.args[arg].startswith("*") and arg not in LARGE


#: Strides of KV pages and of hidden states, in elements.
STRIDES = ("page_stride", "token_stride", "head_stride", "hidden_stride")
#: Pointers into memory that may be larger than 2 GB: KV pages, and what a vendor's GEMM leaves.
LARGE = ("k_base", "v_base", "sums")

_MATRIX = {"w": "*weight", "w_scale": "*scale", "w_offset": "*fp32"}
_GEMM = {"parts": "*fp32", "counters": "*i32", "num_tokens": "i32"}
_PAGED = {"page_tokens": "i32", "page_stride": "i64", "token_stride": "i32", "head_stride": "i32"}
_BEST = {"best": "*fp32", "tops": "*fp32", "best_ids": "*i32"}

SIGNATURES: dict[str, Signature] = {
    s.name: s
    for s in (
        Signature("embed_norm", "norm", {
            "tokens": "*i32", "slots": "*i32", "drawn": "*i32", "table": "*weight",
            "w_scale": "*scale", "w_offset": "*fp32", "norm": "*fp32", "x": "*fp32", "xw": "*bf16",
            "ssq": "*fp32",
        }),
        Signature("final_norm", "norm", {
            "x": "*fp32", "ssq": "*fp32", "norm": "*fp32", "hidden": "*bf16",
            "hidden_stride": "i32",
        }),
        Signature("norm_qkv_rope_kv", "attention", {
            "xw": "*bf16", "ssq": "*fp32", **_MATRIX, "bias": "*fp32", "q_norm": "*fp32",
            "k_norm": "*fp32", "cos": "*fp32", "sin": "*fp32", "positions": "*i32",
            "kv_slots": "*i32", "q": "*bf16", "k_base": "*kv", "v_base": "*kv",
            "k_inverse": "fp32", "v_inverse": "fp32", **_GEMM, **_PAGED,
        }),
        Signature("attention", "attention", {
            "q": "*bf16", "y": "*bf16", "k_base": "*kv", "v_base": "*kv", "k_scale": "fp32",
            "v_scale": "fp32", "page_table": "*i32", "query_start": "*i32", "context_lens": "*i32",
            "part_o": "*fp32", "part_ml": "*fp32", "counters": "*i32", "num_seqs": "i32",
            "table_stride": "i32", **_PAGED,
        }),
        Signature("residual_matmul", "matmul", {
            "a": "*bf16", **_MATRIX, "bias": "*fp32", "norm": "*fp32", "x": "*fp32",
            "xw": "*bf16", "ssq": "*fp32", **_GEMM,
        }),
        Signature("norm_gate_up_act", "mlp", {
            "xw": "*bf16", "ssq": "*fp32", **_MATRIX, "bias": "*fp32", "h": "*bf16", **_GEMM,
        }),
        Signature("vendor_gemm", "", {
            "a": "*bf16", "w": "*bf16", "sums": "*fp32", "vendor_workspace": "*u8",
        }),
        Signature("residual_epilogue", "epilogues", {
            "sums": "*fp32", "bias": "*fp32", "norm": "*fp32", "x": "*fp32", "xw": "*bf16",
            "ssq": "*fp32", "num_tokens": "i32",
        }),
        Signature("gate_up_epilogue", "epilogues", {
            "sums": "*fp32", "ssq": "*fp32", "bias": "*fp32", "h": "*bf16", "num_tokens": "i32",
        }),
        Signature("qkv_epilogue", "epilogues", {
            "sums": "*fp32", "ssq": "*fp32", "bias": "*fp32", "q_norm": "*fp32",
            "k_norm": "*fp32", "cos": "*fp32", "sin": "*fp32", "positions": "*i32",
            "kv_slots": "*i32", "q": "*bf16", "k_base": "*kv", "v_base": "*kv",
            "k_inverse": "fp32", "v_inverse": "fp32", "num_tokens": "i32", **_PAGED,
        }),
        Signature("lm_head", "sample", {
            "xw": "*bf16", "ssq": "*fp32", "rows": "*i32", **_MATRIX, "temperature": "*fp32",
            "seeds": "*u64", "draws": "*i32", "logits": "*fp32", **_BEST, "num_rows": "i32",
            "is_normed": "i32",
        }),
        Signature("merge_rows", "sample", {
            **_BEST, "slots": "*i32", "ids": "*i32", "logprobs": "*fp32", "drawn": "*i32",
        }),
    )
}  # fmt: skip
