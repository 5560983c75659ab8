"""fp8 in KV pages: what is stored, what is read, whole models, and files with scales to tokens."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.simulator import Part
from sinterlm.ir.bf16 import round_bf16
from sinterlm.ir.fp8 import FP8_NAN, Fp8Name, from_fp8, to_fp8
from sinterlm.ir.reference import RefBatch, RefCache, Reference
from sinterlm.ir.reference_attention import attend, visible
from sinterlm.ir.reference_codes import fp8_heads
from tests.gpu import oplib
from tests.gpu.models import CONFIGS, tiny
from tests.gpu.oplib import QK_EPS, Paged, Tile
from tests.gpu.test_kernels import ATTENTION, check_attention, data, exact, scales

pytestmark = pytest.mark.usefixtures("triton")

NAMES: tuple[Fp8Name, ...] = ("e4m3fn", "e4m3fnuz")


#: What e4m3fn's scale is to the device's.
OF_FN: dict[Fp8Name, float] = {"e4m3fn": 1.0, "e4m3fnuz": 0.5}


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "has_norm", "page", "tile"),
    [
        (1, 3, 32, False, 16, Tile(BN=16)),
        (4, 1, 64, True, 32, Tile(BN=32, SPLIT=2)),
        (5, 2, 32, True, 16, Tile(BN=16, BM=32)),
        (7, 1, 64, False, 48, Tile(BM=32, BN=16, SPLIT=2)),
        (8, 1, 128, False, 64, Tile(BN=64)),
    ],
)
def test_what_is_stored(
    group: int, kv_heads: int, dim: int, has_norm: bool, page: int, tile: Tile, name: Fp8Name
) -> None:
    """k and v of float64 as the twin stores them, or its neighbour where a sum in fp32 falls on the
    other side of a middle; nothing beside them."""
    rng = np.random.default_rng(0)
    step = Paged([5, 1, 20], [5, 33, 40], kv_heads, dim, page, fp8=name, scales=(0.03, 0.011))
    rows, hidden, total = 26, 256, kv_heads * (group + 2)
    xw, w = data(rows, hidden, total * dim)
    ssq = rng.uniform(5, 20, size=(rows, hidden // 16)).astype("f4")
    bias = None if has_norm else rng.normal(size=total * dim).astype("f4")
    norms = tuple(rng.normal(size=(2, dim)).astype("f4")) if has_norm else None
    angle = np.outer(np.arange(64), 1e4 ** (-np.arange(0, dim, 2) / dim))
    cos, sin = np.cos(angle).astype("f4"), np.sin(angle).astype("f4")
    q = oplib.qkv(step, xw, ssq, w, bias, norms, (cos, sin), group, tile)
    wide = Paged(step.queries, step.contexts, kv_heads, dim, page)
    assert np.array_equal(q, oplib.qkv(wide, xw, ssq, w, bias, norms, (cos, sin), group, tile))

    every = exact(xw, w) * scales(ssq, hidden) + (0 if bias is None else bias)
    every = every.reshape(rows, kv_heads, group + 2, dim)
    k, v = every[:, :, -2], every[:, :, -1]
    if norms is not None:
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + QK_EPS) * norms[1]
    c, s = (table[step.positions][:, None].astype("f8") for table in (cos, sin))
    for pages, want, scale in ((step.k, rotated(k, c, s), 0.03), (step.v, v, 0.011)):
        got, twin = step.load(pages), fp8_heads(want, scale * OF_FN[name])
        assert (got == twin).mean() > 0.99
        largest = 448 * scale * OF_FN[name]
        bound = 2.0**-4 * np.abs(want) + 2.0**-10 * scale + 1e-5
        clipped = np.clip(want, -largest, largest)
        assert np.all(np.abs(got - clipped) <= bound)
    stored = 2 * rows * kv_heads * dim
    assert sum((x != FP8_NAN[name]).sum() for x in (step.k, step.v)) == stored, "stray stores"


@pytest.mark.parametrize("rounding", ["cvt", "bits"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_too_large_becomes_the_largest(
    name: Fp8Name, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinity too; NaN stays, and padding stores nothing. Position 0 turns nothing."""
    if (name, rounding) == ("e4m3fnuz", "bits"):
        pytest.skip("no device rounds so")
    monkeypatch.setattr(oplib, "ROUNDING", rounding)
    step = Paged([3, 1], [3, 9], 1, 32, 16, fp8=name, scales=(2.0, 0.5))
    step.slots[3] = -1
    xw, w = np.zeros((4, 64), "f4"), np.zeros((3 * 32, 64), "f4")
    values = round_bf16([0.0, 1e-3, 1, -447, 449, -470, 1000, -3e38, np.inf, -np.inf, np.nan])
    xw[:, 0] = 1
    w[32 : 32 + len(values), 0], w[64 : 64 + len(values), 0] = values, values
    ssq = np.full((4, 4), 16 - 4 * oplib.EPS, "f4")
    tables = np.ones((16, 16), "f4"), np.zeros((16, 16), "f4")
    with np.errstate(invalid="ignore", over="ignore"):
        oplib.qkv(step, xw, ssq, w, None, None, tables, 1, Tile(BN=16))
    for pages, scale in ((step.k, 2.0), (step.v, 0.5)):
        # A column of w that is NaN or infinite meets zeros in the depth: NaN, where infinity was.
        got = step.load(pages)[:3, 0, : len(values)]
        assert np.isnan(got[:, 10]).all()
        twin = fp8_heads(values[:8], scale * OF_FN[name])
        assert np.array_equal(got[:, :8], np.repeat([twin], 3, 0))
        assert got[0, 7] == -448 * scale * OF_FN[name]
    assert (step.k != FP8_NAN[name]).sum() <= 3 * 32


def fp8_case(
    group: int, kv_heads: int, dim: int, page: int, queries: list[int], contexts: list[int],
    window: int, name: Fp8Name,
) -> tuple[Paged, np.ndarray, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """A step, its queries, and (y, the same with |v|) of what its pages stand for, in float64."""
    rng = np.random.default_rng(1)
    step = Paged(queries, contexts, kv_heads, dim, page, fp8=name, scales=(0.0171, 0.25))
    q = round_bf16(rng.normal(size=(sum(queries), kv_heads * group * dim)))
    y, size = np.zeros(q.shape), np.zeros(q.shape)
    for seq, length in enumerate(contexts):
        k, v = rng.normal(size=(2, length, kv_heads, dim)).astype("f4")
        v[length // 2] *= 2000  # beyond the largest number
        step.store(seq, k, v)
        k, v = (
            from_fp8(to_fp8(x / np.float32(s), name), name).astype("f8") * s
            for x, s in zip((k, v), step.scales, strict=True)
        )
        mine = step.seqs == seq
        heads = q[mine].reshape(-1, kv_heads * group, dim).astype("f8")
        mask = visible(step.positions[mine], length, window)
        for out, values in ((y, v), (size, np.abs(v))):
            found = attend(heads, k, values, mask, dim**-0.5, lambda x: x)
            out[mine] = found.reshape(len(found), -1)
    return step, q, (y, size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_of_prompts(case: tuple, name: Fp8Name) -> None:
    """Numbers are multiplied as they are: the bound is that of bf16 pages."""
    group, kv_heads, dim, page, queries, contexts, window, tile, block = case
    step, q, want = fp8_case(group, kv_heads, dim, page, queries, contexts, window, name)
    check_attention(oplib.attention(step, q, group, window, 1, tile, block), want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("group", "segments"), [(1, 4), (4, 2), (5, 4), (7, 1), (8, 3)])
def test_attention_of_decoding_rows(group: int, segments: int, name: Fp8Name) -> None:
    """Ranges of keys, some empty, merged in order; a context of 1, and pages that end within."""
    step, q, want = fp8_case(group, 1, 32, 16, [1] * 3, [1, 65, 130], 40 * (group == 5), name)
    found = [
        oplib.attention(step, q, group, 40 * (group == 5), segments, decode=True, order=order)
        for order in ("forward", "backward")
    ]
    assert np.array_equal(*found)
    check_attention(found[0], want)


def test_a_row_does_not_see_its_neighbours() -> None:
    """A sequence's bits are the same alone and beside others."""
    step, q, _ = fp8_case(5, 1, 32, 16, [1] * 3, [7, 65, 130], 0, "e4m3fnuz")
    every = oplib.attention(step, q, 5, 0, 4, decode=True)
    for seq in range(3):
        one = Paged([1], [step.contexts[seq]], 1, 32, 16, fp8="e4m3fnuz", scales=step.scales)
        one.k, one.v, one.table = step.k, step.v, step.table[seq : seq + 1].copy()
        alone = oplib.attention(one, q[seq : seq + 1], 5, 0, 4, decode=True)
        assert np.array_equal(alone[0], every[seq])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", ["k", "v"])
def test_damage_is_seen_by_those_who_see_its_token(half: str, name: Fp8Name) -> None:
    """NaN in K reaches all of the rows that see the token, NaN in V its column. There it reaches
    earlier rows of the same tile too, as it does in bf16, since their 0 times NaN is NaN; other
    columns and other sequences are as they were."""
    step, q, want = fp8_case(4, 1, 32, 16, [9, 9], [9, 9], 0, name)
    getattr(step, half)[step.slots[6] // 16, 0, 6, 3] = FP8_NAN[name]
    y = oplib.attention(step, q, 4).reshape(18, 4, 32)
    want = tuple(w.reshape(y.shape) for w in want)
    seen = (6, 7, 8)
    if half == "k":
        assert np.isnan(y[seen, :]).all()
        check_attention(y[:6], tuple(w[:6] for w in want))
    else:
        assert np.isnan(y[seen, :, 3]).all()
        rest = np.delete(np.arange(32), 3)
        check_attention(y[:9][..., rest], tuple(w[:9][..., rest] for w in want))
    check_attention(y[9:], tuple(w[9:] for w in want))


def test_tables_tell_scales_and_sizes() -> None:
    """e4m3fnuz has twice the scale; pages have half of bf16's bytes; layers share their kernels."""
    for device, factor in (("gfx942", 2), ("sm_90", 1)):
        table = tiny("qwen2-window", device, kv_fp8=True).table
        assert table.facts["kv_bytes"] == 1
        told = {
            (launch.slot.partition(".")[0], launch.layer): launch.args for launch in table.launches
        }
        of = {
            key: [float(a.removeprefix("number:")) for a in args if a.startswith("number:")]
            for key, args in told.items()
        }
        for layer, (k, v) in enumerate(((0.0117, 0.5), (1.0, 0.0031))):
            assert np.allclose(of["attention", layer], [k * factor, v * factor], rtol=1e-7)
            assert np.allclose(of["norm_qkv_rope_kv", layer], [1 / k / factor, 1 / v / factor])
        kernels = {k.constants["KV_FP8"] for k in table.kernels if "KV_FP8" in k.constants}
        assert kernels == {DEVICES[device].fp8}
        wide = tiny("qwen2-window", device).table
        assert wide.facts["kv_bytes"] == 2 and len(wide.kernels) == len(table.kernels)


def test_pages_of_a_model_hold_what_the_twin_holds() -> None:
    """A prompt through the interpreter of the table: K and V of every layer by the oracle."""
    model = tiny("qwen3", "gfx942", kv_fp8=True)
    simulator, cache = model.simulator(), RefCache()
    ids = [5, 17, 99, 3, 120, 8, 64, 2, 11, 40, 7, 1, 2, 3, 4, 5, 6, 7]
    Reference(model.plan.graph, model.weights, "bf16").step(RefBatch.of((0, 0, ids)), cache)
    simulator.step(Part([3, 9], 0, ids))
    for layer in range(CONFIGS["qwen3"].num_layers):
        pages = simulator.kv[layer][[3, 9]]  # [page, head, K or V, token, D]
        for which, want in enumerate(cache.read(layer, 0)):
            scale = model.plan.graph.kv_scales[layer][which]
            held = pages[:, :, which].transpose(0, 2, 1, 3).reshape(32, *want.shape[1:])
            assert (held[18:] == FP8_NAN["e4m3fnuz"]).all()
            # Twice the scale of e4m3fn: the same numbers at half of their value.
            twin = to_fp8(want / np.float32(2 * scale), "e4m3fnuz")
            assert (held[:18] == twin).mean() > 0.97
