"""QKV with rope and page writes, and paged attention, against float64, over NaN-poisoned pages."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.ir.reference_codes import coded_heads
from tests.kernels.oplib import OpLib, PagedStep, rounded


def rope_tables(dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.outer(np.arange(length), 1e4 ** (-np.arange(0, dim, 2) / dim))
    return np.cos(angle).astype("f4"), np.sin(angle).astype("f4")


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x[T, heads, D], cos/sin[T, D/2] (NeoX pairs)."""
    a, b = np.split(x, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norm", "page"),
    [(4, 4, 16, False, 16), (7, 1, 64, True, 32), (10, 2, 80, True, 16), (4, 2, 128, False, 64)],
)
def test_qkv(
    ops: OpLib, heads: int, kv_heads: int, dim: int, norm: bool, page: int, bf16: bool
) -> None:
    rng = np.random.default_rng(0)
    step = PagedStep([5, 1, 20], [5, 33, 40], kv_heads, dim, page, bf16)
    rows, h, total = 26, 72, heads + 2 * kv_heads
    xw = rng.normal(size=(rows, h)).astype("f4")
    w = (rng.normal(size=(total * dim, h)) / h**0.5).astype("f4")
    ssq = rng.uniform(5, 20, size=(rows, 5)).astype("f4")
    bias = rng.normal(size=total * dim).astype("f4")
    qn, kn = ((rng.normal(size=dim).astype("f4") if norm else None) for _ in range(2))
    cos, sin = rope_tables(dim, 64)
    q = ops.qkv(step, xw, ssq, w, bias, qn, kn, cos, sin, 1e-5, 1e-6, heads, threads=3)
    rstd = 1 / np.sqrt(ssq.astype("f8").sum(1, keepdims=True) / h + 1e-5)
    all_heads = rounded(xw, bf16).astype("f8") @ rounded(w, bf16).astype("f8").T * rstd + bias
    all_heads = all_heads.reshape(rows, kv_heads, heads // kv_heads + 2, dim)
    parts = {"q": all_heads[:, :, :-2], "k": all_heads[:, :, -2:-1], "v": all_heads[:, :, -1:]}
    for name, weight in (("q", qn), ("k", kn)):
        x = parts[name].reshape(rows, -1, dim)
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
        parts[name] = rotate(x, cos[step.positions], sin[step.positions])
    # One rounding to bf16; in fp32, sums of values up to ~5 that may cancel in the rotation.
    tolerance, near_zero = (2.0**-8, 0.05) if bf16 else (3e-6, 1.0)
    got_k, got_v = zip(
        *(step.load(step.token_seq[t], step.positions[t]) for t in range(rows)), strict=True
    )
    for got, want in (
        (q.reshape(rows, -1, dim), parts["q"]),
        (np.array(got_k), parts["k"]),
        (np.array(got_v), parts["v"].reshape(rows, kv_heads, dim)),
    ):
        assert np.all(np.abs(got - want) <= tolerance * (np.abs(want) + near_zero))


@pytest.mark.parametrize(("length", "queries"), [(1, 1), (17, 17), (33, 1), (6, 6), (9, 4)])
def test_writing_an_even_token_clears_its_odd_neighbour(
    ops: OpLib, length: int, queries: int
) -> None:
    """Pages start as NaN; after the step every pair of V that holds a token is free of it."""
    step = PagedStep([queries], [length], 1, 16, 32, True)
    for pos in range(length - queries):
        step.store(0, pos, np.ones((1, 16)), np.ones((1, 16)))
    xw, w = np.ones((queries, 16), "f4"), np.ones((48, 16), "f4")
    cos, sin = rope_tables(16, 64)
    ops.qkv(
        step, xw, np.ones((queries, 1), "f4"), w, None, None, None, cos, sin, 1e-5, 0.0, 1,
        threads=2,
    )  # fmt: skip
    for pos in range(length + length % 2):
        v = step.load(0, pos)[1]
        assert np.isfinite(v).all()
        assert np.all(v == 0) == (pos == length)


def fill(step: PagedStep, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random k, v for every cached position; returned per sequence as [len, Hkv, D]."""
    out = []
    for s, length in enumerate(step.contexts):
        k, v = rng.normal(size=(2, length, step.heads, step.dim)).astype("f4")
        out.append(put(step, s, k, v))
    return out


def put(step: PagedStep, seq: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store k, v[len, Hkv, D]; returned as what the pages hold."""
    for pos in range(len(k)):
        step.store(seq, pos, k[pos], v[pos])
    if step.codes:
        return coded_heads(k), coded_heads(v)
    return rounded(k, step.bf16), rounded(v, step.bf16)


def attend(
    step: PagedStep, kv: list, q: np.ndarray, heads: int, scale: float, window: int
) -> np.ndarray:
    """The meaning: softmax over visible keys in float64."""
    out = np.zeros((len(q), heads, step.dim))
    group = heads // step.heads
    for t, (s, pos) in enumerate(zip(step.token_seq, step.positions, strict=True)):
        first = max(0, pos - window + 1) if window else 0
        for head in range(heads):
            k, v = (x[first : pos + 1, head // group].astype("f8") for x in kv[s])
            logit = k @ q[t, head] * scale
            p = np.exp(logit - logit.max())
            out[t, head] = p @ v / p.sum()
    return out.reshape(len(q), -1)


CASES = [
    # heads, kv heads, dim, page tokens, queries, contexts, window
    (4, 4, 16, 16, [3, 1], [3, 18], 0),
    (7, 1, 64, 32, [1, 1, 1], [1, 31, 700], 0),
    (10, 2, 80, 16, [40, 1], [300, 257], 0),
    (5, 1, 64, 64, [130], [400], 0),
    (4, 1, 128, 128, [9, 2], [520, 2], 100),
    (6, 2, 48, 16, [70, 1, 1], [270, 600, 16], 24),
    (8, 1, 16, 16, [2, 5], [40, 261], 30),
]


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_attention(kv_ops: OpLib, case: tuple, bf16: bool) -> None:
    heads, kv_heads, dim, page, queries, contexts, window = case
    rng = np.random.default_rng(1)
    step = PagedStep(queries, contexts, kv_heads, dim, page, bf16, codes=kv_ops.codes)
    kv = fill(step, rng)
    q = rng.normal(size=(len(step.positions), heads * dim)).astype("f4")
    scale = dim**-0.5
    y = kv_ops.attention(step, q, heads, scale, window, threads=2)
    rq = rounded(q, bf16).reshape(len(q), heads, dim).astype("f8")
    want = attend(step, kv, rq, heads, scale, window)
    if kv_ops.codes and bf16:  # only the output is rounded
        assert np.all(np.abs(y - want) <= 2.0**-8 * np.abs(want) + 3e-6)
        return
    # bf16: probabilities and the output are rounded, 2^-9 each, against outputs of size ~1.
    assert np.max(np.abs(y - want)) <= (2.0**-7 if bf16 else 3e-6)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("window", [0, 40])
def test_decode_equals_prefill_bit_for_bit(kv_ops: OpLib, bf16: bool, window: int) -> None:
    heads, kv_heads, dim, length = 6, 2, 64, 300
    rng = np.random.default_rng(2)
    whole = PagedStep([length], [length], kv_heads, dim, 32, bf16, codes=kv_ops.codes)
    k, v = rng.normal(size=(2, length, kv_heads, dim)).astype("f4")
    put(whole, 0, k, v)
    q = rng.normal(size=(length, heads * dim)).astype("f4")
    prefill = kv_ops.attention(whole, q, heads, 0.125, window, threads=2)
    for pos in (0, 1, 2, 15, 16, 31, 63, 255, 256, 257, 299):
        one = PagedStep([1], [pos + 1], kv_heads, dim, 16, bf16, seed=pos, codes=kv_ops.codes)
        put(one, 0, k[: pos + 1], v[: pos + 1])
        y = kv_ops.attention(one, q[pos : pos + 1], heads, 0.125, window)
        assert y.tobytes() == prefill[pos : pos + 1].tobytes(), pos


@pytest.mark.parametrize("bf16", [True, False])
def test_pages_of_any_size_give_the_same_bits(kv_ops: OpLib, bf16: bool) -> None:
    """Many numbers, since bf16 hides most differences in the last bits of a sum."""
    heads, length = 8, 900
    rng = np.random.default_rng(6)
    k, v = rng.normal(size=(2, length, 1, 64)).astype("f4")
    q = rng.normal(size=(length, heads * 64)).astype("f4")
    found = set()
    for page in (16, 32, 48, 64):
        step = PagedStep([length], [length], 1, 64, page, bf16, codes=kv_ops.codes)
        put(step, 0, k, v)
        found.add(kv_ops.attention(step, q, heads, 0.125, threads=2).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("window", [0, 300])
def test_sharing_chunks_among_workers_changes_no_bit(
    kv_ops: OpLib, bf16: bool, window: int
) -> None:
    """Split over 2, 3 and 7 workers, with room for parts or without, one sequence or three."""
    for queries, contexts in (([1], [1500]), ([5], [700]), ([1, 1, 2], [257, 1030, 90])):
        step = PagedStep(queries, contexts, 1, 64, 32, bf16, codes=kv_ops.codes)
        fill(step, np.random.default_rng(3))
        q = np.random.default_rng(4).normal(size=(sum(queries), 3 * 64)).astype("f4")
        alone = kv_ops.attention(step, q, 3, 0.125, window, threads=1)
        for threads in (2, 3, 7):
            for room in (0, 1 << 20):
                shared = kv_ops.attention(
                    step, q, 3, 0.125, window, threads=threads, parts_floats=room
                )
                assert shared.tobytes() == alone.tobytes(), (threads, room, contexts)


def test_equal_scores_share_equally(kv_ops: OpLib) -> None:
    step = PagedStep([1], [37], 1, 16, 16, True, codes=kv_ops.codes)
    for pos in range(37):
        step.store(0, pos, np.zeros((1, 16)), np.full((1, 16), float(pos)))
    y = kv_ops.attention(step, np.ones((1, 16), "f4"), 1, 0.25)
    assert np.allclose(y, 18.0, rtol=2.0**-7)
