"""KV pages in int8 codes: byte for byte what the NumPy twin stores, and attention over values that
codes hold badly, against float64. Ordinary values are in test_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oplib import OpLib, PagedStep, round_up, rounded
from tests.kernels.test_attention import attend, put


def awkward(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows [..., D] that are ordinary, zero, denormal, tiny, ordinary with one outlier, or huge."""
    x = rng.normal(size=shape).astype("f4")
    rows = x.reshape(-1, shape[-1])
    rows[1::7] = 0
    rows[2::7] *= np.float32(1e-41)
    rows[3::7] *= np.float32(1e-30)
    rows[5::7, rng.integers(shape[-1])] = 60
    rows[4::97] *= np.float32(1e30)
    return x


def store_through_kernel(
    ops: OpLib, step: PagedStep, k: np.ndarray, v: np.ndarray, num_heads: int
) -> None:
    """k, v[T, Hkv, D] unchanged through the GEMM, the norm and rope, into the step's pages."""
    rows, kv_heads, dim = k.shape
    group = num_heads // kv_heads
    xw = np.concatenate([k, v], axis=2).reshape(rows, -1)
    w = np.zeros((kv_heads, group + 2, dim, kv_heads, 2, dim), "f4")
    for head in range(kv_heads):
        for half in range(2):
            w[head, group + half, :, head, half] = np.eye(dim)
    h = xw.shape[1]
    tables = np.ones((4096, dim // 2), "f4"), np.zeros((4096, dim // 2), "f4")
    ssq = np.full((rows, h // 16), 16, "f4")  # rstd is 1
    ops.qkv(step, xw, ssq, w.reshape(-1, h), None, None, None, *tables, 0.0, 0.0, num_heads,
            threads=3)  # fmt: skip


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("bf16", [True, False])
def test_pages_hold_the_codes_of_the_twin(kv8_ops: OpLib, bf16: bool, page: int) -> None:
    """Every byte of every page: codes and scales where tokens are, and nothing beside them."""
    queries, contexts = [37, 1, 5], [37, 130, 69]
    step, twin = (PagedStep(queries, contexts, 2, 48, page, bf16, codes=True) for _ in range(2))
    k, v = rounded(awkward(np.random.default_rng(0), 2, sum(queries), 2, 48), bf16)
    k[3, 1, 7], v[20, 0, 2] = np.nan, np.inf
    store_through_kernel(kv8_ops, step, k, v, 4)
    k[[3, 20]] = v[[3, 20]] = np.nan  # a row of a GEMM is damaged as a whole
    for t, (seq, pos) in enumerate(zip(step.token_seq, step.positions, strict=True)):
        twin.store(seq, pos, k[t], v[t])
        assert np.isnan(twin.slot(seq, pos)[2]).all() == (t in (3, 20))
    assert step.pages.tobytes() == twin.pages.tobytes()


def test_a_token_has_the_same_codes_in_any_step(kv8_ops: OpLib) -> None:
    """One by one and all at once, in pages of another size."""
    k, v = np.random.default_rng(1).normal(size=(2, 40, 2, 64)).astype("f4")
    whole = PagedStep([40], [40], 2, 64, 64, True, codes=True)
    store_through_kernel(kv8_ops, whole, k, v, 6)
    one = PagedStep([1], [40], 2, 64, 16, True, codes=True)
    for pos in range(40):
        one.contexts = [pos + 1]
        store_through_kernel(kv8_ops, one.ask([1]), k[pos : pos + 1], v[pos : pos + 1], 6)
    for pos in range(40):
        for got, want in zip(one.slot(0, pos), whole.slot(0, pos), strict=True):
            assert np.array_equal(got, want), pos


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
@pytest.mark.parametrize("window", [0, 19])
def test_awkward_values(kv8_ops: OpLib, group: int, bf16: bool, window: int) -> None:
    """Prefill and decode over rows of very different scales; no scale leaks into another row.

    A logit is a sum of D products and three factors, the output one of L products: each is off by
    at most so many units of 2^-24 of the sum of its magnitudes.
    """
    rng = np.random.default_rng(group)
    dim, page = {1: 48, 4: 64, 5: 128, 7: 80, 8: 16}[group], 32
    queries, contexts = [9, 1, 1], [33, 300, 17]
    step = PagedStep(queries, contexts, 2, dim, page, bf16, codes=True)
    kv = []
    for seq, length in enumerate(contexts):
        k, v = awkward(rng, 2, length, 2, dim)
        kv.append(put(step, seq, np.clip(k, -10, 10), v))
    q = rng.normal(size=(sum(queries), 2 * group * dim)).astype("f4")
    scale = dim**-0.5
    y = kv8_ops.attention(step, q, 2 * group, scale, window, threads=2)
    rq = rounded(q, bf16).reshape(len(q), 2 * group, dim).astype("f8")
    want = attend(step, kv, rq, 2 * group, scale, window)
    size = attend(step, [(k, np.abs(v)) for k, v in kv], rq, 2 * group, scale, window)
    most = max(float((np.abs(k).sum(-1)).max()) for k, _ in kv) * np.abs(rq).max() * scale
    logit = (dim + 4) * 2.0**-24 * most
    bound = (2 * logit + 2 * (round_up(max(contexts), 16) + 8) * 2.0**-24) * size
    assert np.all(np.abs(y - want) <= bound + (2.0**-8 * np.abs(want) if bf16 else 0))


def test_zeros_stay_zeros(kv8_ops: OpLib) -> None:
    """All keys zero: equal shares; all values zero: exactly 0."""
    step = PagedStep([1], [21], 1, 16, 16, True, codes=True)
    v = np.zeros((21, 1, 16), "f4")
    put(step, 0, v, v)
    q = np.ones((1, 16), "f4")
    assert not kv8_ops.attention(step, q, 1, 0.25).any()
    v[:, :, 3] = np.arange(21)[:, None]
    put(step, 0, np.zeros_like(v), v)
    y = kv8_ops.attention(step, q, 1, 0.25)
    assert np.allclose(y[0, 3], 10.0, rtol=2.0**-8) and not np.delete(y, 3, axis=1).any()


@pytest.mark.parametrize("half", ["K", "V"])
def test_damage_is_seen_by_those_who_see_its_token(kv8_ops: OpLib, half: str) -> None:
    """NaN in one head reaches every row from there on, and no row before it."""
    length = 40
    step = PagedStep([length], [length], 1, 16, 16, True, codes=True)
    kv = np.random.default_rng(2).normal(size=(2, length, 1, 16)).astype("f4")
    kv["KV".index(half), 23, 0, 5] = np.nan
    put(step, 0, *kv)
    y = kv8_ops.attention(step, np.ones((length, 16), "f4"), 1, 0.25, threads=2)
    assert np.isfinite(y[:23]).all() and np.isnan(y[23:]).all()
