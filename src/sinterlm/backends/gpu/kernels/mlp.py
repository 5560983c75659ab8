"""gate and up in one pass over the rows, SiLU and product in the epilogue."""

import triton
import triton.language as tl

from sinterlm.backends.gpu.kernels.matmul import (
    accumulate_pair,
    depth_of,
    is_last,
    join,
    part_at,
    place,
)
from sinterlm.backends.gpu.kernels.norm import rstd


@triton.jit
def store_product(g, u, m, column, live, ssq, bias, h, F: tl.constexpr, H: tl.constexpr,
                  EPS: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """h = silu(g * rstd (+ bias)) * (u * rstd (+ bias)) at rows m and ``column`` of F."""
    scale = rstd(ssq, m, live, EPS, H, BM)[:, None]
    g *= scale
    u *= scale
    if HAS_BIAS:
        gate = (column // 64) * 128 + column % 64
        g += tl.load(bias + gate)[None, :]
        u += tl.load(bias + gate + 64)[None, :]
    product = g / (1.0 + tl.exp(-g)) * u
    at = m[:, None] * F + column[None, :]
    tl.store(h + at, product.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def norm_gate_up_act(
    xw,  # [T, H] bf16
    ssq,  # [T, H / 16] fp32
    w,  # packed [2 F, H] bf16: 64 columns of gate, 64 of up, and so on; or codes
    w_scale,  # of the codes; not read where BITS is 16
    w_offset,  # not read unless W_OFFSETS
    bias,  # [2 F] fp32 in the same order; not read unless HAS_BIAS
    h,  # [T, F] bf16
    parts,  # [tiles, SPLIT, 2, BM, BN] fp32
    counters,  # [tiles] i32, zero
    num_tokens,
    F: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr, W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr,
    FP8: tl.constexpr, W_SHARED: tl.constexpr, A_FP8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_XCD: tl.constexpr, CACHE: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """h = silu(g) * u; g, u = (xw @ W{gate,up}ᵀ) * rstd (+ bias). F is padded to 64."""
    num_m = tl.cdiv(num_tokens, BM)
    tile_m, tile_n, split = place(num_m, F // BN, SPLIT, GROUP_M, NUM_XCD)
    m = tile_m * BM + tl.arange(0, BM)
    column = tile_n * BN + tl.arange(0, BN)
    gate = (column // 64) * 128 + column % 64
    live = m < num_tokens
    begin, end = depth_of(split, H, BK, SPLIT)
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    g, u = accumulate_pair(g, u, xw, m, live, w, w_scale, w_offset, gate, gate + 64, begin, end, H,
                           H, BK, CACHE, BITS, W_GROUP, W_OFFSETS, W_PITCH, FP8, W_SHARED,
                           A_FP8)  # fmt: skip
    tile = tile_m * (F // BN) + tile_n
    last = True
    if SPLIT > 1:
        tl.store(part_at(parts, tile * 2, split, SPLIT, BM, BN), g, mask=live[:, None])
        tl.store(part_at(parts, tile * 2 + 1, split, SPLIT, BM, BN), u, mask=live[:, None])
        last = is_last(counters + tile, SPLIT, DRAIN)
    if last:
        if SPLIT > 1:
            g = join(parts, tile * 2, live, SPLIT, BM, BN)
            u = join(parts, tile * 2 + 1, live, SPLIT, BM, BN)
        store_product(g, u, m, column, live, ssq, bias, h, F, H, EPS, HAS_BIAS, BM)
