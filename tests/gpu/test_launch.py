"""Launch tables: their counts, their text, and whole tiny models run from them in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.simulator import Part
from sinterlm.backends.gpu.table import Axis, Table
from sinterlm.backends.gpu.tuning import read_tiles
from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.ir.bf16 import from_bf16, to_bf16
from sinterlm.ir.plan import PackedTensor, Segment
from sinterlm.ir.quant import GemmFormat, PanelShape
from sinterlm.ir.reference import RefBatch, RefCache, Reference
from sinterlm.passes.formats import Scheme
from sinterlm.passes.packing import coded_chunks, pack, unpack
from sinterlm.passes.packing_codes import unpack_codes
from sinterlm.passes.pipeline import plan
from sinterlm.passes.quantise import quantise
from tests.gpu.models import CONFIGS, fp8, tiny
from tests.gpu.oplib import coded
from tests.ir.graphs import config, plain_graph

INT4 = Scheme(4, act="graph")
#: As DeepSeek and Qwen publish fp8.
BLOCKS = GemmFormat(8, 128, True, "graph", 64, "e4m3fn", 128)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", [None, INT4], ids=["bf16", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_five_launches_per_layer_and_three(name: str, scheme: Scheme, device: str) -> None:
    """And one more that gives hidden states out."""
    table = tiny(name, device, scheme).table
    assert table.per_step == 5 * CONFIGS[name].num_layers + 3
    assert len(table.launches) == table.per_step + 1
    assert Table.from_text(table.to_text()) == table


@pytest.mark.parametrize("device", DEVICES)
def test_tile_tables_say_that_nothing_was_measured(device: str) -> None:
    tiles = read_tiles(device)
    assert (tiles.target, tiles.status) == (device, "untuned: no device")
    assert all(entry.source for entry in tiles.entries)
    for kernel in {entry.kernel for entry in tiles.entries}:
        assert tiles.of(kernel)[-1].max_rows == 0, f"{kernel} has no entry for any number of rows"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"head_dim": 80}, "head_dim 80"),
        ({"hidden": 72}, "hidden_size 72"),
        ({"heads": 3, "kv_heads": 3, "head_dim": 32}, "3 heads of 32"),
        ({"heads": 130, "kv_heads": 2, "head_dim": 32}, "65 query heads per KV head"),
    ],
)
def test_shapes_without_kernels_are_refused_by_name(wrong: dict, named: str) -> None:
    sizes = {"hidden": 64, "head_dim": 32, **wrong}
    made = plan(plain_graph(config(**sizes), "bf16"), order="tiles")
    with pytest.raises(UnsupportedModelError, match=named):
        launch_table(made, DEVICES["gfx942"])


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (GemmFormat(4, 32, True, "int8", 64), "0.down.weight has int8 activations"),
        (GemmFormat(4, 16, True, "graph", 64), "0.down.weight has weights in groups of 16"),
        (GemmFormat(8, 64, True, "graph", 64, "e4m3fn"), "fp8 weights in groups of 64"),
    ],
)
def test_formats_without_kernels_are_refused_by_name(form: GemmFormat, named: str) -> None:
    stored = {"0.down.weight": form}
    scheme = Scheme(fp8="e4m3fn")
    made = plan(plain_graph(CONFIGS["qwen3"], "bf16"), None, scheme, stored, order="tiles")
    with pytest.raises(UnsupportedModelError, match=named):
        launch_table(made, DEVICES["gfx942"])


def test_layers_may_be_stored_in_different_ways() -> None:
    """One layer in codes that the checkpoint brought, the other wide: a slot for each."""
    stored = {"1.down.weight": GemmFormat(4, 128, False, "graph", 64)}
    made = plan(plain_graph(CONFIGS["qwen3"], "bf16"), stored=stored, order="tiles")
    table = launch_table(made, DEVICES["gfx942"])
    slots = [launch.slot for launch in table.launches if launch.slot.startswith("down")]
    assert slots == ["down_residual", "down_residual.w4g128z"]
    sizes = {"T": 1, "R": 1, "S": 1}
    bits = [table.kernel_of(slot, sizes, True).constants["BITS"] for slot in slots]
    assert bits == [16, 4]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_is_where_the_layout_says(bits: int, group: int, symmetric: bool) -> None:
    """By plain arithmetic: a code's byte and nibble, and the place of a group's scale."""
    form, n, k = GemmFormat(bits, group, symmetric, "graph", 0), 128, 192
    shape = PanelShape(form, k)
    tensor = PackedTensor(
        "t", "tiles", "int4", n, k, 150, (Segment("w", 0, 100, 0),), 0, 2 * shape.nbytes, form
    )
    w = np.random.default_rng(0).normal(size=(100, 150)).astype("f4")
    packed = pack(tensor, lambda name, dtype: w)
    want = quantise(w, bits, group, symmetric)
    assert packed.nbytes == tensor.nbytes
    for column, at in [(0, 0), (99, 149), (64, 31), (65, 32), (33, 100)]:
        tile = packed.reshape(2, -1)[column // 64][at // 64 * 512 * bits :]
        row = tile[column % 64 * 8 * bits :]
        code = row[at % 64] if bits == 8 else row[at % 32] >> (at % 64 // 32 * 4) & 15
        assert code == want.codes[column, at]
        tail = packed.reshape(2, -1)[column // 64][64 * k * bits // 8 :]
        scales = tail.view("f2" if group else "f4")
        of_k = at // group if group else 0
        assert scales[of_k * 64 + column % 64] == want.scales[column, of_k]
    back = unpack_codes(tensor, packed)
    assert np.array_equal(back.codes[:100, :150], want.codes)
    assert np.array_equal(back.dequantise()[:100, :150], want.dequantise())
    assert not back.dequantise()[100:].any()


@pytest.mark.parametrize("code", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize(("group", "rows"), [(0, 1), (128, 1), (128, 128)])
def test_every_fp8_number_is_where_the_layout_says(code: str, group: int, rows: int) -> None:
    """By plain arithmetic: a number's byte, and the place of its scale; padding means zero."""
    form, n, k = GemmFormat(8, group, True, "graph", 0, code, rows), 192, 192
    nbytes = PanelShape(form, k).nbytes
    assert nbytes % 64 == 0
    tensor = PackedTensor(
        "t", "tiles", "fp8", n, k, 150, (Segment("w", 0, 140, 0),), 0, 3 * nbytes, form
    )
    w = np.random.default_rng(0).normal(size=(140, 150)).astype("f4")
    want = coded(w, form)
    (chunk,) = coded_chunks(tensor, lambda name: w, lambda name, form: want)
    packed = chunk.reshape(-1)
    assert packed.nbytes == tensor.nbytes
    for column, at in [(0, 0), (139, 149), (64, 63), (65, 64), (33, 128)]:
        panel = packed.reshape(3, -1)[column // 64]
        assert panel[at // 64 * 4096 + column % 64 * 64 + at % 64] == want.codes[column, at]
        scales, g = panel[64 * k :].view("f4"), at // group if group else 0
        found = scales[g] if rows > 1 else scales[g * 64 + column % 64]
        assert found == want.scales[column, g]
    back = unpack_codes(tensor, packed).dequantise()
    assert np.array_equal(back[:140, :150], want.dequantise())
    assert not back[140:].any() and not back[:, 150:].any()


def test_columns_of_several_blocks_in_a_panel_are_a_fault() -> None:
    form = GemmFormat(8, 128, True, "graph", 0, "e4m3fn", 128)
    tensor = PackedTensor("t", "tiles", "fp8", 64, 128, 128, (Segment("w", 96, 160, 0),), 0,
                          PanelShape(form, 128).nbytes, form)  # fmt: skip
    w = np.random.default_rng(0).normal(size=(160, 128)).astype("f4")
    with pytest.raises(CheckpointError, match="scales of different blocks"):
        list(coded_chunks(tensor, lambda name: w, lambda name, form: coded(w, form)))


def test_tiles_unpack_to_what_was_packed() -> None:
    model = tiny("qwen3", "gfx942")

    def read(name: str, dtype: str) -> np.ndarray:
        return to_bf16(model.weights[name]) if dtype == "bf16" else model.weights[name]

    down = next(t for t in model.plan.layout.tensors if t.name == "layers.0.down")
    matrix = model.weights[down.segments[0].weight]
    columns = unpack(down, pack(down, read))
    assert columns.shape == (64, 192)
    assert np.array_equal(columns[:, :129], to_bf16(matrix)) and not columns[:, 129:].any()


def test_an_axis_counts_units_begun() -> None:
    axis = Axis("T", 16, 3, True)
    assert [axis.count({"T": t, "S": 2}) for t in (1, 16, 17)] == [5, 5, 8]
    assert Axis.parse(str(axis)) == axis
    with pytest.raises(ValueError, match="no axis"):
        Axis.parse("T/0*3")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("name", "device", "scheme", "steps"),
    [
        ("qwen3", "gfx942", INT4, 1),
        pytest.param("llama-tied", "gfx942", None, 1, marks=pytest.mark.slow),
        pytest.param("llama-tied", "sm_90", None, 32, marks=pytest.mark.slow),
        pytest.param("llama-tied", "sm_90", INT4, 32, marks=pytest.mark.slow),
        ("qwen3", "gfx942", "blocks", 1),
        pytest.param("llama-tied", "sm_90", "fp8", 32, marks=pytest.mark.slow),
        pytest.param("qwen2-window", "gfx942", "fp8", 4, marks=pytest.mark.slow),
        ("qwen3", "gfx942", "fp8-a8", 1),
        pytest.param("qwen2-window", "sm_90", "fp8-a8", 4, marks=pytest.mark.slow),
        pytest.param("qwen2-window", "sm_90", "blocks", 4, marks=pytest.mark.slow),
        pytest.param("qwen3", "sm_90", None, 4, marks=pytest.mark.slow),
        pytest.param("qwen3", "sm_90", Scheme(8, act="graph"), 4, marks=pytest.mark.slow),
        pytest.param("qwen2-window", "gfx942", None, 12, marks=pytest.mark.slow),
        pytest.param("qwen2-window", "gfx942", Scheme(4, 128, "graph"), 4, marks=pytest.mark.slow),
    ],
)
def test_a_model_runs_from_its_table(
    name: str, device: str, scheme: Scheme | str | None, steps: int
) -> None:
    """Prefill of three sequences, mixed steps, decode: logits within bf16 error of the oracle in
    bf16, and the same greedy tokens wherever the margin exceeds it."""
    stored = BLOCKS if scheme == "blocks" else None
    if isinstance(scheme, str):
        scheme = fp8(device, scheme != "blocks", "fp8" if scheme == "fp8-a8" else "graph")
    model = tiny(name, device, scheme, stored)
    simulator = model.simulator()
    reference = Reference(model.plan.graph, model.weights, "bf16")
    exact = Reference(model.plan.graph, model.weights, "fp32")
    caches = RefCache(), RefCache()
    pages = {0: [3, 9, 5], 1: [0, 7, 2], 2: [12, 1, 14]}
    prompts = {0: [5, 17, 99, 3, 120, 8, 64, 2, 11, 40, 7], 1: [1], 2: [130, 22, 22]}
    texts: dict[int, list[int]] = {}

    def advance(runs: list[tuple[int, int, list[int]]], feed: bool) -> None:
        batch = RefBatch.of(*runs)
        want, wide = (r.step(batch, c)["logits"] for r, c in zip((reference, exact), caches,
                                                                  strict=True))  # fmt: skip
        drawn = simulator.step(
            *(Part(pages[s], first, [-1] if feed else ids, slot=s) for s, first, ids in runs)
        )
        # As far from float32 as the oracle in bf16 may be itself: both round where kernels do.
        bound = 4 * np.abs(want - wide).max() + 1e-3
        assert np.abs(drawn.logits - want).max() <= bound
        for row, (seq, _, ids) in enumerate(runs):
            best = np.sort(want[row])[-2:]
            assert drawn.ids[row] == want[row].argmax() or best[1] - best[0] < bound
            texts[seq] = [*texts.get(seq, [])[: runs[row][1]], *ids, int(drawn.ids[row])]

    advance([(s, 0, prompts[s]) for s in (0, 1)], feed=False)
    advance([(2, 0, prompts[2]), (0, 11, texts[0][-1:])], feed=False)
    for _ in range(steps):
        advance([(s, len(texts[s]) - 1, texts[s][-1:]) for s in (0, 1, 2)], feed=True)
    assert simulator.launches == (2 + steps) * model.table.per_step


def last_norm(reference: Reference, batch: RefBatch) -> np.ndarray:
    """Final-normed hidden states [T, H] by the oracle."""
    values, op = reference.step(batch, RefCache()), reference.graph.ops[-1]
    mean = values[op.ssq].astype("f8").sum(1, keepdims=True) / reference.graph.config.hidden_size
    return values[op.xw] / np.sqrt(mean + op.eps)


def test_hidden_states_have_room_where_h_is_narrow() -> None:
    made = plan(plain_graph(config(hidden=256, head_dim=32, ffn=64), "bf16"), order="tiles")
    table = launch_table(made, DEVICES["gfx942"])
    spans = {b.name: (b.offset, b.offset + b.nbytes) for b in table.buffers if b.unit == "T"}
    first, last = spans.pop("hidden")
    assert last - first == 512
    assert all(end <= first or last <= begin for begin, end in spans.values())


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama-tied", marks=pytest.mark.slow)])
def test_hidden_states_and_the_head_that_takes_them(name: str) -> None:
    """Hidden states of all rows against the oracle's; the head draws from them what the step drew,
    up to the rounding of the last norm."""
    model = tiny(name, "gfx942")
    simulator = model.simulator()
    reference = Reference(model.plan.graph, model.weights, "bf16")
    exact = Reference(model.plan.graph, model.weights, "fp32")
    runs = [(0, 0, [5, 17, 99, 3, 120]), (1, 0, [1])]
    batch = RefBatch.of(*runs)
    want, wide = (last_norm(r, batch) for r in (reference, exact))
    drawn = simulator.step(Part([3], 0, runs[0][2]), Part([0], 0, [1], slot=1), hidden=True)
    assert simulator.launches == len(model.table.launches)
    found = from_bf16(drawn.hidden)
    assert found.shape == (6, CONFIGS[name].hidden_size)
    bound = 4 * np.abs(want - wide).max() + 2.0**-8 * np.abs(found).max()
    assert np.abs(found - want).max() <= bound
    rows = drawn.hidden[[4, 5]]
    again = simulator.head(rows)
    weights = from_bf16(to_bf16(model.weights[reference.graph.ops[-1].weight]))
    truth = from_bf16(rows).astype("f8") @ weights.astype("f8").T
    assert np.abs(again.logits - truth).max() <= 2e-6 * np.abs(truth).max() + 1e-6
    assert again.ids.tolist() == truth.argmax(1).tolist()
    assert simulator.step(Part([3], 5, [7])).hidden.shape[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
def test_the_order_of_programs_never_shows_in_a_model() -> None:
    model = tiny("llama-tied", "gfx942")
    found = []
    for order in ("forward", "backward"):
        simulator = model.simulator()
        parts = Part([1], 0, [4, 9, 77]), Part([2], 0, [5], slot=1)
        first = simulator.step(*parts, order=order)
        again = simulator.step(Part([1], 3, [-1], 0), order=order, temperature=0.8, seed=7)
        found.append((first.logits, again.logits, again.ids))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
