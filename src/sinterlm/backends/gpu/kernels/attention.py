"""q, k and v with bias, norm, rope and paged KV; and attention over the pages.

K and V of one token and KV head are D elements side by side; the strides of pages, tokens and heads
come from the caller, so that pages may be ours or a host's. Elements are bf16, or with KV_FP8 fp8
numbers that are times a scale, one for K and one for V of a layer: k and v are multiplied by the
inverse and saturated when they are stored, widened to bf16, which holds every fp8 number, when they
are read, and their sums meet the scales in fp32.
"""

import triton
import triton.language as tl

from sinterlm.backends.gpu.kernels.fp8 import saturated
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
def store_heads(a, b, m, live, head, d, ssq, bias, q_norm, k_norm, cos, sin, positions, kv_slots, q,
                k_base, v_base, k_inverse, v_inverse, page_tokens, page_stride, token_stride,
                head_stride, KV_FP8: tl.constexpr, KV_ROUNDING: tl.constexpr, H: tl.constexpr,
                HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
                QK_EPS: tl.constexpr, HAS_BIAS: tl.constexpr, QK_NORM: tl.constexpr,
                BM: tl.constexpr):  # fmt: skip
    """Scale, bias, heads' norm and rope of columns d and d + D / 2 of a head [BM, BN]; then q to
    its rows, k and v to their pages."""
    n = head * D + d
    scale = rstd(ssq, m, live, EPS, H, BM)[:, None]
    a *= scale
    b *= scale
    if HAS_BIAS:
        a += tl.load(bias + n)[None, :]
        b += tl.load(bias + n + D // 2)[None, :]
    kv_head = head // (GROUP + 2)
    part = head % (GROUP + 2)  # below GROUP a query head, GROUP = k, GROUP + 1 = v
    if part <= GROUP:
        if QK_NORM:
            mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D
            inverse = (1.0 / tl.sqrt_rn(mean + QK_EPS))[:, None]
            weight = q_norm if part < GROUP else k_norm
            a = a * inverse * tl.load(weight + d)[None, :]
            b = b * inverse * tl.load(weight + D // 2 + d)[None, :]
        angle = tl.load(positions + m, mask=live, other=0)[:, None] * (D // 2) + d[None, :]
        c = tl.load(cos + angle, mask=live[:, None], other=0.0)
        s = tl.load(sin + angle, mask=live[:, None], other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if part < GROUP:
        query = m[:, None] * (HKV * GROUP * D) + (kv_head * GROUP + part) * D + d[None, :]
        tl.store(q + query, a.to(tl.bfloat16), mask=live[:, None])
        tl.store(q + query + D // 2, b.to(tl.bfloat16), mask=live[:, None])
    else:
        slot = tl.load(kv_slots + m, mask=live, other=-1)
        page = (slot // page_tokens).to(tl.int64) * page_stride
        row = page + slot % page_tokens * token_stride + kv_head * head_stride
        base = k_base if part == GROUP else v_base
        at = row[:, None] + d[None, :]
        if KV_FP8 != "":
            inverse = k_inverse if part == GROUP else v_inverse
            lower = saturated(a * inverse, KV_FP8, KV_ROUNDING)
            upper = saturated(b * inverse, KV_FP8, KV_ROUNDING)
        else:
            lower = a.to(tl.bfloat16)
            upper = b.to(tl.bfloat16)
        tl.store(base + at, lower, mask=(slot >= 0)[:, None])
        tl.store(base + at + D // 2, upper, mask=(slot >= 0)[:, None])


@triton.jit
def norm_qkv_rope_kv(
    xw,  # [T, H] bf16
    ssq,  # [T, H / 16] fp32
    w,  # packed [HKV * (GROUP + 2) * D, H] bf16: per KV head its queries, k, v; or codes
    w_scale,  # of the codes; not read where BITS is 16
    w_offset,  # not read unless W_OFFSETS
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
    parts,  # [tiles, SPLIT, 2, BM, BN] fp32
    counters,  # [tiles] i32, zero
    num_tokens,
    page_tokens,
    page_stride,  # elements, as are the next two
    token_stride,
    head_stride,
    H: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    EPS: tl.constexpr, QK_EPS: tl.constexpr, HAS_BIAS: tl.constexpr, QK_NORM: tl.constexpr,
    BITS: tl.constexpr, W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr,
    FP8: tl.constexpr, W_SHARED: tl.constexpr, A_FP8: tl.constexpr,
    KV_FP8: tl.constexpr, KV_ROUNDING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_XCD: tl.constexpr, CACHE: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """One program computes BN columns of a head's first half and the BN that rope pairs with them
    (all of both halves where QK_NORM needs them: BN = D / 2)."""
    per_head: tl.constexpr = D // 2 // BN
    num_n: tl.constexpr = HKV * (GROUP + 2) * per_head
    num_m = tl.cdiv(num_tokens, BM)
    tile_m, tile_n, split = place(num_m, num_n, SPLIT, GROUP_M, NUM_XCD)
    m = tile_m * BM + tl.arange(0, BM)
    live = m < num_tokens
    head = tile_n // per_head
    d = tile_n % per_head * BN + tl.arange(0, BN)
    n = head * D + d
    begin, end = depth_of(split, H, BK, SPLIT)
    a = tl.zeros((BM, BN), tl.float32)
    b = tl.zeros((BM, BN), tl.float32)
    a, b = accumulate_pair(a, b, xw, m, live, w, w_scale, w_offset, n, n + D // 2, begin, end, H, H,
                           BK, CACHE, BITS, W_GROUP, W_OFFSETS, W_PITCH, FP8, W_SHARED,
                           A_FP8)  # fmt: skip
    tile = tile_m * num_n + tile_n
    last = True
    if SPLIT > 1:
        tl.store(part_at(parts, tile * 2, split, SPLIT, BM, BN), a, mask=live[:, None])
        tl.store(part_at(parts, tile * 2 + 1, split, SPLIT, BM, BN), b, mask=live[:, None])
        last = is_last(counters + tile, SPLIT, DRAIN)
    if last:
        if SPLIT > 1:
            a = join(parts, tile * 2, live, SPLIT, BM, BN)
            b = join(parts, tile * 2 + 1, live, SPLIT, BM, BN)
        store_heads(a, b, m, live, head, d, ssq, bias, q_norm, k_norm, cos, sin, positions,
                    kv_slots, q, k_base, v_base, k_inverse, v_inverse, page_tokens, page_stride,
                    token_stride, head_stride, KV_FP8, KV_ROUNDING, H, HKV, GROUP, D, EPS, QK_EPS,
                    HAS_BIAS, QK_NORM, BM)  # fmt: skip


@triton.jit
def attention(
    q,  # [T, HKV * GROUP * D] bf16
    y,  # [T, HKV * GROUP * D] bf16
    k_base,  # K of the layer, bf16 or fp8
    v_base,  # V of the layer, as K
    k_scale,  # fp32: what numbers of K are times; not read unless KV_FP8
    v_scale,
    page_table,  # [num_seqs, table_stride] i32
    query_start,  # [num_seqs + 1] i32
    context_lens,  # [num_seqs] i32: keys after this step; 0 = a row of padding
    part_o,  # [blocks, HKV, SEGMENTS, BM, D] fp32
    part_ml,  # [blocks, HKV, SEGMENTS, 2, BM] fp32: maximum and sum
    counters,  # [blocks, HKV] i32, zero
    num_seqs,
    table_stride,
    page_tokens,
    page_stride,  # elements, as are the next two
    token_stride,
    head_stride,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, KV_FP8: tl.constexpr, DECODE: tl.constexpr, SEQS: tl.constexpr,
    BM: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """y = softmax(SCALE * q k) v, causal, over the pages. Grid (blocks, HKV, SEGMENTS).

    A block is BM // GROUP tokens of one sequence with all query heads of a KV head, so keys and
    values are read once for the group. DECODE: block i is the one token of sequence i; else block
    (query_start[i] // tokens + i) is the first of sequence i, and SEQS >= num_seqs is a power of 2.
    The keys are cut into SEGMENTS ranges by their number alone; the last program to finish merges
    the ranges in order.
    """
    tokens_per_block: tl.constexpr = BM // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    if DECODE:
        seq = block
        first = 0
    else:
        i = tl.arange(0, SEQS)
        starts = tl.load(query_start + i, mask=i < num_seqs, other=0)
        before = (i < num_seqs) & (starts // tokens_per_block + i <= block)
        seq = tl.sum(before.to(tl.int32), 0) - 1
        first = (block - tl.load(query_start + seq) // tokens_per_block - seq) * tokens_per_block
    begin = tl.load(query_start + seq)
    length = tl.load(query_start + seq + 1) - begin
    context = tl.load(context_lens + seq)
    row = tl.arange(0, BM)
    token = first + row // GROUP
    live = (token < length) & (row < tokens_per_block * GROUP)
    position = context - length + token
    top = tl.minimum(context, context - length + first + tokens_per_block)  # one past the last key
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - length + first - WINDOW + 1, 0)
    if first >= length:
        top = 0
    tiles = tl.cdiv(top, TILE)
    each = tl.maximum(tl.cdiv(tiles, SEGMENTS), 1)
    first_segment = low // TILE // each
    num_segments = tl.cdiv(tiles, each) - first_segment
    if (segment >= first_segment) & (segment < first_segment + num_segments):
        d = tl.arange(0, D)
        head = kv_head * GROUP + row % GROUP
        at = ((begin + token) * (HKV * GROUP) + head)[:, None] * D + d[None, :]
        query = tl.load(q + at, mask=live[:, None], other=0.0)
        acc = tl.zeros((BM, D), tl.float32)
        maximum = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        scale = SCALE
        if KV_FP8 != "":
            scale *= k_scale
        start = tl.maximum(segment * each, low // TILE)
        for tile in range(start, tl.minimum((segment + 1) * each, tiles)):
            key = tile * TILE + tl.arange(0, TILE)
            here = key < top
            page = tl.load(page_table + seq * table_stride + key // page_tokens, here, other=0)
            base = page.to(tl.int64) * page_stride + kv_head * head_stride
            base += key % page_tokens * token_stride
            k = paged(k_base + base[None, :] + d[:, None], here[None, :], KV_FP8)
            score = tl.dot(query, k, tl.zeros((BM, TILE), tl.float32)) * scale
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            score = tl.where(seen & live[:, None], score, float("-inf"))
            new = tl.maximum(maximum, tl.max(score, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            share = tl.exp(maximum - shift)
            prob = tl.exp(score - shift[:, None])
            total = total * share + tl.sum(prob, 1)
            v = paged(v_base + base[:, None] + d[None, :], here[:, None], KV_FP8)
            acc = tl.dot(prob.to(tl.bfloat16), v, acc * share[:, None])
            maximum = new
        place = (block * HKV + kv_head) * SEGMENTS
        last = True
        if SEGMENTS > 1:
            store_segment(part_o, part_ml, place + segment, acc, maximum, total, live, BM, D)
            last = is_last(counters + block * HKV + kv_head, num_segments, DRAIN)
        if last:
            if SEGMENTS > 1:
                acc, total = merge(part_o, part_ml, place, first_segment, num_segments, live, BM, D)
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            if KV_FP8 != "":
                result *= v_scale
            tl.store(y + at, result.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def paged(at, here, KV_FP8: tl.constexpr):
    """Elements of pages as bf16; zeros where there is no key."""
    if KV_FP8 != "":
        kind: tl.constexpr = tl.float8e4b8 if KV_FP8 == "e4m3fnuz" else tl.float8e4nv
        found = tl.load(at, mask=here, other=0).to(kind, bitcast=True).to(tl.bfloat16)
    else:
        found = tl.load(at, mask=here, other=0.0)
    return found


@triton.jit
def store_segment(part_o, part_ml, index, acc, maximum, total, live, BM: tl.constexpr,
                  D: tl.constexpr):  # fmt: skip
    """Leave what one range of keys gave."""
    row = tl.arange(0, BM)
    at = (index * BM + row)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(part_o + at, acc, mask=live[:, None])
    tl.store(part_ml + index * (2 * BM) + row, maximum)
    tl.store(part_ml + index * (2 * BM) + BM + row, total)


@triton.jit
def merge(part_o, part_ml, place, first, count, live, BM: tl.constexpr, D: tl.constexpr):
    """(acc, total) of ``count`` ranges of keys, in their order."""
    row = tl.arange(0, BM)
    d = tl.arange(0, D)
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    maximum = tl.full((BM,), float("-inf"), tl.float32)
    for i in range(count):
        index = place + first + i
        at = (index * BM + row)[:, None] * D + d[None, :]
        part = tl.load(part_o + at, mask=live[:, None], other=0.0, cache_modifier=".cg")
        m = tl.load(part_ml + index * (2 * BM) + row, cache_modifier=".cg")
        s = tl.load(part_ml + index * (2 * BM) + BM + row, cache_modifier=".cg")
        new = tl.maximum(maximum, m)
        shift = tl.where(new == float("-inf"), 0.0, new)
        old_share = tl.exp(maximum - shift)
        share = tl.exp(m - shift)
        acc = acc * old_share[:, None] + part * share[:, None]
        total = total * old_share + s * share
        maximum = new
    return acc, total
