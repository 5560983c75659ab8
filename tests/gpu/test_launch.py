"""Launch tables: their counts, their text, and whole tiny models run from them in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.simulator import Part
from sinterlm.backends.gpu.table import Axis, Table
from sinterlm.backends.gpu.tuning import read_tiles
from sinterlm.errors import UnsupportedModelError
from sinterlm.ir.bf16 import to_bf16
from sinterlm.ir.reference import RefBatch, RefCache, Reference
from sinterlm.passes.packing import pack, unpack
from sinterlm.passes.pipeline import plan
from tests.gpu.models import CONFIGS, tiny
from tests.ir.graphs import config, plain_graph


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_five_launches_per_layer_and_three(name: str, device: str) -> None:
    table = tiny(name, device).table
    assert len(table.launches) == 5 * CONFIGS[name].num_layers + 3
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
    ("name", "device", "steps"),
    [
        ("llama-tied", "gfx942", 1),
        pytest.param("llama-tied", "sm_90", 32, marks=pytest.mark.slow),
        pytest.param("qwen3", "sm_90", 4, marks=pytest.mark.slow),
        pytest.param("qwen2-window", "gfx942", 12, marks=pytest.mark.slow),
    ],
)
def test_a_model_runs_from_its_table(name: str, device: str, steps: int) -> None:
    """Prefill of three sequences, mixed steps, decode: logits within bf16 error of the oracle in
    bf16, and the same greedy tokens wherever the margin exceeds it."""
    model = tiny(name, device)
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
    assert simulator.launches == (2 + steps) * len(model.table.launches)


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
