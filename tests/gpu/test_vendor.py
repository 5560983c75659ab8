"""The vendor's GEMM in the launch table: matrices in rows, epilogues on sums that lie in memory,
and whole models whose prompts are multiplied by its twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.interpreter import run_kernel
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.simulator import Part
from sinterlm.backends.gpu.table import Table
from sinterlm.backends.gpu.tuning import read_tiles
from sinterlm.backends.gpu.vendor import LEAST_ROWS, WORKSPACE_BYTES, multiply, rows_of
from sinterlm.ir.bf16 import error_bound, from_bf16, round_bf16, to_bf16
from sinterlm.ir.fp8 import FP8_NAN, Fp8Name
from sinterlm.ir.plan import pitch_of
from sinterlm.ir.quant import GemmFormat
from sinterlm.ir.reference import RefBatch, RefCache, Reference
from sinterlm.ir.reference_ops import silu
from sinterlm.passes.packing import pack, unpack
from sinterlm.passes.pipeline import plan
from sinterlm.tune.catalogue import Sizes, tasks_of
from sinterlm.tune.gemm import GemmTask
from tests.gpu import oplib
from tests.gpu import test_kernels as kernels
from tests.gpu.models import CONFIGS, tiny
from tests.gpu.oplib import EPS, QK_EPS, Paged, Tile, nan16, nan32
from tests.gpu.test_kernels import data, exact, scales
from tests.ir.graphs import config, plain_graph, random_weights

ROWS = {"T": 300, "R": 1, "S": 1, "N": 0}


def sums_of(a: np.ndarray, w: np.ndarray, rows: int = 0) -> np.ndarray:
    """a[T, K], w[N, K] -> sums [T + 1, N] by the twin, N padded. One more row is ones, as rows of
    padding hold anything; what lies between the rows of w is NaN."""
    count, k = a.shape
    packed = np.full((-(-len(w) // 64) * 64, pitch_of(k)), oplib.NAN16)
    packed[:, :k] = 0
    packed[: len(w), :k] = to_bf16(w)
    sums = np.ones((count + 1, len(packed)), np.float32)
    shape = {"N": len(packed), "K": k, "W_PITCH": pitch_of(k)}
    multiply(to_bf16(a).reshape(-1), packed.reshape(-1), sums.reshape(-1), rows or count, shape)
    return sums


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("check", [
    lambda: kernels.test_residual(3, 320, 64, Tile(BN=16, SPLIT=4), True),
    lambda: kernels.test_residual(70, 128, 64, Tile(BM=64, BN=64), False),
    lambda: kernels.test_gate_up(5, 192, 100, Tile(BN=64, SPLIT=3), None, True),
    lambda: kernels.test_qkv(4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), None),
], ids=["few rows", "many rows", "gate_up", "qkv"])  # fmt: skip
@pytest.mark.parametrize("padding", [0, 64])
def test_kernels_read_rows_as_they_read_tiles(
    check, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What lies between two rows is NaN, and must not be read."""
    monkeypatch.setattr(oplib, "PADDING", padding)
    check()


def test_rows_never_begin_at_one_memory_channel() -> None:
    """512 bytes are 256 numbers; libraries load 16 bytes; zeros are few."""
    for k in range(64, 1 << 15, 64):
        assert pitch_of(k) % 256 and pitch_of(k) % 64 == 0 and k <= pitch_of(k) <= k + 64
    assert [pitch_of(k) for k in (5120, 27648, 192, 448, 704)] == [5184, 27712, 192, 448, 704]


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 64, 64), (5, 256, 100), (33, 320, 192)])
def test_the_twin_multiplies(rows: int, k: int, n: int) -> None:
    a, w = data(rows, k, n)
    sums = sums_of(a, w)
    assert np.all(np.abs(sums[:-1, :n] - exact(a, w)) <= error_bound(a, w) + 1e-6)
    assert not sums[:-1, n:].any() and np.all(sums[-1] == 1)


def test_rows_are_rounded_up_and_end_where_buffers_do() -> None:
    assert [rows_of(n, 1000) for n in (256, 257, 384, 385, 900, 1000)] == [
        256, 384, 384, 512, 1000, 1000,
    ]  # fmt: skip


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("rows", "n", "block"), [(1, 64, 64), (9, 192, 32), (6, 128, 16)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_residual_epilogue(rows: int, n: int, block: int, has_bias: bool) -> None:
    a, w = data(rows, 128, n)
    rng = np.random.default_rng(1)
    bias, norm, old = (rng.normal(size=s).astype("f4") for s in (n, n, (rows, n)))
    x = np.concatenate([old, np.full((1, n), 7, np.float32)])
    xw, ssq = nan16(rows + 1, n), nan32(rows + 1, n // 16)
    run_kernel(
        "residual_epilogue", (-(-rows // 4) * (n // block),),
        {"sums": sums_of(a, w), "bias": bias if has_bias else nan32(n), "norm": norm, "x": x,
         "xw": xw, "ssq": ssq, "num_tokens": rows},
        {"N": n, "HAS_BIAS": has_bias, "BM": 4, "BN": block},
    )  # fmt: skip
    truth = old + exact(a, w) + (bias if has_bias else 0)
    assert np.all(np.abs(x[:-1] - truth) <= error_bound(a, w) + 4e-7 * (np.abs(truth) + 1))
    assert np.array_equal(from_bf16(xw[:-1]), round_bf16(x[:-1] * norm))
    want = (x[:-1].astype("f8") ** 2).reshape(rows, -1, 16).sum(-1)
    assert np.allclose(ssq[:-1], want, rtol=1e-6)
    assert np.all(x[-1] == 7) and np.isnan(ssq[-1]).all() and (xw[-1] == oplib.NAN16).all()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("rows", "hidden", "ffn", "block"), [(1, 64, 64, 64), (9, 192, 200, 128)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gate_up_epilogue(rows: int, hidden: int, ffn: int, block: int, has_bias: bool) -> None:
    xw, gate = data(rows, hidden, ffn)
    up = data(rows, hidden, ffn, seed=2)[1]
    rng = np.random.default_rng(3)
    biases = rng.normal(size=(2, ffn)).astype("f4")
    ssq = rng.uniform(1, 20, size=(rows, hidden // 16)).astype("f4")
    padded = -(-ffn // 64) * 64
    h = nan16(rows + 1, padded)
    run_kernel(
        "gate_up_epilogue", (-(-rows // 4) * (padded // block),),
        {"sums": sums_of(xw, oplib.interleave(gate, up)), "ssq": ssq, "h": h,
         "bias": oplib.interleave(*biases) if has_bias else nan32(2 * padded), "num_tokens": rows},
        {"F": padded, "H": hidden, "EPS": EPS, "HAS_BIAS": has_bias, "BM": 4, "BN": block},
    )  # fmt: skip
    g, u = (exact(xw, w) * scales(ssq, hidden) for w in (gate, up))
    if has_bias:
        g, u = g + biases[0], u + biases[1]
    truth, found = silu(g) * u, from_bf16(h[:-1, :ffn])
    assert np.all(np.abs(found - truth) <= 2.0**-8 * np.abs(truth) + 1e-5)
    assert (h[-1] == oplib.NAN16).all() and not h[:-1, ffn:].any()


def heads_of(
    step: Paged, sums: np.ndarray, ssq: np.ndarray, bias: np.ndarray,
    norms: tuple[np.ndarray, np.ndarray] | None, tables: tuple[np.ndarray, np.ndarray], group: int,
) -> np.ndarray:  # fmt: skip
    """sums [T, N] -> q [T, Hq · D]; k, v go to the step's pages."""
    rows, heads, dim = len(step.slots), step.heads, step.dim
    q = nan16(rows + 1, heads * group * dim)
    q_norm, k_norm = norms or (nan32(dim), nan32(dim))
    run_kernel(
        "qkv_epilogue", (-(-rows // 16) * heads * (group + 2),),
        {"sums": sums, "ssq": ssq, "bias": bias, "q_norm": q_norm, "k_norm": k_norm,
         "cos": tables[0], "sin": tables[1], "positions": step.positions, "kv_slots": step.slots,
         "q": q, "k_base": step.k, "v_base": step.v, "k_inverse": 1 / step.scales[0],
         "v_inverse": 1 / step.scales[1], "num_tokens": rows, **step.strides()},
        {"N": sums.shape[1], "H": 16 * ssq.shape[1], "HKV": heads, "GROUP": group, "D": dim,
         "EPS": EPS, "QK_EPS": QK_EPS, "HAS_BIAS": True, "QK_NORM": norms is not None,
         "KV_FP8": step.fp8 or "", "KV_ROUNDING": oplib.ROUNDING, "BM": 16, "BN": dim // 2},
    )  # fmt: skip
    assert (q[-1] == oplib.NAN16).all()
    return from_bf16(q[:-1])


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "has_norm"),
    [(1, 3, 32, False), (5, 2, 32, True), (7, 1, 64, False), (4, 1, 128, True)],
)
def test_qkv_epilogue(group: int, kv_heads: int, dim: int, has_norm: bool) -> None:
    """As our own GEMM's, against float64; a row of padding (kv_slots -1) stores nothing."""
    rng = np.random.default_rng(0)
    rows, hidden, total = 26, 256, kv_heads * (group + 2)
    step = Paged([5, 1, 20], [5, 33, 40], kv_heads, dim, 16)
    xw, w = data(rows, hidden, total * dim)
    ssq = rng.uniform(5, 20, size=(rows, hidden // 16)).astype("f4")
    bias = rng.normal(size=total * dim).astype("f4")
    norms = tuple(rng.normal(size=(2, dim)).astype("f4")) if has_norm else None
    angle = np.outer(np.arange(64), 1e4 ** (-np.arange(0, dim, 2) / dim))
    tables = np.cos(angle).astype("f4"), np.sin(angle).astype("f4")
    sums, every_slot = sums_of(xw, w), step.slots

    def run(slots: np.ndarray) -> np.ndarray:
        step.slots = slots
        return heads_of(step, sums, ssq, bias, norms, tables, group)

    def stored() -> int:
        return int(sum((pages != oplib.NAN16).sum() for pages in (step.k, step.v)))

    run(np.where(np.arange(rows) == 7, -1, every_slot).astype(np.int32))
    assert stored() == 2 * (rows - 1) * kv_heads * dim
    every = (exact(xw, w) * scales(ssq, hidden) + bias).reshape(rows, kv_heads, group + 2, dim)
    kernels.check_heads(step, run(every_slot), every, norms, tables)
    assert stored() == 2 * rows * kv_heads * dim, "stray stores"


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
def test_qkv_epilogue_into_fp8_pages(fp8: Fp8Name) -> None:
    """What our own GEMM stores, or its neighbour where sums fall on two sides of a middle."""
    rng = np.random.default_rng(0)
    group, kv_heads, dim, hidden = 4, 2, 64, 256
    step, own = (
        Paged([5, 1, 20], [5, 33, 40], kv_heads, dim, 16, fp8=fp8, scales=(0.03, 0.011))
        for _ in range(2)
    )
    xw, w = data(26, hidden, kv_heads * (group + 2) * dim)
    ssq = rng.uniform(5, 20, size=(26, hidden // 16)).astype("f4")
    bias = rng.normal(size=len(w)).astype("f4")
    angle = np.outer(np.arange(64), 1e4 ** (-np.arange(0, dim, 2) / dim))
    tables = np.cos(angle).astype("f4"), np.sin(angle).astype("f4")
    heads_of(step, sums_of(xw, w), ssq, bias, None, tables, group)
    oplib.qkv(own, xw, ssq, w, bias, None, tables, group, oplib.Tile(BN=32))
    for pages, wanted, scale in ((step.k, own.k, 0.03), (step.v, own.v, 0.011)):
        assert (pages == wanted).mean() > 0.99
        got, want = step.load(pages), own.load(wanted)
        assert np.all(np.abs(got - want) <= 2.0**-3 * np.abs(want) + 2.0**-9 * scale)
        assert np.array_equal(pages == FP8_NAN[fp8], wanted == FP8_NAN[fp8]), "stray stores"


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_many_rows_take_two_launches_for_each_gemm(name: str, device: str) -> None:
    table = tiny(name, device, order="pitched").table
    layers = CONFIGS[name].num_layers
    assert Table.from_text(table.to_text()) == table
    assert table.per_step == 5 * layers + 3
    for rows, launches in ((1, 5), (LEAST_ROWS - 1, 5), (LEAST_ROWS, 9), (4096, 9)):
        found = table.launches_of({**ROWS, "T": rows}, False)
        assert len(found) == launches * layers + 3
        products = [kernel.is_vendor for _, kernel in found]
        assert sum(products) == (4 * layers if launches == 9 else 0)
    spans = {b.name: (b.offset, b.offset + b.nbytes) for b in table.buffers if b.unit == "T"}
    first, last = spans.pop("sums")
    assert last - first == 4 * max(k.constants["N"] for k in table.kernels if k.is_vendor)
    assert all(end <= first or last <= begin for begin, end in spans.values())
    workspace = next(b for b in table.buffers if b.name == "vendor_workspace")
    assert (workspace.unit, workspace.nbytes, workspace.offset % 256) == ("1", WORKSPACE_BYTES, 0)


def test_matrices_in_codes_and_the_head_keep_our_kernels() -> None:
    stored = {"1.down.weight": GemmFormat(4, 128, False, "graph", 64)}
    made = plan(plain_graph(CONFIGS["qwen3"], "bf16"), stored=stored, order="pitched")
    kinds = {t.name: t.kind for t in made.layout.tensors if t.kind not in ("vector", "rows")}
    assert kinds.pop("lm_head") == kinds.pop("layers.1.down") == "tiles"
    assert set(kinds.values()) == {"pitched"}
    table = launch_table(made, DEVICES["gfx942"])
    products = [i.slot for i, k in table.launches_of(ROWS, False) if k.is_vendor]
    assert len(products) == 7 and products.count("down_residual.product") == 1
    assert table.kernel_of("down_residual.w4g128z", ROWS, False) is not None


def test_rows_unpack_to_what_was_packed() -> None:
    model = tiny("qwen3", "gfx942", order="pitched")
    down = next(t for t in model.plan.layout.tensors if t.name == "layers.0.down")
    packed = pack(down, lambda name, dtype: to_bf16(model.weights[name]))
    assert packed.nbytes == down.nbytes == 2 * 64 * pitch_of(192)
    columns = unpack(down, packed)
    matrix = model.weights[down.segments[0].weight]
    assert np.array_equal(columns[:, :129], to_bf16(matrix)) and not columns[:, 129:].any()
    assert not packed.reshape(64, -1)[:, 129:].any()


def test_rows_of_512_bytes_lie_apart() -> None:
    """What every part is told of a matrix whose rows need zeros between them, and of one that does
    not."""
    shape = config(vocab=64, hidden=256, heads=8, kv_heads=2, head_dim=32, ffn=192)
    made = plan(plain_graph(shape, "bf16"), order="pitched")
    tensors = {t.name: t for t in made.layout.tensors}
    weights = random_weights(made.graph, seed=1)
    for name, k, pitch in (("layers.0.o", 256, 320), ("layers.0.down", 192, 192)):
        tensor = tensors[name]
        packed = pack(tensor, lambda weight, dtype: to_bf16(weights[weight]))
        assert tensor.k == k and packed.nbytes == tensor.nbytes == 2 * tensor.n * pitch
        rows = packed.reshape(tensor.n, pitch).view(np.uint16)
        wanted = to_bf16(weights[tensor.segments[0].weight])
        assert np.array_equal(rows[:, :k], wanted) and not rows[:, k:].any()
        assert np.array_equal(unpack(tensor, packed)[:, :k], wanted)
    table = launch_table(made, DEVICES["gfx942"])
    of_vendor = {(k.constants["K"], k.constants["W_PITCH"]) for k in table.kernels if k.is_vendor}
    ours = {(k.constants.get("K", 256), k.constants["W_PITCH"]) for k in table.kernels
            if k.constants.get("W_PITCH")}  # fmt: skip
    assert of_vendor == {(256, 320), (192, 192)} <= ours


def test_tuning_takes_our_kernels_and_leaves_the_vendors() -> None:
    """The last entry of a GEMM is for any number of rows, though it is used below 256 alone."""
    model, device, tiles = tiny("qwen3", "gfx942", order="pitched"), "gfx942", read_tiles("gfx942")
    tasks = tasks_of(model.plan, DEVICES[device], tiles, (), Sizes((1, 200, 512)))
    named = {task.name: task for task in tasks if isinstance(task, GemmTask)}
    assert named["o_residual any"].rows == (200,) and named["o_residual <= 16"].rows == (1,)
    assert not any(task.start.is_vendor or "epilogue" in task.start.name for task in tasks)
    task = named["down_residual any"]
    trial = task.trial(task.start)
    assert not trial.table.uses_vendor and len(trial.table.launches) == 1
    found = replace(tiles, entries=(task.entry(task.start, "measured"), *tiles.entries))
    table = launch_table(model.plan, DEVICES[device], found)
    used = table.kernel_of("down_residual", {**ROWS, "T": LEAST_ROWS - 1}, False)
    assert used is not None and used.source == "measured"


# -- whole models ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("qwen3", "gfx942"),
        pytest.param("llama-tied", "sm_90", marks=pytest.mark.slow),
        pytest.param("qwen2-window", "gfx942", marks=pytest.mark.slow),
    ],
)
def test_a_model_runs_from_its_table(name: str, device: str) -> None:
    """A prompt of 270 tokens beside another, then decode: logits within bf16 error of the oracle in
    bf16, whose CPU libraries are held against it likewise."""
    model = tiny(name, device, order="pitched")
    simulator = model.simulator(max_tokens=300, max_len=320, num_pages=24)
    references = [Reference(model.plan.graph, model.weights, dtype) for dtype in ("bf16", "fp32")]
    caches = RefCache(), RefCache()
    rng = np.random.default_rng(0)
    pages = {0: list(rng.permutation(20)), 1: [21, 20]}
    texts = {0: rng.integers(0, 130, 270).tolist(), 1: [7, 3]}
    firsts = {0: 0, 1: 0}
    for step in range(3):
        runs = [(seq, firsts[seq], texts[seq][firsts[seq] :]) for seq in texts]
        batch = RefBatch.of(*runs)
        want, wide = (r.step(batch, c)["logits"]
                      for r, c in zip(references, caches, strict=True))  # fmt: skip
        drawn = simulator.step(*(Part(pages[s], first, ids, slot=s) for s, first, ids in runs))
        bound = 4 * np.abs(want - wide).max() + 1e-3
        assert np.abs(drawn.logits - want).max() <= bound, f"step {step}"
        firsts = {seq: len(text) for seq, text in texts.items()}
        for row, seq in enumerate(texts):
            texts[seq].append(int(drawn.ids[row]))
    assert simulator.launches == (9 + 5 + 5) * CONFIGS[name].num_layers + 9
