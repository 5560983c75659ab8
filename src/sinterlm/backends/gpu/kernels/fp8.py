"""fp8 matrices as GEMM operands: widened to bf16, which holds every fp8 number, or multiplied as
they are by activations that are rounded to fp8 on the way.

Per 64 columns: numbers [K/64][64 columns][64 of k], as the device writes fp8 (FP8: e4m3fn or
e4m3fnuz), then scales in fp32, [G][64], or [G] where the columns share them (W_SHARED); W_PITCH
bytes in all. Products are exact; sums meet the scale of their group (W_GROUP of k; 0 = all of k)
in fp32. With A_FP8 every row of a step of BK along k has a scale of its own, its largest magnitude
over the largest fp8 number; ``ir.reference_codes.fp8_rows`` says the same in NumPy. Rows are
rounded by an instruction ("cvt"), or by whole numbers ("bits") where Triton has none. KV pages
hold fp8 numbers too, in bytes.
"""

import triton
import triton.language as tl

#: Largest numbers of the two ways to write fp8.
LARGEST_FN = tl.constexpr(448.0)
LARGEST_FNUZ = tl.constexpr(240.0)
#: Rows whose largest magnitude is below this are zeros: 2 ** -100.
SMALLEST = tl.constexpr(7.888609052210118e-31)


@triton.jit
def fp8_at(w, n, k, W_PITCH: tl.constexpr):
    """Pointers [len(k), len(n)] to the numbers of columns n."""
    column = (n // 64).to(tl.int32) * W_PITCH + n % 64 * 64
    return w + column[None, :] + ((k // 64) * 4096 + k % 64)[:, None]


@triton.jit
def scale_at(scale, n, W_PITCH: tl.constexpr, W_SHARED: tl.constexpr):
    """Pointers to the first group's scales of columns n."""
    at = scale + (n // 64) * (W_PITCH // 4)
    return at if W_SHARED else at + n % 64


@triton.jit
def scales_of(scale, start, W_GROUP: tl.constexpr, W_SHARED: tl.constexpr):
    """The scales of the group that holds k = start."""
    step: tl.constexpr = 1 if W_SHARED else 64
    return tl.load(scale + start // W_GROUP * step)


@triton.jit
def numbers(at, FP8: tl.constexpr, CACHE: tl.constexpr):
    """fp8 numbers, as the device's instructions take them."""
    kind: tl.constexpr = tl.float8e4b8 if FP8 == "e4m3fnuz" else tl.float8e4nv
    return tl.load(at, cache_modifier=CACHE).to(kind, bitcast=True)


@triton.jit
def rounded(x):
    """x fp32, at most the largest number or NaN, as e4m3fn: to nearest even, by whole numbers."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # As ``ir.fp8.to_fp8``: three bits of the mantissa, or whole steps below the smallest normal.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    steps = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(size < 0x3C800000, steps, normal), 0x7F) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def saturated(x, FP8: tl.constexpr, ROUNDING: tl.constexpr):
    """x fp32 as bytes of fp8 numbers: what is beyond the largest one becomes it, infinity too; NaN
    stays NaN. The largest of e4m3fnuz is half of e4m3fn's, so that with twice the scale all devices
    store the same."""
    kind: tl.constexpr = tl.float8e4b8 if FP8 == "e4m3fnuz" else tl.float8e4nv
    largest: tl.constexpr = LARGEST_FN / 2 if FP8 == "e4m3fnuz" else LARGEST_FN
    x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
    number = rounded(x) if ROUNDING == "bits" else x.to(kind)
    return number.to(tl.uint8, bitcast=True)


@triton.jit
def narrowed(x, FP8: tl.constexpr, A_FP8: tl.constexpr):
    """x [BM, BK] bf16 as fp8 numbers, and the scale of each row, fp32 [BM]."""
    kind: tl.constexpr = tl.float8e4b8 if FP8 == "e4m3fnuz" else tl.float8e4nv
    largest: tl.constexpr = LARGEST_FNUZ if FP8 == "e4m3fnuz" else LARGEST_FN
    wide = x.to(tl.float32)
    top = tl.max(tl.abs(wide), 1)
    is_zero = top < SMALLEST
    inverse = tl.where(is_zero, 0.0, largest / tl.where(is_zero, 1.0, top))
    scaled = wide * inverse[:, None]
    return rounded(scaled) if A_FP8 == "bits" else scaled.to(kind), top / largest


@triton.jit
def add_fp8(acc, x, step, w, scale, start, W_GROUP: tl.constexpr, W_SHARED: tl.constexpr,
            A_FP8: tl.constexpr):  # fmt: skip
    """acc + x @ w with the scales of x (``step``, where it is fp8) and of w's group."""
    if A_FP8 != "":
        if W_GROUP == 0:
            acc += tl.dot(x, w) * step[:, None]
        else:
            per = scales_of(scale, start, W_GROUP, W_SHARED)
            acc += tl.dot(x, w) * (step[:, None] * per[None, :])
    elif W_GROUP == 0:
        acc = tl.dot(x, w.to(tl.bfloat16), acc)
    else:
        per = scales_of(scale, start, W_GROUP, W_SHARED)
        acc += tl.dot(x, w.to(tl.bfloat16)) * per[None, :]
    return acc


@triton.jit
def accumulate_fp8(acc, a, m, live, w, w_scale, n, begin, end, A_PITCH: tl.constexpr,
                   BK: tl.constexpr, CACHE: tl.constexpr, W_GROUP: tl.constexpr,
                   W_PITCH: tl.constexpr, FP8: tl.constexpr, W_SHARED: tl.constexpr,
                   A_FP8: tl.constexpr):  # fmt: skip
    """a[m, begin:end] @ W[n, begin:end]ᵀ, ``acc`` being zeros; rows that are not live are zeros.
    BK divides W_GROUP."""
    k = tl.arange(0, BK)
    a_at = a + m[:, None] * A_PITCH + k[None, :]
    w_at = fp8_at(w, n, k, W_PITCH)
    scale = scale_at(w_scale, n, W_PITCH, W_SHARED)
    for start in range(begin, end, BK):
        x = tl.load(a_at + start, mask=live[:, None], other=0.0)
        if A_FP8 != "":
            x, step = narrowed(x, FP8, A_FP8)
        else:
            step = 1.0
        y = numbers(w_at + start * 64, FP8, CACHE)
        acc = add_fp8(acc, x, step, y, scale, start, W_GROUP, W_SHARED, A_FP8)
    if W_GROUP == 0:
        acc *= tl.load(scale)[None, :]
    return acc


@triton.jit
def accumulate_fp8_pair(acc0, acc1, a, m, live, w, w_scale, n0, n1, begin, end,
                        A_PITCH: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
                        W_GROUP: tl.constexpr, W_PITCH: tl.constexpr, FP8: tl.constexpr,
                        W_SHARED: tl.constexpr, A_FP8: tl.constexpr):  # fmt: skip
    """``accumulate_fp8`` for two blocks of columns that read the same rows once."""
    k = tl.arange(0, BK)
    a_at = a + m[:, None] * A_PITCH + k[None, :]
    at0, at1 = fp8_at(w, n0, k, W_PITCH), fp8_at(w, n1, k, W_PITCH)
    scale0 = scale_at(w_scale, n0, W_PITCH, W_SHARED)
    scale1 = scale_at(w_scale, n1, W_PITCH, W_SHARED)
    for start in range(begin, end, BK):
        x = tl.load(a_at + start, mask=live[:, None], other=0.0)
        if A_FP8 != "":
            x, step = narrowed(x, FP8, A_FP8)
        else:
            step = 1.0
        y = numbers(at0 + start * 64, FP8, CACHE)
        acc0 = add_fp8(acc0, x, step, y, scale0, start, W_GROUP, W_SHARED, A_FP8)
        y = numbers(at1 + start * 64, FP8, CACHE)
        acc1 = add_fp8(acc1, x, step, y, scale1, start, W_GROUP, W_SHARED, A_FP8)
    if W_GROUP == 0:
        acc0 *= tl.load(scale0)[None, :]
        acc1 *= tl.load(scale1)[None, :]
    return acc0, acc1


@triton.jit
def fp8_row(table, table_scale, row, n, W_GROUP: tl.constexpr, W_PITCH: tl.constexpr,
            FP8: tl.constexpr, W_SHARED: tl.constexpr):  # fmt: skip
    """Elements n of one row (a column of the GEMM operand), fp32."""
    at = (row // 64) * W_PITCH + (row % 64) * 64 + (n // 64) * 4096 + n % 64
    step: tl.constexpr = 1 if W_SHARED else 64
    group = n // W_GROUP * step if W_GROUP != 0 else n * 0
    scale = tl.load(scale_at(table_scale, row, W_PITCH, W_SHARED) + group)
    return numbers(table + at, FP8, "").to(tl.float32) * scale
