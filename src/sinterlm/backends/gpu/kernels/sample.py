"""The head with the draw in its epilogue, and the merge over blocks of the vocabulary.

A row is greedy, or drawn by Gumbel noise that depends on (seed, position, token id) alone: adding
it to logits / temperature and taking the largest draws from the softmax.
"""

import triton
import triton.language as tl

from sinterlm.backends.gpu.kernels.matmul import accumulate, place
from sinterlm.backends.gpu.kernels.norm import rstd

#: Temperatures below this are greedy.
GREEDY = tl.constexpr(1e-5)


@triton.jit
def mix64(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel(seed, position, ids):
    """-log(-log u) for rows of (seed [M] u64, position [M] i32) and token ids [N], [M, N]."""
    word = position.to(tl.int64).to(tl.uint64) + 0x9E3779B97F4A7C15
    key = mix64(seed ^ mix64(word))
    hashed = mix64(key[:, None] + (ids.to(tl.uint64) * 0xD1B54A32D192ED03)[None, :])
    u = ((hashed >> 41).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2 ** -23
    return -tl.log(-tl.log(u))


@triton.jit
def lm_head(
    xw,  # [T, H] bf16
    ssq,  # [T, H / 16] fp32
    rows,  # [R] i32: the tokens whose successor is drawn
    w,  # packed [V, H] bf16, or codes
    w_scale,  # of the codes; not read where BITS is 16
    w_offset,  # not read unless W_OFFSETS
    temperature,  # [R] fp32
    seeds,  # [R] u64
    draws,  # [R] i32: position of the token that is drawn
    logits,  # [R, VP] fp32; not written unless KEEP_LOGITS
    best,  # [3, R, blocks] fp32: best score, its logit, and the sum of exp(logit - maximum)
    tops,  # [R, blocks] fp32: largest logit
    best_ids,  # [R, blocks] i32
    num_rows,
    is_normed,  # 1: xw holds final-normed rows, and ssq is not read
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, EPS: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
    BITS: tl.constexpr, W_GROUP: tl.constexpr, W_OFFSETS: tl.constexpr, W_PITCH: tl.constexpr,
    FP8: tl.constexpr, W_SHARED: tl.constexpr, A_FP8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_XCD: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """logits = (xw[rows] @ Wᵀ) * rstd, rstd being 1 where rows are normed; of each BN columns the
    best, for ``merge_rows``."""
    blocks: tl.constexpr = VP // BN
    num_m = tl.cdiv(num_rows, BM)
    tile_m, tile_n, _ = place(num_m, blocks, 1, GROUP_M, NUM_XCD)
    r = tile_m * BM + tl.arange(0, BM)
    live = r < num_rows
    m = tl.load(rows + r, mask=live, other=0)
    n = tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = accumulate(acc, xw, m, live, w, w_scale, w_offset, n, 0, H, H, H, BK, CACHE, BITS,
                     W_GROUP, W_OFFSETS, W_PITCH, FP8, W_SHARED, A_FP8)  # fmt: skip
    scale = rstd(ssq, m, r < tl.where(is_normed != 0, 0, num_rows), EPS, H, BM)
    logit = acc * tl.where(is_normed != 0, 1.0, scale)[:, None]
    real = (n < V)[None, :]
    if KEEP_LOGITS:
        tl.store(logits + r[:, None] * VP + n[None, :], logit, mask=live[:, None] & real)
    logit = tl.where(real, logit, float("-inf"))
    top = tl.max(logit, 1)
    mass = tl.sum(tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
    heat = tl.load(temperature + r, mask=live, other=0.0)
    seed = tl.load(seeds + r, mask=live, other=0)
    draw = tl.load(draws + r, mask=live, other=0)
    warm = (heat >= GREEDY)[:, None]
    noisy = logit / tl.where(warm, heat[:, None], 1.0) + gumbel(seed, draw, n)
    score = tl.where(warm, noisy, logit)
    winner = tl.argmax(score, 1)
    chosen = tl.arange(0, BN)[None, :] == winner[:, None]
    at = r * blocks + tile_n
    plane = num_rows * blocks
    tl.store(best + at, tl.max(score, 1), mask=live)
    tl.store(best + plane + at, tl.sum(tl.where(chosen, logit, 0.0), 1), mask=live)
    tl.store(best + 2 * plane + at, mass, mask=live)
    tl.store(tops + at, top, mask=live)
    tl.store(best_ids + at, tile_n * BN + winner, mask=live)


@triton.jit
def merge_rows(
    best,  # as lm_head left them
    tops,
    best_ids,
    slots,  # [R] i32: where the drawn token is kept for the next step; -1 = nowhere
    ids,  # [R] i32
    logprobs,  # [R] fp32: log-softmax of the raw logits at the drawn token
    drawn,  # [slots] i32
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best over all blocks, ties to the lower id. Grid (R,); WIDTH >= BLOCKS, a power of 2."""
    r = tl.program_id(0)
    b = tl.arange(0, WIDTH)
    here = b < BLOCKS
    at = r * BLOCKS + b
    plane = tl.num_programs(0) * BLOCKS
    score = tl.load(best + at, mask=here, other=float("-inf"))
    winner = tl.argmax(score, 0)
    token = tl.load(best_ids + r * BLOCKS + winner)
    logit = tl.load(best + plane + r * BLOCKS + winner)
    mass = tl.load(best + 2 * plane + at, mask=here, other=0.0)
    top = tl.load(tops + at, mask=here, other=float("-inf"))
    highest = tl.max(top, 0)
    total = tl.sum(mass * tl.exp(top - highest), 0)
    tl.store(ids + r, token)
    tl.store(logprobs + r, logit - highest - tl.log(total))
    slot = tl.load(slots + r)
    if slot >= 0:
        tl.store(drawn + slot, token)
