"""The reference: fused equals plain, decode equals prefill, and both equal sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.ir.bf16 import round_bf16, to_bf16
from sinterlm.ir.graph import DecoderConfig, Graph, Rope
from sinterlm.ir.reference import Precision, RefBatch, RefCache, Reference, run
from sinterlm.ir.reference_attention import CHUNK, attend, rotate, visible
from sinterlm.ir.reference_ops import rms_norm, silu
from sinterlm.ir.reference_sampling import RowSampling
from sinterlm.passes.pipeline import fuse
from tests.ir.graphs import config, configs, plain_graph, random_weights


def logits_of(graph: Graph, weights: dict[str, np.ndarray], *runs: tuple[int, int, list[int]],
              precision: Precision = "fp64") -> np.ndarray:  # fmt: skip
    values = run(graph, weights, RefBatch.of(*runs), RefCache(), precision)
    return values["logits" if "logits" in values else "scores"]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, in units of the largest logit."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@settings(max_examples=60)
@given(configs(), st.integers(0, 1000))
def test_fused_equals_plain(c: DecoderConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 3)
    runs = [(i, 0, rng.integers(0, c.vocab_size, n).tolist()) for i, n in enumerate(lengths)]
    plain = plain_graph(c)
    fused, weights = fuse(plain), random_weights(plain, seed)
    exact = logits_of(plain, weights, *runs)
    assert gap(logits_of(fused, weights, *runs), exact) < 1e-12
    for graph in (plain, fused):
        assert gap(logits_of(graph, weights, *runs, precision="fp32"), exact) < 1e-4
        # Rounding: 2^-9 per operand, a few of them per layer, amplified by short norms at worst.
        assert gap(logits_of(graph, weights, *runs, precision="bf16"), exact) < 0.25


@settings(max_examples=25)
@given(configs(), st.integers(0, 1000), st.data())
def test_any_chunking_beside_any_neighbour(
    c: DecoderConfig, seed: int, data: st.DataObject
) -> None:
    """Prefill whole, in chunks, or token by token, alone or batched: the same logits."""
    graph = plain_graph(c)
    reference = Reference(fuse(graph), random_weights(graph, seed), "fp64")
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, c.vocab_size, 12).tolist()
    whole = reference.step(RefBatch.of((0, 0, ids)), RefCache())["logits"][0]
    cache, at = RefCache(), 0
    while at < len(ids):
        n = data.draw(st.integers(1, len(ids) - at))
        noise = rng.integers(0, c.vocab_size, 2).tolist()
        batch = RefBatch.of((7, 0, noise), (0, at, ids[at : at + n]))
        got = reference.step(batch, cache)["logits"][1]
        at += n
    assert np.abs(got - whole).max() < 1e-11


def test_bf16_rounds_where_kernels_do() -> None:
    graph = fuse(plain_graph(config(qk_norm=True, qkv_bias=True)))
    weights = random_weights(graph)
    values = run(graph, weights, RefBatch.of((0, 0, [1, 2, 3, 4])), RefCache(), "bf16")
    narrow = {name for name, value in graph.values.items() if value.dtype == "bf16"}
    for name in narrow:
        assert np.array_equal(values[name], round_bf16(values[name])), name
    wide = [name for name, value in graph.values.items() if value.dtype == "fp32"]
    embedding = graph.ops[0].writes[0]  # rows of a bf16 table
    for name in set(wide) - {embedding}:
        assert not np.array_equal(values[name], round_bf16(values[name])), name
    assert np.array_equal(values[embedding], round_bf16(values[embedding]))


def test_weights_may_come_as_bf16_bits() -> None:
    graph = plain_graph(config())
    weights = random_weights(graph)
    bits = {n: to_bf16(w) if w.ndim == 2 else w for n, w in weights.items()}
    run_ids = (0, 0, [5, 6, 7])
    a = logits_of(graph, weights, run_ids, precision="bf16")
    assert np.array_equal(a, logits_of(graph, bits, run_ids, precision="bf16"))


def test_values_have_the_shapes_of_the_table() -> None:
    for graph in (plain_graph(config()), fuse(plain_graph(config()))):
        batch = RefBatch.of((0, 0, [1, 2, 3]), (1, 0, [4]))
        values = run(graph, random_weights(graph), batch, RefCache())
        sizes = {"T": 4, "R": 2}
        for name, value in graph.values.items():
            expected = tuple(sizes[d] if isinstance(d, str) else d for d in value.shape)
            assert values[name].shape == expected, name
            kind = {"i": "i32"}.get(values[name].dtype.kind, "float")
            assert (kind == "i32") == (value.dtype == "i32"), name


def test_one_layer_by_hand() -> None:
    """The whole model written out once more, as loops over tokens and heads."""
    c = config(layers=1, heads=4, kv_heads=2, head_dim=4, hidden=8, ffn=6, vocab=9, qkv_bias=True)
    graph = plain_graph(c)
    w = {n: t.astype(np.float64) for n, t in random_weights(graph, 3).items()}
    ids = [3, 1, 8, 0, 3]
    xs = [w["embed"][i] for i in ids]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).sum() / 8 + 1e-5) * w[f"{name}.weight"]

    def turn(v: np.ndarray, p: int) -> np.ndarray:
        out = v.copy()
        for i in range(2):
            cos, sin = (f(p * c.rope.inv_freq[i]) * 1.25 for f in (np.cos, np.sin))
            out[i], out[i + 2] = v[i] * cos - v[i + 2] * sin, v[i + 2] * cos + v[i] * sin
        return out

    qs, ks, vs = [], [], []
    for p, x in enumerate(xs):
        n = norm(x, "0.attn_norm")
        q, k, v = (w[f"0.{m}.weight"] @ n + w[f"0.{m}.bias"] for m in "qkv")
        qs.append([turn(h, p) for h in q.reshape(4, 4)])
        ks.append([turn(h, p) for h in k.reshape(2, 4)])
        vs.append(list(v.reshape(2, 4)))
    p = len(ids) - 1
    heads = []
    for h in range(4):
        score = np.array([qs[p][h] @ ks[j][h // 2] for j in range(p + 1)]) / np.sqrt(4)
        prob = np.exp(score - score.max())
        heads.append(sum(a * vs[j][h // 2] for j, a in enumerate(prob / prob.sum())))
    x = xs[p] + w["0.o.weight"] @ np.concatenate(heads)
    n = norm(x, "0.mlp_norm")
    gate, up = w["0.gate.weight"] @ n, w["0.up.weight"] @ n
    x = x + w["0.down.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    expected = w["head"] @ norm(x, "final_norm")
    assert gap(logits_of(graph, w, (0, 0, ids))[0], expected) < 1e-12


def test_window_hides_old_keys() -> None:
    positions = np.array([4, 5])
    assert visible(positions, 6, 0).tolist() == [[True] * 5 + [False], [True] * 6]
    assert visible(positions, 6, 2).tolist() == [
        [False, False, False, True, True, False],
        [False, False, False, False, True, True],
    ]
    graph = plain_graph(config(layers=1, windows=(3,)))
    weights = random_weights(graph)
    far, near = [9, 9, 1, 2, 3], [8, 7, 1, 2, 3]
    assert np.array_equal(
        logits_of(graph, weights, (0, 0, far)), logits_of(graph, weights, (0, 0, near))
    )
    full = plain_graph(config(layers=1))
    assert gap(logits_of(full, weights, (0, 0, far)), logits_of(full, weights, (0, 0, near))) > 1e-6


def test_attention_over_many_chunks() -> None:
    """Chunk maxima change nothing but rounding, and fully masked chunks add exactly nothing."""
    rng = np.random.default_rng(0)
    num_keys = 2 * CHUNK + 37
    q = rng.standard_normal((2, 6, 8)) * 3
    k, v = (rng.standard_normal((num_keys, 2, 8)) for _ in range(2))
    mask = visible(np.array([num_keys - 2, num_keys - 1]), num_keys, 20)
    got = attend(q, k, v, mask, 0.5, lambda x: x)
    for t in range(2):
        keys = np.flatnonzero(mask[t])
        for h in range(6):
            prob = np.exp((k[keys, h // 3] @ q[t, h]) * 0.5)
            expected = (prob / prob.sum()) @ v[keys, h // 3]
            assert np.allclose(got[t, h], expected, rtol=1e-12)
    rounded = attend(*(x.astype(np.float32) for x in (q, k, v)), mask, 0.5, round_bf16)
    assert 0 < np.abs(rounded - got).max() < 2.0**-8 * np.abs(v).max()


def test_rope_keeps_lengths_and_depends_on_distance() -> None:
    rope = Rope((1.0, 0.1, 0.01))
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 6))
    turned = [[rotate(x, np.array([p]), rope)[0, 0] for p in (0, 5, 90, 95)] for x in (q, k)]
    assert np.array_equal(turned[0][0], q[0, 0])
    assert np.allclose([np.linalg.norm(x) for x in turned[0]], np.linalg.norm(q))
    assert turned[0][1] @ turned[1][0] == pytest.approx(turned[0][3] @ turned[1][2])
    doubled = rotate(q, np.array([5]), replace(rope, attention_factor=2.0))[0, 0]
    assert np.allclose(doubled, 2 * turned[0][1])


def test_formulas() -> None:
    assert silu(np.array([-1e4, 0.0, 1e4])).tolist() == [0, 0, 1e4]
    assert np.allclose(rms_norm(np.array([[3.0, 4.0]]), 0.0), np.array([[3, 4]]) / np.sqrt(12.5))
    assert rms_norm(np.zeros((1, 4)), 1e-6).tolist() == [[0, 0, 0, 0]]


def test_sampling_parameters_reach_their_rows() -> None:
    graph = fuse(plain_graph(config()))
    weights = random_weights(graph)
    params = (RowSampling(allowed=(7,)), RowSampling(), RowSampling(allowed=(0, 1)))
    runs = [(i, 0, [3, 4]) for i in range(3)]
    ids = run(graph, weights, RefBatch.of(*runs, sampling=params), RefCache())["ids"]
    assert ids[0] == 7 and ids[2] in (0, 1)
    assert ids.dtype == np.int32


def test_cache_overwrites_and_refuses_holes() -> None:
    cache = RefCache()
    row = np.ones((1, 2, 4))
    cache.append(0, 3, 0, np.repeat(row, 4, 0), np.repeat(row, 4, 0))
    cache.append(0, 3, 2, row * 5, row * 6)
    assert cache.length(0, 3) == 3 and cache.length(1, 3) == 0
    assert cache.read(0, 3)[0][:, 0, 0].tolist() == [1, 1, 5]
    with pytest.raises(ValueError, match="holds 3 tokens, not 4"):
        cache.append(0, 3, 4, row, row)
    cache.free(3)
    assert cache.length(0, 3) == 0


@pytest.mark.parametrize("ids", [[], [-1], [50]])
def test_refuses_token_ids(ids: list[int]) -> None:
    graph = plain_graph(config())
    with pytest.raises(ValueError, match="token ids"):
        run(graph, random_weights(graph), RefBatch.of((0, 0, ids)), RefCache())
