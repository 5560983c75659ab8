"""What follows a vendor's GEMM: the epilogues of our own GEMMs, on sums that lie in memory.

sums[T, N] in fp32 are a[T, K] @ W[N, K]ᵀ, the columns in the order of the packed matrix; rows of
padding behind the last token hold anything. A program takes BM rows and BN columns.
"""

import triton
import triton.language as tl

from sinterlm.backends.gpu.kernels.attention import store_heads
from sinterlm.backends.gpu.kernels.matmul import add_to_stream
from sinterlm.backends.gpu.kernels.mlp import store_product


@triton.jit
def load_sums(sums, m, n, live, N: tl.constexpr):
    """sums[m, n]; more than 2 GB of them may lie there."""
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    return tl.load(sums + at, mask=live[:, None], other=0.0)


@triton.jit
def residual_epilogue(
    sums,  # [T, N] fp32
    bias,  # [N] fp32; not read unless HAS_BIAS
    norm,  # [N] fp32, weight of the norm that follows
    x,  # [T, N] fp32, in place
    xw,  # [T, N] bf16
    ssq,  # [T, N / 16] fp32
    num_tokens,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x += sums (+ bias); xw = x * norm; ssq = sums of 16 squares of x. Grid (T / BM * N / BN)."""
    pid = tl.program_id(0)
    m = pid // (N // BN) * BM + tl.arange(0, BM)
    first = pid % (N // BN) * BN
    live = m < num_tokens
    acc = load_sums(sums, m, first + tl.arange(0, BN), live, N)
    add_to_stream(acc, m, first, live, bias, norm, x, xw, ssq, N, HAS_BIAS, BM, BN)


@triton.jit
def gate_up_epilogue(
    sums,  # [T, 2 F] fp32: 64 columns of gate, 64 of up, and so on
    ssq,  # [T, H / 16] fp32
    bias,  # [2 F] fp32 in the same order; not read unless HAS_BIAS
    h,  # [T, F] bf16
    num_tokens,
    F: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """h = silu(g) * u; g, u = sums * rstd (+ bias). Grid (T / BM * F / BN)."""
    pid = tl.program_id(0)
    m = pid // (F // BN) * BM + tl.arange(0, BM)
    column = pid % (F // BN) * BN + tl.arange(0, BN)
    gate = (column // 64) * 128 + column % 64
    live = m < num_tokens
    g = load_sums(sums, m, gate, live, 2 * F)
    u = load_sums(sums, m, gate + 64, live, 2 * F)
    store_product(g, u, m, column, live, ssq, bias, h, F, H, EPS, HAS_BIAS, BM)


@triton.jit
def qkv_epilogue(
    sums,  # [T, HKV * (GROUP + 2) * D] fp32, padded to 64 columns: per KV head its queries, k, v
    ssq,  # [T, H / 16] fp32
    bias,  # [HKV * (GROUP + 2) * D] fp32; not read unless HAS_BIAS
    q_norm,  # [D] fp32; not read unless QK_NORM
    k_norm,  # [D] fp32
    cos,  # [positions, D / 2] fp32
    sin,  # [positions, D / 2] fp32
    positions,  # [T] i32
    kv_slots,  # [T] i32: page * page_tokens + place in the page; -1 = nothing is stored
    q,  # [T, HKV * GROUP * D] bf16
    k_base,  # K of the layer, bf16 or fp8
    v_base,  # V of the layer, as K
    k_inverse,  # fp32: 1 / the scale of K; not read unless KV_FP8
    v_inverse,
    num_tokens,
    page_tokens,
    page_stride,  # elements, as are the next two
    token_stride,
    head_stride,
    KV_FP8: tl.constexpr, KV_ROUNDING: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    EPS: tl.constexpr, QK_EPS: tl.constexpr, HAS_BIAS: tl.constexpr, QK_NORM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q, k and v of ``norm_qkv_rope_kv``. Grid (T / BM * heads); BN is D / 2: the columns of a
    head's first half and those that rope pairs with them."""
    heads: tl.constexpr = HKV * (GROUP + 2)
    pid = tl.program_id(0)
    m = pid // heads * BM + tl.arange(0, BM)
    head = pid % heads
    d = tl.arange(0, BN)
    live = m < num_tokens
    a = load_sums(sums, m, head * D + d, live, N)
    b = load_sums(sums, m, head * D + D // 2 + d, live, N)
    store_heads(a, b, m, live, head, d, ssq, bias, q_norm, k_norm, cos, sin, positions, kv_slots, q,
                k_base, v_base, k_inverse, v_inverse, page_tokens, page_stride, token_stride,
                head_stride, KV_FP8, KV_ROUNDING, H, HKV, GROUP, D, EPS, QK_EPS, HAS_BIAS, QK_NORM,
                BM)  # fmt: skip
