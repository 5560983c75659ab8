"""The residual stream and what its writers leave for the norm that follows; the embedding.

A norm has no kernel of its own: whoever writes x also writes xw = x * weight in bf16 and, per 16
columns, the sum of squares; whoever multiplies xw scales its sums by ``rstd``.
"""

import triton
import triton.language as tl

from sinterlm.backends.gpu.kernels.codes import coded_row
from sinterlm.backends.gpu.kernels.fp8 import fp8_row


@triton.jit
def store_stream(x, m, first, live, norm, x_out, xw, ssq, H: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    """Store x[BM, BN] at rows m and columns first, first + 1, … with its by-products."""
    n = first + tl.arange(0, BN)
    at = m[:, None] * H + n[None, :]
    tl.store(x_out + at, x, mask=live[:, None])
    scaled = x * tl.load(norm + n)[None, :]
    tl.store(xw + at, scaled.to(tl.bfloat16), mask=live[:, None])
    sums = tl.sum(tl.reshape(x * x, (BM, BN // 16, 16)), axis=2)
    group = first // 16 + tl.arange(0, BN // 16)
    tl.store(ssq + m[:, None] * (H // 16) + group[None, :], sums, mask=live[:, None])


@triton.jit
def rstd(ssq, m, live, EPS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr):
    """1 / sqrt(mean of squares + EPS) of rows m, [BM] fp32; the same order of sums in every row."""
    groups: tl.constexpr = H // 16
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, groups, 64):
        g = start + tl.arange(0, 64)
        here = live[:, None] & (g < groups)[None, :]
        total += tl.sum(tl.load(ssq + m[:, None] * groups + g[None, :], mask=here, other=0.0), 1)
    return 1.0 / tl.sqrt_rn(total / H + EPS)


@triton.jit
def final_norm(
    x,  # [T, H] fp32
    ssq,  # [T, H / 16] fp32
    norm,  # [H] fp32
    hidden,  # [T, hidden_stride] bf16
    hidden_stride,  # elements, a multiple of 16
    H: tl.constexpr, EPS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """hidden = x * rstd * norm, for whoever wants the last norm's rows. Grid (T, H / BN)."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = row + tl.arange(0, 1)
    scale = rstd(ssq, m, m >= 0, EPS, H, 1)[:, None]
    x_at = m[:, None] * H + n[None, :]
    normed = tl.load(x + x_at) * scale * tl.load(norm + n)[None, :]
    tl.store(hidden + m[:, None] * hidden_stride + n[None, :], normed.to(tl.bfloat16))


@triton.jit
def embed_norm(
    tokens,  # [T] i32; -1 = the token that the row's slot drew last
    slots,  # [T] i32
    drawn,  # [slots] i32
    table,  # [V, H] bf16 in rows, or packed in tiles; or codes
    w_scale,  # of the codes; not read where BITS is 16
    w_offset,  # not read unless W_OFFSETS
    norm,  # [H] fp32
    x,  # [T, H] fp32
    xw,  # [T, H] bf16
    ssq,  # [T, H / 16] fp32
    H: tl.constexpr, IN_TILES: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
    W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr, FP8: tl.constexpr,
    W_SHARED: tl.constexpr, A_FP8: tl.constexpr,
):  # fmt: skip
    """x = table[tokens]; xw, ssq for the first norm. Grid (T, ceil(H / BN))."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BN
    token = tl.load(tokens + row)
    if token < 0:
        token = tl.load(drawn + tl.load(slots + row))
    n = first + tl.arange(0, BN)
    if FP8 != "":
        found = fp8_row(table, w_scale, token, n, W_GROUP, W_PITCH, FP8, W_SHARED)
    elif BITS != 16:
        found = coded_row(table, w_scale, w_offset, token, n, BITS, W_GROUP, W_OFFSETS, W_PITCH)
    elif IN_TILES:
        at = (token // 64) * (64 * H) + (token % 64) * 64 + (n // 64) * 4096 + n % 64
        found = tl.load(table + at).to(tl.float32)
    else:
        found = tl.load(table + token * H + n).to(tl.float32)
    values = found[None, :]
    m = row + tl.arange(0, 1)
    store_stream(values, m, first, m >= 0, norm, x, xw, ssq, H, 1, BN)
