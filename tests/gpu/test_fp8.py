"""fp8 activations beside fp8 weights, against their twin in NumPy; and a checkpoint in fp8 from its
files to tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import read_archive
from sinterlm.compile import compile_model
from sinterlm.errors import UnsupportedModelError
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.frontend.numeric import bf16_to_fp32
from sinterlm.ir.bf16 import error_bound, round_bf16
from sinterlm.ir.fp8 import from_fp8
from sinterlm.ir.quant import GemmFormat
from sinterlm.ir.reference_codes import fp8_rows
from sinterlm.ir.reference_ops import silu
from sinterlm.options import CompileOptions
from sinterlm.passes.pipeline import plan
from tests.frontend.builders import write_directory
from tests.gpu import oplib
from tests.gpu.host import build_driver
from tests.gpu.models import fp8, tiny
from tests.gpu.oplib import EPS, QK_EPS, Paged, Tile, coded
from tests.gpu.recording import RecordingDriver
from tests.gpu.test_host import TRAINED
from tests.gpu.test_kernels import data, exact, scales
from tests.ir.graphs import config, plain_graph

pytestmark = pytest.mark.usefixtures("triton")

#: Weights and activations in fp8: a scale per channel and per block, both ways to write numbers.
FORMS = {
    form.name: form
    for form in (
        GemmFormat(8, 0, True, "fp8", 64, "e4m3fn"),
        GemmFormat(8, 0, True, "fp8", 128, "e4m3fnuz"),
        GemmFormat(8, 128, True, "fp8", 64, "e4m3fnuz"),
        GemmFormat(8, 128, True, "fp8", 128, "e4m3fn", 128),
    )
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("rows", "k", "n", "tile"),
    [
        (3, 384, 64, Tile(BN=16, SPLIT=3)),
        (37, 256, 128, Tile(BM=32, BN=64, NUM_XCD=3)),
        (70, 128, 192, Tile(BM=64, BN=64, GROUP_M=2)),
    ],
)
def test_residual(form: GemmFormat, rows: int, k: int, n: int, tile: Tile) -> None:
    """Once rounded, operands are multiplied exactly: no error but that of sums and scales."""
    a, w = data(rows, k, n)
    a *= np.exp2(np.random.default_rng(2).integers(-9, 9, (rows, 1))).astype("f4")
    norm, x = np.ones(n, "f4"), np.random.default_rng(1).normal(size=(rows, n)).astype("f4")
    tile = Tile(**{**vars(tile), "BK": form.act_group})
    out = oplib.residual(a, w, None, norm, x, tile, form=form)[0]
    value, size = oplib.meaning(w, form)
    rounded = fp8_rows(a, form)
    truth = x + exact(rounded, value)
    bound = 2 * error_bound(rounded, size) + 4e-7 * (np.abs(truth) + np.abs(x))
    assert np.all(np.abs(out - truth) <= bound)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_of_any_size(form: GemmFormat) -> None:
    """Zeros, next to nothing, the largest numbers, and one large number among small ones; NaN and
    infinity stay in their row."""
    a, w = data(7, 256, 64)
    a[0] = 0
    a[1] *= 2.0**-120
    a[2] *= 2.0**60
    a[3, 5] = 3e4
    a[4, 130], a[5, 7] = np.nan, np.inf
    a = round_bf16(a)
    norm, x, tile = np.ones(64, "f4"), np.zeros((7, 64), "f4"), Tile(BK=form.act_group)
    with np.errstate(invalid="ignore"):
        out = oplib.residual(a, w, None, norm, x, tile, form=form)[0]
    value, size = oplib.meaning(w, form)
    good = [0, 1, 2, 3, 6]
    rounded = fp8_rows(a, form)
    assert np.isnan(rounded[4]).any() and np.isnan(rounded[5]).any()
    rounded = rounded[good]
    assert not out[:2].any() and np.isnan(out[[4, 5]]).all()
    bound = 2 * error_bound(rounded, size) + 4e-7 * np.abs(exact(rounded, value))
    assert np.all(np.abs(out[good] - exact(rounded, value)) <= bound)


def test_a_row_does_not_see_its_neighbours() -> None:
    """A scale is of one row: a large neighbour changes no bit."""
    form = FORMS["e4m3fn-b128-a8g128"]
    a, w = data(5, 256, 64)
    norm, x, tile = np.ones(64, "f4"), np.zeros((5, 64), "f4"), Tile(BK=128)
    alone = oplib.residual(a[2:3], w, None, norm, x[2:3], tile, form=form)[0]
    a[[1, 3]] *= 1000
    assert np.array_equal(oplib.residual(a, w, None, norm, x, tile, form=form)[0][2:3], alone)


def test_rounding_by_whole_numbers_is_that_of_the_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every fp8 number, the middles between them and their neighbours; zeros and NaN."""
    table = from_fp8(np.arange(127, dtype=np.uint8), "e4m3fn")
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2])
    points = np.concatenate([points, points * (1 + 2.0**-7), -points, [448, np.nan]])
    a = np.zeros((8, 128), "f4")
    a.reshape(-1)[: len(points)] = round_bf16(np.minimum(points, 448))
    a[:, -1] = 448  # every row's scale is 1
    assert len(points) < a.size and (a[:, :-1] == 0).any()
    form = FORMS["e4m3fn-b128-a8g128"]
    w, norm, x = np.eye(64, 128, dtype="f4"), np.ones(64, "f4"), np.zeros((8, 64), "f4")
    found = []
    for first in (0, 64):
        for by in ("cvt", "bits"):
            monkeypatch.setattr(oplib, "ROUNDING", by)
            shifted = np.roll(w, first, axis=1)
            found.append(oplib.residual(a, shifted, None, norm, x, Tile(BK=128), form=form)[0])
    assert np.array_equal(found[0], found[1], equal_nan=True)
    assert np.array_equal(found[2], found[3], equal_nan=True)
    assert np.isfinite(found[0]).any() and np.isnan(np.concatenate(found)).any()


def test_gate_up() -> None:
    form = FORMS["e4m3fnuzg128-a8g64"]
    xw, gate = data(17, 192, 70)
    up = data(17, 192, 70, seed=2)[1]
    rng = np.random.default_rng(3)
    biases = tuple(rng.normal(size=70).astype("f4") for _ in range(2))
    ssq = rng.uniform(1, 20, size=(17, 12)).astype("f4")
    h = oplib.gate_up(xw, ssq, gate, up, biases, Tile(BN=32, SPLIT=3), form=form)
    rounded = fp8_rows(xw, form)
    g, u = (exact(rounded, oplib.meaning(w, form)[0]) * scales(ssq, 192) for w in (gate, up))
    truth = silu(g + biases[0]) * (u + biases[1])
    assert np.all(np.abs(h - truth) <= 2.0**-8 * np.abs(truth) + 1e-5)


@pytest.mark.parametrize(
    ("group", "form"), [(1, FORMS["e4m3fn-a8g64"]), (5, FORMS["e4m3fnuz-a8g128"])]
)
def test_qkv(group: int, form: GemmFormat) -> None:
    """q and k without rope (position 0 turns nothing), and v."""
    rng, dim = np.random.default_rng(0), 32
    step = Paged([3, 1], [3, 18], 2, dim, 16)
    xw, w = data(4, 256, 2 * (group + 2) * dim)
    ssq = rng.uniform(5, 20, size=(4, 16)).astype("f4")
    norms = tuple(rng.normal(size=(2, dim)).astype("f4"))
    tables = np.ones((64, dim // 2), "f4"), np.zeros((64, dim // 2), "f4")
    tile = Tile(BN=16, BK=form.act_group, SPLIT=2)
    q = oplib.qkv(step, xw, ssq, w, None, norms, tables, group, tile, form=form)
    every = exact(fp8_rows(xw, form), oplib.meaning(w, form)[0]) * scales(ssq, 256)
    every = every.reshape(4, 2, group + 2, dim)
    for got, x, weight in (
        (q.reshape(4, 2, group, dim), every[:, :, :-2], norms[0]),
        (step.load(step.k)[:, :, None], every[:, :, -2:-1], norms[1]),
    ):
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + QK_EPS) * weight
        assert np.all(np.abs(got - want) <= 2.0**-8 * (np.abs(want) + 0.05))
    assert np.allclose(step.load(step.v), every[:, :, -1], rtol=2**-8, atol=1e-3)
    assert EPS > 0


def test_one_scale_of_activations_is_one_step_of_every_kernel() -> None:
    """Whatever the number of rows, rounding is the same: a depth that is no multiple of 128 takes
    steps of 64."""
    for name, device in (("qwen3", "gfx942"), ("qwen2-window", "sm_90")):
        table = tiny(name, device, fp8(device, act="fp8")).table
        found = {
            (k.name, k.constants.get("K", k.constants.get("H")), k.constants["BK"])
            for k in table.kernels
            if k.constants.get("A_FP8")
        }
        assert len(found) >= 3
        assert all(step == (64 if depth % 128 else 128) for _, depth, step in found)


# -- from files to tokens --------------------------------------------------------------------------


def write_fp8(folder: Path, form: GemmFormat) -> None:
    """The trained model of tests/assets with its projections in fp8."""
    with SafetensorsCheckpoint(TRAINED) as source:
        arrays = {}
        for name in source.tensors:
            floats = bf16_to_fp32(source.read(name, "bf16"))
            if not name.endswith("_proj.weight"):
                arrays[name] = source.read(name, "bf16")
                continue
            stored = coded(floats, form)
            arrays[name] = stored.codes
            last = "weight_scale_inv" if form.rows > 1 else "weight_scale"
            arrays[name.removesuffix("weight") + last] = np.ascontiguousarray(
                stored.scales[:: form.rows]
            )
    quantization = (
        {"quant_method": "fp8", "weight_block_size": [128, 128]}
        if form.rows > 1
        else {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    )
    data = json.loads((TRAINED / "config.json").read_text())
    write_directory(folder, data | {"quantization_config": quantization}, arrays)
    (folder / "tokenizer.json").write_bytes((TRAINED / "tokenizer.json").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "form", "act"),
    [
        ("gfx942", GemmFormat(8, 128, True, "graph", 64, "e4m3fn", 128), None),
        ("sm_90", GemmFormat(8, 0, True, "graph", 64, "e4m3fn"), None),
        ("gfx942", GemmFormat(8, 0, True, "graph", 64, "e4m3fn"), "fp8"),
    ],
)
def test_a_trained_model_answers_as_in_fp32(
    target: str, form: GemmFormat, act: str | None, tmp_path: Path, test_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The CPU computes with the floats that the checkpoint stands for; the GPU, on the driver of no
    device, with its numbers."""
    model = tmp_path / "model"
    write_fp8(model, form)
    prompts = ["The old man looked at", "In the"]
    options = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16,
               "kv_cache_memory_bytes": 4 << 20, "cache_dir": test_environment}  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(str(model), num_threads=1, dtype="fp32", **options) as llm:
        want = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy)]
    bundle = compile_model(CompileOptions(str(model), target=target, max_model_len=64,
                                          act_dtype=act, cache_dir=test_environment))  # fmt: skip
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.startswith(f"fp8 {DEVICES[target].fp8}")
    assert bundle.manifest.quantization.endswith("as stored (fp8)")
    table, objects = read_archive(archive_of(bundle.library_path.read_bytes()))
    driver = RecordingDriver(DEVICES[target], table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, DEVICES[target].vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    with LLM(str(model), target=target, num_threads=1, act_dtype=act, **options) as llm:
        found = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy)]
    assert found == want
    assert driver.faults == []


def test_kernels_of_a_head_of_32_have_a_scale_for_every_column() -> None:
    """Two heads in a panel come from two blocks."""
    graph = plain_graph(config(hidden=256, heads=8, head_dim=32, ffn=256), "bf16")
    form = GemmFormat(8, 128, True, "graph", 64, "e4m3fn", 128)
    stored = {n: form for n, w in graph.weights.items() if n[0].isdigit() and len(w.shape) == 2}
    table = launch_table(plan(graph, None, fp8("sm_90", False), stored, order="tiles"),
                         DEVICES["sm_90"])  # fmt: skip
    shared = {k.name: k.constants["W_SHARED"] for k in table.kernels if k.constants.get("FP8")}
    assert shared == {
        "norm_qkv_rope_kv": False, "residual_matmul": True, "norm_gate_up_act": True,
    }  # fmt: skip


def test_a_cpu_refuses_by_name() -> None:
    graph = plain_graph(config(), "bf16")
    stored = {"0.down.weight": GemmFormat(8, 0, True, "graph", 64, "e4m3fn")}
    with pytest.raises(UnsupportedModelError, match=r"0\.down.*fp8.*--quantization int8.*fp32"):
        plan(graph, stored=stored)
