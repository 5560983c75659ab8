"""Matrices in codes of 4 or 8 bits as GEMM operands, multiplied as the whole numbers that they are.

Per 64 columns: codes [K/64][64 columns][64 of k], then scales [G][64] in fp16 (fp32 where a column
has one), then offsets [G][64] in fp32 where a format has them; W_PITCH bytes in all. Of 64 codes of
4 bits the first 32 are low nibbles and the rest high ones, so that a load gives two operands and
nothing is shuffled. bf16 holds every code, so products are exact; sums meet the scale of their
group (W_GROUP of k; 0 = all of k) in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def coded_at(w, n, k, W_PITCH: tl.constexpr, BITS: tl.constexpr):
    """Pointers [len(k), len(n)] to the codes of columns n; ``k`` counts 32 of each 64 of k."""
    column = (n // 64).to(tl.int32) * W_PITCH + (n % 64) * (8 * BITS)
    return w + column[None, :] + ((k // 32) * (512 * BITS) + k % 32)[:, None]


@triton.jit
def tail_at(tail, n, W_PITCH: tl.constexpr):
    """Pointers to the first group's scales, or offsets, of columns n."""
    size: tl.constexpr = tail.dtype.element_ty.primitive_bitwidth // 8
    return tail + (n // 64) * (W_PITCH // size) + n % 64


@triton.jit
def number(code, CENTRE: tl.constexpr):
    """code - CENTRE as bf16: exact, so cutting an fp32 off is all it takes."""
    wide = code.to(tl.float32) - CENTRE
    return (wide.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def halves(at, CENTRE: tl.constexpr, BITS: tl.constexpr, CACHE: tl.constexpr):
    """The first and the last 32 of every 64 of k, bf16 [BK / 2, BN] each."""
    code = tl.load(at, cache_modifier=CACHE)
    if BITS == 4:
        upper = code >> 4
        code = code & 15
    else:
        upper = tl.load(at + 32, cache_modifier=CACHE)
    return number(code, CENTRE), number(upper, CENTRE)


@triton.jit
def add_products(acc, x0, x1, w0, w1, scale, start, W_GROUP: tl.constexpr):
    """acc + x @ w, with the scales of the groups that begin at, or hold, k = start."""
    if W_GROUP == 0:
        acc = tl.dot(x1, w1, tl.dot(x0, w0, acc))
    elif W_GROUP == 32:
        at = scale + start * 2
        acc += tl.dot(x0, w0) * tl.load(at).to(tl.float32)[None, :]
        acc += tl.dot(x1, w1) * tl.load(at + 64).to(tl.float32)[None, :]
    else:
        at = scale + start // W_GROUP * 64
        acc += tl.dot(x1, w1, tl.dot(x0, w0)) * tl.load(at).to(tl.float32)[None, :]
    return acc


@triton.jit
def add_offsets(acc, sum0, sum1, offset, start, W_GROUP: tl.constexpr):
    """acc + (sums of x over the halves) times the offsets of their groups."""
    at = offset + start // W_GROUP * 64
    if W_GROUP == 32:
        acc += sum0[:, None] * tl.load(at)[None, :]
        acc += sum1[:, None] * tl.load(at + 64)[None, :]
    else:
        acc += (sum0 + sum1)[:, None] * tl.load(at)[None, :]
    return acc


@triton.jit
def accumulate_codes(acc, a, m, live, w, w_scale, w_offset, n, begin, end, A_PITCH: tl.constexpr,
                     BK: tl.constexpr, CACHE: tl.constexpr, BITS: tl.constexpr,
                     W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr,
                     W_PITCH: tl.constexpr):  # fmt: skip
    """a[m, begin:end] @ W[n, begin:end]ᵀ, ``acc`` being zeros; rows that are not live are zeros.
    BK divides W_GROUP, but is 64 where that is 32."""
    CENTRE: tl.constexpr = 0 if W_OFFSETS else 1 << (BITS - 1)
    k = tl.arange(0, BK // 2)
    a_at = a + m[:, None] * A_PITCH + ((k // 32) * 64 + k % 32)[None, :]
    w_at = coded_at(w, n, k, W_PITCH, BITS)
    scale = tail_at(w_scale, n, W_PITCH)
    total = tl.zeros((acc.shape[0],), tl.float32)
    for start in range(begin, end, BK):
        x0 = tl.load(a_at + start, mask=live[:, None], other=0.0)
        x1 = tl.load(a_at + start + 32, mask=live[:, None], other=0.0)
        w0, w1 = halves(w_at + start * (8 * BITS), CENTRE, BITS, CACHE)
        acc = add_products(acc, x0, x1, w0, w1, scale, start, W_GROUP)
        if W_OFFSETS:
            sum0, sum1 = tl.sum(x0.to(tl.float32), 1), tl.sum(x1.to(tl.float32), 1)
            if W_GROUP == 0:
                total += sum0 + sum1
            else:
                offset = tail_at(w_offset, n, W_PITCH)
                acc = add_offsets(acc, sum0, sum1, offset, start, W_GROUP)
    if W_GROUP == 0:
        acc = scaled_columns(acc, total, scale, w_offset, n, W_OFFSETS, W_PITCH)
    return acc


@triton.jit
def accumulate_codes_pair(acc0, acc1, a, m, live, w, w_scale, w_offset, n0, n1, begin, end,
                          A_PITCH: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
                          BITS: tl.constexpr, W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr,
                          W_PITCH: tl.constexpr):  # fmt: skip
    """``accumulate_codes`` for two blocks of columns that read the same rows once."""
    CENTRE: tl.constexpr = 0 if W_OFFSETS else 1 << (BITS - 1)
    k = tl.arange(0, BK // 2)
    a_at = a + m[:, None] * A_PITCH + ((k // 32) * 64 + k % 32)[None, :]
    at0, at1 = coded_at(w, n0, k, W_PITCH, BITS), coded_at(w, n1, k, W_PITCH, BITS)
    scale0, scale1 = tail_at(w_scale, n0, W_PITCH), tail_at(w_scale, n1, W_PITCH)
    total = tl.zeros((acc0.shape[0],), tl.float32)
    for start in range(begin, end, BK):
        x0 = tl.load(a_at + start, mask=live[:, None], other=0.0)
        x1 = tl.load(a_at + start + 32, mask=live[:, None], other=0.0)
        w0, w1 = halves(at0 + start * (8 * BITS), CENTRE, BITS, CACHE)
        acc0 = add_products(acc0, x0, x1, w0, w1, scale0, start, W_GROUP)
        w0, w1 = halves(at1 + start * (8 * BITS), CENTRE, BITS, CACHE)
        acc1 = add_products(acc1, x0, x1, w0, w1, scale1, start, W_GROUP)
        if W_OFFSETS:
            sum0, sum1 = tl.sum(x0.to(tl.float32), 1), tl.sum(x1.to(tl.float32), 1)
            if W_GROUP == 0:
                total += sum0 + sum1
            else:
                offset0, offset1 = tail_at(w_offset, n0, W_PITCH), tail_at(w_offset, n1, W_PITCH)
                acc0 = add_offsets(acc0, sum0, sum1, offset0, start, W_GROUP)
                acc1 = add_offsets(acc1, sum0, sum1, offset1, start, W_GROUP)
    if W_GROUP == 0:
        acc0 = scaled_columns(acc0, total, scale0, w_offset, n0, W_OFFSETS, W_PITCH)
        acc1 = scaled_columns(acc1, total, scale1, w_offset, n1, W_OFFSETS, W_PITCH)
    return acc0, acc1


@triton.jit
def scaled_columns(acc, total, scale, w_offset, n, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr):
    """acc * scale (+ sums of x * offset) where a column has one scale."""
    acc *= tl.load(scale)[None, :]
    if W_OFFSETS:
        acc += total[:, None] * tl.load(tail_at(w_offset, n, W_PITCH))[None, :]
    return acc


@triton.jit
def coded_row(table, table_scale, table_offset, row, n, BITS: tl.constexpr, W_GROUP: tl.constexpr,
              W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr):  # fmt: skip
    """Elements n of one row (a column of the GEMM operand), fp32."""
    at = (row // 64) * W_PITCH + (row % 64) * (8 * BITS) + (n // 64) * (512 * BITS)
    if BITS == 4:
        code = (tl.load(table + at + n % 32) >> (n % 64 // 32 * 4).to(tl.uint8)) & 15
    else:
        code = tl.load(table + at + n % 64)
    group = n // W_GROUP * 64 if W_GROUP != 0 else n * 0
    scale = tl.load(tail_at(table_scale, row, W_PITCH) + group).to(tl.float32)
    if W_OFFSETS:
        found = scale * code.to(tl.float32) + tl.load(tail_at(table_offset, row, W_PITCH) + group)
    else:
        found = scale * (code.to(tl.float32) - (1 << (BITS - 1)))
    return found
