"""GEMM of few or many rows by packed tiles, and the projection back to the residual stream.

W[N, K] in bf16 lies as [N/64][K/64][64 columns][64 of k]: whatever a program loads is contiguous in
pieces of 8 KB, so that no row stride meets the same memory channel again and again. Where a
vendor's library reads it too (W_PITCH > 0) it lies as [N][W_PITCH], of which K count. Codes (BITS 4
or 8) lie as ``codes.py`` says, fp8 numbers (BITS 8 and FP8) as ``fp8.py`` does. Sums are fp32. With
SPLIT > 1 several programs share a tile's depth; the last one to arrive adds their sums in the order
of the splits, so the result does not depend on who that is.
"""

import triton
import triton.language as tl

from sinterlm.backends.gpu.kernels.codes import accumulate_codes, accumulate_codes_pair
from sinterlm.backends.gpu.kernels.fp8 import accumulate_fp8, accumulate_fp8_pair
from sinterlm.backends.gpu.kernels.norm import store_stream


@triton.jit
def place(num_m, NUM_N: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
          NUM_XCD: tl.constexpr):  # fmt: skip
    """(tile_m, tile_n, split) of this program in a grid of num_m * NUM_N * SPLIT.

    GROUP_M tiles of rows go through the columns together, so that they share them in cache. On a
    device of several dies (NUM_XCD > 1: program i runs on die i % NUM_XCD, each with an L2 of its
    own) every die gets a contiguous range.
    """
    pid = tl.program_id(0)
    if NUM_XCD > 1:
        total = num_m * (NUM_N * SPLIT)
        die = pid % NUM_XCD
        longer = total % NUM_XCD  # that many dies have one program more
        pid = die * (total // NUM_XCD) + tl.minimum(die, longer) + pid // NUM_XCD
    split = pid % SPLIT
    tile = pid // SPLIT
    first = tile // (GROUP_M * NUM_N) * GROUP_M
    rows = tl.minimum(num_m - first, GROUP_M)
    within = tile % (GROUP_M * NUM_N)
    return first + within % rows, within // rows, split


@triton.jit
def depth_of(split, K: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr):
    """[begin, end) along k of a split, in whole blocks of BK."""
    blocks: tl.constexpr = K // BK
    return split * blocks // SPLIT * BK, (split + 1) * blocks // SPLIT * BK


@triton.jit
def wide_at(w, n, k, K: tl.constexpr, W_PITCH: tl.constexpr):
    """Pointers [len(k), len(n)] to columns n of a matrix in bf16; a step of 64 along k is 4096
    elements in tiles, and 64 where W_PITCH is given."""
    if W_PITCH == 0:
        column = (n // 64) * (64 * K) + (n % 64) * 64
        row = (k // 64) * 4096 + k % 64
    else:
        column = n * W_PITCH
        row = k
    return w + column[None, :] + row[:, None]


@triton.jit
def accumulate(acc, a, m, live, w, w_scale, w_offset, n, begin, end, A_PITCH: tl.constexpr,
               K: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr, BITS: tl.constexpr,
               W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr,
               FP8: tl.constexpr, W_SHARED: tl.constexpr, A_FP8: tl.constexpr):  # fmt: skip
    """a[m, begin:end] @ W[n, begin:end]ᵀ [BM, BN], ``acc`` being zeros; rows that are not live
    count as zeros."""
    if FP8 != "":
        acc = accumulate_fp8(acc, a, m, live, w, w_scale, n, begin, end, A_PITCH, BK, CACHE,
                             W_GROUP, W_PITCH, FP8, W_SHARED, A_FP8)  # fmt: skip
    elif BITS != 16:
        acc = accumulate_codes(acc, a, m, live, w, w_scale, w_offset, n, begin, end, A_PITCH, BK,
                               CACHE, BITS, W_GROUP, W_OFFSETS, W_PITCH)  # fmt: skip
    else:
        k = tl.arange(0, BK)
        a_at = a + m[:, None] * A_PITCH + k[None, :]
        w_at = wide_at(w, n, k, K, W_PITCH)
        step: tl.constexpr = 64 if W_PITCH == 0 else 1
        for start in range(begin, end, BK):
            x = tl.load(a_at + start, mask=live[:, None], other=0.0)
            acc = tl.dot(x, tl.load(w_at + start * step, cache_modifier=CACHE), acc)
    return acc


@triton.jit
def accumulate_pair(acc0, acc1, a, m, live, w, w_scale, w_offset, n0, n1, begin, end,
                    A_PITCH: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
                    BITS: tl.constexpr, W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr,
                    W_PITCH: tl.constexpr, FP8: tl.constexpr, W_SHARED: tl.constexpr,
                    A_FP8: tl.constexpr):  # fmt: skip
    """``accumulate`` for two blocks of columns that read the same rows once."""
    if FP8 != "":
        acc0, acc1 = accumulate_fp8_pair(acc0, acc1, a, m, live, w, w_scale, n0, n1, begin, end,
                                         A_PITCH, BK, CACHE, W_GROUP, W_PITCH, FP8, W_SHARED,
                                         A_FP8)  # fmt: skip
    elif BITS != 16:
        acc0, acc1 = accumulate_codes_pair(acc0, acc1, a, m, live, w, w_scale, w_offset, n0, n1,
                                           begin, end, A_PITCH, BK, CACHE, BITS, W_GROUP,
                                           W_OFFSETS, W_PITCH)  # fmt: skip
    else:
        k = tl.arange(0, BK)
        a_at = a + m[:, None] * A_PITCH + k[None, :]
        at0, at1 = wide_at(w, n0, k, K, W_PITCH), wide_at(w, n1, k, K, W_PITCH)
        step: tl.constexpr = 64 if W_PITCH == 0 else 1
        for start in range(begin, end, BK):
            x = tl.load(a_at + start, mask=live[:, None], other=0.0)
            acc0 = tl.dot(x, tl.load(at0 + start * step, cache_modifier=CACHE), acc0)
            acc1 = tl.dot(x, tl.load(at1 + start * step, cache_modifier=CACHE), acc1)
    return acc0, acc1


@triton.jit
def part_at(parts, tile, split, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Where a split's sums [BM, BN] of a tile lie."""
    i = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    return parts + (tile * SPLIT + split) * (BM * BN) + i


@triton.jit
def is_last(counter, count, DRAIN: tl.constexpr):
    """Whether this is the last of ``count`` programs to come here; the counter is then 0 again.

    All that the programs stored before is visible to the last one: every wave waits for its own
    stores (DRAIN), the barrier joins the waves, and the addition releases and acquires. On AMD the
    barrier alone does not wait for stores, and the addition only for those of its own wave.
    """
    if DRAIN != "":
        tl.inline_asm_elementwise(
            DRAIN, "=v,v", [tl.arange(0, 64)], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def join(parts, tile, live, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The sums [BM, BN] of all splits of a tile, added in order."""
    acc = tl.zeros((BM, BN), tl.float32)
    for split in range(SPLIT):
        at = part_at(parts, tile, split, SPLIT, BM, BN)
        acc += tl.load(at, mask=live[:, None], other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def add_to_stream(acc, m, first, live, bias, norm, x, xw, ssq, N: tl.constexpr,
                  HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """x += acc[BM, BN] (+ bias) at rows m and columns first, first + 1, …, with its by-products."""
    n = first + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias + n)[None, :]
    old = tl.load(x + m[:, None] * N + n[None, :], mask=live[:, None], other=0.0)
    store_stream(old + acc, m, first, live, norm, x, xw, ssq, N, BM, BN)


@triton.jit
def residual_matmul(
    a,  # [T, A_PITCH] bf16
    w,  # packed [N, K] bf16, or codes
    w_scale,  # of the codes; not read where BITS is 16
    w_offset,  # not read unless W_OFFSETS
    bias,  # [N] fp32; not read unless HAS_BIAS
    norm,  # [N] fp32, weight of the norm that follows
    x,  # [T, N] fp32, in place
    xw,  # [T, N] bf16
    ssq,  # [T, N / 16] fp32
    parts,  # [tiles, SPLIT, BM, BN] fp32
    counters,  # [tiles] i32, zero
    num_tokens,
    N: tl.constexpr, K: tl.constexpr, A_PITCH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr, W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr,
    FP8: tl.constexpr, W_SHARED: tl.constexpr, A_FP8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_XCD: tl.constexpr, CACHE: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """x += a @ Wᵀ (+ bias); xw = x * norm; ssq = sums of 16 squares of x."""
    num_m = tl.cdiv(num_tokens, BM)
    tile_m, tile_n, split = place(num_m, N // BN, SPLIT, GROUP_M, NUM_XCD)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    live = m < num_tokens
    begin, end = depth_of(split, K, BK, SPLIT)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = accumulate(acc, a, m, live, w, w_scale, w_offset, n, begin, end, A_PITCH, K, BK, CACHE,
                     BITS, W_GROUP, W_OFFSETS, W_PITCH, FP8, W_SHARED, A_FP8)  # fmt: skip
    tile = tile_m * (N // BN) + tile_n
    last = True
    if SPLIT > 1:
        tl.store(part_at(parts, tile, split, SPLIT, BM, BN), acc, mask=live[:, None])
        last = is_last(counters + tile, SPLIT, DRAIN)
    if last:
        if SPLIT > 1:
            acc = join(parts, tile, live, SPLIT, BM, BN)
        add_to_stream(acc, m, tile_n * BN, live, bias, norm, x, xw, ssq, N, HAS_BIAS, BM, BN)
