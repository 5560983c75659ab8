"""GPU kernels against float64 at odd shapes: rows that end within a tile, split depths, pages of
any size, every group of query heads; what must not be read holds NaN.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sinterlm.backends.gpu.operands import deepest_block
from sinterlm.backends.gpu.tuning import divisor
from sinterlm.ir.bf16 import error_bound, round_bf16
from sinterlm.ir.quant import GemmFormat
from sinterlm.ir.reference_attention import attend, visible
from sinterlm.ir.reference_ops import silu
from sinterlm.ir.reference_sampling import RowSampling, sample
from tests.gpu import oplib
from tests.gpu.oplib import EPS, QK_EPS, Paged, Tile

pytestmark = pytest.mark.usefixtures("triton")


def data(rows: int, k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """a[rows, k], w[n, k] that bf16 holds."""
    rng = np.random.default_rng(seed)
    a, w = rng.normal(size=(rows, k)), rng.normal(size=(n, k)) / k**0.5
    return round_bf16(a), round_bf16(w)


def exact(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    return a.astype("f8") @ w.astype("f8").T


def scales(ssq: np.ndarray, hidden: int) -> np.ndarray:
    return 1 / np.sqrt(ssq.astype("f8").sum(1, keepdims=True) / hidden + EPS)


#: rows, k, n, tile: few rows and many, tails in both, every way to cut the depth.
GEMMS = [
    (1, 64, 64, Tile()),
    (3, 320, 64, Tile(BN=16, SPLIT=4)),
    (16, 192, 128, Tile(BN=64)),
    (17, 128, 128, Tile(BK=128, NUM_XCD=8)),
    (37, 192, 192, Tile(BM=16, BN=64, SPLIT=2, GROUP_M=2, NUM_XCD=3)),
    (70, 128, 64, Tile(BM=64, BN=64)),
]


@pytest.mark.parametrize(("rows", "k", "n", "tile"), GEMMS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_residual(rows: int, k: int, n: int, tile: Tile, has_bias: bool) -> None:
    a, w = data(rows, k, n)
    rng = np.random.default_rng(1)
    bias, norm, x = (rng.normal(size=s).astype("f4") for s in (n, n, (rows, n)))
    out, xw, ssq = oplib.residual(a, w, bias if has_bias else None, norm, x, tile)
    truth = x + exact(a, w) + (bias if has_bias else 0)
    assert np.all(np.abs(out - truth) <= error_bound(a, w) + 4e-7 * (np.abs(truth) + 1))
    assert np.array_equal(xw, round_bf16(out * norm))
    assert np.allclose(ssq, (out.astype("f8") ** 2).reshape(rows, -1, 16).sum(-1), rtol=1e-6)


#: Every way to store a matrix in codes: bits, group, symmetric.
FORMS = {
    form.name: form
    for form in (
        GemmFormat(4, 32, True, "graph", 0),
        GemmFormat(4, 32, False, "graph", 0),
        GemmFormat(4, 64, True, "graph", 0),
        GemmFormat(4, 128, False, "graph", 0),
        GemmFormat(4, 0, False, "graph", 0),
        GemmFormat(8, 0, True, "graph", 0),
        GemmFormat(8, 32, False, "graph", 0),
        GemmFormat(8, 128, True, "graph", 0),
        GemmFormat(8, 0, True, "graph", 0, "e4m3fn"),
        GemmFormat(8, 0, True, "graph", 0, "e4m3fnuz"),
        GemmFormat(8, 128, True, "graph", 0, "e4m3fn"),
        GemmFormat(8, 128, True, "graph", 0, "e4m3fn", 128),
        GemmFormat(8, 128, True, "graph", 0, "e4m3fnuz", 128),
    )
}


def blocks(form: GemmFormat, depth: int) -> int:
    """The longest step along k that a kernel takes."""
    return divisor(min(128, deepest_block(form.group)), depth)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("rows", "k", "n", "tile"),
    [(3, 320, 64, Tile(BN=16, SPLIT=4)), (37, 256, 128, Tile(BM=32, BN=64, NUM_XCD=3))],
)
def test_residual_of_codes(form: GemmFormat, rows: int, k: int, n: int, tile: Tile) -> None:
    """Codes are multiplied as they are: no error but that of sums in fp32. k = 320 ends within a
    group of 128."""
    a, w = data(rows, k, n)
    norm, x = np.ones(n, "f4"), np.random.default_rng(1).normal(size=(rows, n)).astype("f4")
    tile = replace(tile, BK=blocks(form, k))
    out = oplib.residual(a, w, None, norm, x, tile, form=form)[0]
    value, size = oplib.meaning(w, form)
    truth = x + exact(a, value)
    # Beside the sums over k: a product with the scale, and sums over groups and splits.
    bound = 1.5 * error_bound(a, size) + 4e-7 * (np.abs(truth) + np.abs(x))
    assert np.all(np.abs(out - truth) <= bound)


def test_codes_of_a_damaged_group_reach_their_column() -> None:
    a, w = data(2, 128, 64)
    w[5, 40] = np.nan
    norm, x = np.ones(64, "f4"), np.zeros((2, 64), "f4")
    out = oplib.residual(a, w, None, norm, x, Tile(), form=FORMS["w4g32"])[0]
    assert np.isnan(out[:, 5]).all() and np.isfinite(np.delete(out, 5, 1)).all()


def test_the_order_of_programs_never_shows() -> None:
    """Splits are added in their order, whoever arrives last; counters end at zero each time."""
    a, w = data(5, 512, 64)
    x, norm = np.zeros((5, 64), "f4"), np.ones(64, "f4")
    tile = Tile(SPLIT=4)
    want = oplib.residual(a, w, None, norm, x, tile)[0]
    for order in ("backward", 1):
        assert np.array_equal(oplib.residual(a, w, None, norm, x, tile, order)[0], want)
    swizzled = Tile(SPLIT=4, NUM_XCD=8, GROUP_M=2)
    assert np.array_equal(oplib.residual(a, w, None, norm, x, swizzled)[0], want)


def test_rows_do_not_see_each_other() -> None:
    a, w = data(19, 128, 64)
    x, norm, tile = np.zeros((19, 64), "f4"), np.ones(64, "f4"), Tile(SPLIT=2)
    want = oplib.residual(a, w, None, norm, x, tile)[0]
    for rows in (1, 7, 16):
        assert np.array_equal(oplib.residual(a[:rows], w, None, norm, x[:rows], tile)[0],
                              want[:rows])  # fmt: skip


def test_nan_and_infinity_reach_exactly_their_outputs() -> None:
    a, w = np.zeros((3, 64), "f4"), np.ones((64, 64), "f4")
    a[1, 7], a[2, 9] = np.nan, np.inf
    w[5, 9] = 0
    norm, x = np.ones(64, "f4"), np.zeros((3, 64), "f4")
    with np.errstate(invalid="ignore"):
        out = oplib.residual(a, w, None, norm, x, Tile())[0]
    assert not out[0].any()
    assert np.isnan(out[1]).all()
    assert np.isnan(out[2, 5]) and np.all(np.isinf(np.delete(out[2], 5)))


@pytest.mark.parametrize(
    ("rows", "hidden", "ffn", "tile", "form", "has_bias"),
    [
        (1, 64, 64, Tile(BN=16), None, True),
        (5, 192, 100, Tile(BN=64, SPLIT=3), None, True),
        (5, 192, 100, Tile(BN=64, SPLIT=3), None, False),
        (33, 128, 136, Tile(BM=32, BN=32, GROUP_M=2, NUM_XCD=8), None, False),
        (5, 192, 100, Tile(BN=64, SPLIT=3), FORMS["w4g32"], True),
        (5, 192, 100, Tile(BN=32), FORMS["w4g128z"], False),
        (17, 128, 70, Tile(BN=64, BK=128), FORMS["w8"], False),
        (3, 64, 64, Tile(BN=16), FORMS["w8g32z"], False),
        (3, 128, 64, Tile(BN=16), FORMS["w4z"], True),
        (5, 192, 100, Tile(BN=64, SPLIT=3), FORMS["e4m3fn"], True),
        (17, 256, 70, Tile(BN=32, BK=128), FORMS["e4m3fng128"], False),
    ],
)
def test_gate_up(
    rows: int, hidden: int, ffn: int, tile: Tile, form: GemmFormat | None, has_bias: bool
) -> None:
    xw, gate = data(rows, hidden, ffn)
    up = data(rows, hidden, ffn, seed=2)[1]
    rng = np.random.default_rng(3)
    biases = tuple(rng.normal(size=ffn).astype("f4") for _ in range(2)) if has_bias else None
    ssq = rng.uniform(1, 20, size=(rows, hidden // 16)).astype("f4")
    h = oplib.gate_up(xw, ssq, gate, up, biases, tile, form=form)
    scale = scales(ssq, hidden)
    g, u = (exact(xw, oplib.meaning(w, form)[0]) * scale for w in (gate, up))
    if biases is not None:
        g, u = g + biases[0], u + biases[1]
    truth = silu(g) * u
    assert np.all(np.abs(h - truth) <= 2.0**-8 * np.abs(truth) + 1e-5)


def test_a_norm_of_next_to_nothing() -> None:
    """A mean of squares below eps."""
    xw, gate = data(1, 64, 64)
    up = data(1, 64, 64, seed=2)[1]
    ssq = np.full((1, 4), 16e-6, "f4")
    h = oplib.gate_up(xw / 1024, ssq, gate, up, None, Tile())
    g, u = (exact(xw / 1024, w) * scales(ssq, 64) for w in (gate, up))
    truth = silu(g) * u
    assert np.all(np.abs(h - truth) <= 2.0**-8 * np.abs(truth) + 1e-5)


def check_heads(
    step: Paged, q: np.ndarray, every: np.ndarray, norms: tuple | None, tables: tuple
) -> None:
    """q[T, Hq · D] and the step's pages against ``every`` [T, heads, group + 2, D] in float64,
    which is neither normed nor turned."""
    rows, dim = len(q), step.dim
    parts = {"q": every[:, :, :-2], "k": every[:, :, -2:-1]}
    c, s = (table[step.positions][:, None].astype("f8") for table in tables)
    for name, weight in zip(parts, norms or (None, None), strict=True):
        x = parts[name].reshape(rows, -1, dim)
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + QK_EPS) * weight
        a, b = np.split(x, 2, axis=-1)
        parts[name] = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    for got, want in (
        (q.reshape(rows, -1, dim), parts["q"]),
        (step.load(step.k), parts["k"]),
        (step.load(step.v), every[:, :, -1]),
    ):
        assert np.all(np.abs(got - want) <= 2.0**-8 * (np.abs(want) + 0.05))


@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "has_norm", "page", "tile", "form"),
    [
        (1, 3, 32, False, 16, Tile(BN=16), None),
        (4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), None),
        (5, 2, 32, True, 16, Tile(BN=16, BM=32), None),
        (7, 1, 64, False, 48, Tile(BM=32, BN=16, SPLIT=2), None),
        (8, 1, 128, False, 64, Tile(BN=64), None),
        (4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), FORMS["w4g32"]),
        (1, 3, 32, False, 16, Tile(BN=16, BK=128), FORMS["w4g128z"]),
        (5, 2, 32, True, 16, Tile(BN=16, BM=32), FORMS["e4m3fng128"]),
        (7, 1, 64, False, 48, Tile(BM=32, BN=16, SPLIT=2), FORMS["e4m3fnuz"]),
        (8, 1, 128, False, 64, Tile(BN=64, BK=128), FORMS["e4m3fn-b128"]),
    ],
)
def test_qkv(
    group: int, kv_heads: int, dim: int, has_norm: bool, page: int, tile: Tile,
    form: GemmFormat | None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    step = Paged([5, 1, 20], [5, 33, 40], kv_heads, dim, page)
    rows, hidden, total = 26, 256, kv_heads * (group + 2)
    xw, w = data(rows, hidden, total * dim)
    ssq = rng.uniform(5, 20, size=(rows, hidden // 16)).astype("f4")
    bias = None if has_norm else rng.normal(size=total * dim).astype("f4")
    norms = tuple(rng.normal(size=(2, dim)).astype("f4")) if has_norm else None
    angle = np.outer(np.arange(64), 1e4 ** (-np.arange(0, dim, 2) / dim))
    cos, sin = np.cos(angle).astype("f4"), np.sin(angle).astype("f4")
    q = oplib.qkv(step, xw, ssq, w, bias, norms, (cos, sin), group, tile, form=form)

    every = exact(xw, oplib.meaning(w, form)[0]) * scales(ssq, hidden) + (
        0 if bias is None else bias
    )
    check_heads(step, q, every.reshape(rows, kv_heads, group + 2, dim), norms, (cos, sin))
    stored = 2 * rows * kv_heads * dim
    assert sum((x != oplib.NAN16).sum() for x in (step.k, step.v)) == stored, "stray stores"


def test_a_row_of_padding_stores_nothing() -> None:
    step = Paged([1, 1], [3, 9], 1, 32, 16)
    step.slots[1] = -1
    xw, w = data(2, 64, 3 * 32)
    ssq, table = np.ones((2, 4), "f4"), np.ones((16, 16), "f4")
    oplib.qkv(step, xw, ssq, w, None, None, (table, table), 1, Tile(BN=16))
    assert (step.k != oplib.NAN16).sum() == 32


#: group, KV heads, head size, page, queries, contexts, window, tile, rows of a block
ATTENTION = [
    (1, 3, 32, 16, [3, 1], [3, 18], 0, 16, 16),
    (4, 1, 64, 128, [9, 2], [150, 2], 100, 32, 32),
    (5, 2, 32, 32, [20, 1], [60, 33], 0, 32, 16),
    (7, 1, 64, 48, [1, 5, 1], [1, 31, 100], 24, 16, 16),
    (8, 1, 128, 64, [17], [90], 0, 64, 128),
]


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_of_prompts(case: tuple) -> None:
    group, kv_heads, dim, page, queries, contexts, window, tile, block = case
    step, q, want = attention_case(group, kv_heads, dim, page, queries, contexts, window)
    y = oplib.attention(step, q, group, window, 1, tile, block)
    check_attention(y, want)


@pytest.mark.parametrize(("group", "segments"), [(1, 4), (5, 4), (7, 1), (8, 3)])
@pytest.mark.parametrize("window", [0, 40])
def test_attention_of_decoding_rows(group: int, segments: int, window: int) -> None:
    """Ranges of keys, some of them empty, merged in order by the last; a context of 1 too."""
    contexts = [1, 65, 130]
    step, q, want = attention_case(group, 1, 32, 16, [1] * 3, contexts, window)
    found = [
        oplib.attention(step, q, group, window, segments, decode=True, order=order)
        for order in ("forward", "backward")
    ]
    assert np.array_equal(*found)
    check_attention(found[0], want)


def test_a_sequence_of_padding_is_left_alone() -> None:
    step, q, want = attention_case(4, 1, 32, 16, [1, 1], [20, 7], 0)
    step.context_lens[1] = 0
    y = oplib.attention(step, q, 4, 0, 2, decode=True)
    check_attention(y[:1], tuple(w[:1] for w in want))
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize("decode", [True, False])
def test_sequences_without_tokens_are_left_alone(decode: bool) -> None:
    """As a padded batch of a graph has them: rows behind the last sequence's, contexts of 0."""
    step, q, want = attention_case(4, 1, 32, 16, [1, 1], [20, 7], 0)
    step.query_start = np.array([0, 1, 2, 2, 2], np.int32)
    step.context_lens = np.array([20, 7, 0, 0], np.int32)
    step.queries = [1, 1, 0, 0]
    step.table = np.concatenate([step.table, np.full_like(step.table, -(10**6))])
    q = np.concatenate([q, np.full_like(q, np.nan)])
    y = oplib.attention(step, q, 4, 0, 2 if decode else 1, decode=decode)
    check_attention(y[:2], want)
    assert np.isnan(y[2:]).all()


def attention_case(
    group: int, kv_heads: int, dim: int, page: int, queries: list[int], contexts: list[int],
    window: int,
) -> tuple[Paged, np.ndarray, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """A step, its queries, and (y, the same with |v|) in float64."""
    rng = np.random.default_rng(1)
    step = Paged(queries, contexts, kv_heads, dim, page)
    q = round_bf16(rng.normal(size=(sum(queries), kv_heads * group * dim)))
    y, size = np.zeros(q.shape), np.zeros(q.shape)
    for seq, length in enumerate(contexts):
        k, v = round_bf16(rng.normal(size=(2, length, kv_heads, dim)))
        step.store(seq, k, v)
        mine = step.seqs == seq
        heads = q[mine].reshape(-1, kv_heads * group, dim).astype("f8")
        mask = visible(step.positions[mine], length, window)
        for out, values in ((y, v), (size, np.abs(v))):
            found = attend(heads, k.astype("f8"), values.astype("f8"), mask, dim**-0.5, _same)
            out[mine] = found.reshape(len(found), -1)
    return step, q, (y, size)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def check_attention(y: np.ndarray, want: tuple[np.ndarray, np.ndarray]) -> None:
    """Probabilities are rounded to bf16, 2^-8 of each, and then the output; the rest is fp32."""
    truth, size = want
    assert np.all(np.abs(y - truth) <= 2.0**-8 * (size + np.abs(truth)) + 2e-6)


@pytest.mark.parametrize(
    ("tile", "form"),
    [
        (Tile(BN=64), None),
        (Tile(BM=16, BN=32, GROUP_M=2, NUM_XCD=8), None),
        (Tile(BN=64, BK=128), FORMS["w8"]),
        (Tile(BN=32), FORMS["w4g32"]),
        (Tile(BN=64, BK=128), FORMS["e4m3fn"]),
    ],
)
def test_head_and_draw(tile: Tile, form: GemmFormat | None) -> None:
    """Greedy rows and warm ones; the id, its logprob, ties to the lower id, the slot."""
    xw, w = data(21, 128, 131)
    rows = [0, 20, 3, *range(4, 19)]
    w[77], w[130] = w[12], w[12]
    xw[3] = 8 * w[12]
    ssq = np.random.default_rng(5).uniform(1, 9, size=(21, 8)).astype("f4")
    heat = [0.0, 0.7, 0.0, *[1.3] * 15]
    seeds = [2**64 - 1 - i for i in range(18)]
    draws = list(range(100, 118))
    slots = [3, -1, 0, *[-1] * 15]
    logits, ids, logprobs, drawn = oplib.draw(xw, ssq, rows, w, heat, seeds, draws, tile, slots,
                                              form)  # fmt: skip
    value, size = oplib.meaning(w, form)
    truth = (exact(xw, value) * scales(ssq, 128))[rows]
    bound = (error_bound(xw, size) * scales(ssq, 128))[rows]
    assert np.all(np.abs(logits - truth) <= bound + 2e-6 * (np.abs(truth) + 1))
    assert ids[2] == 12
    for i in range(len(rows)):
        want = sample(logits[i], RowSampling(heat[i], seed=seeds[i], position=draws[i]))
        assert ids[i] == want.token_id or want.gap < 1e-4
        assert abs(logprobs[i] - want.logprob) < 1e-5
    assert list(drawn) == [ids[2], -1, -1, ids[0]]


def test_leaving_a_buffer_is_seen() -> None:
    a, w = data(2, 64, 64)
    with pytest.raises(IndexError, match="residual_matmul leaves its buffers"):
        oplib.residual(a, w[:, :64], None, np.ones(48, "f4"), np.zeros((2, 64), "f4"), Tile())
