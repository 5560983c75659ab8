"""The memory plan: nothing alive is overwritten, and what can share does."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.plan import Buffer
from sinterlm.passes.memory import Span, first_gap, lifetimes
from sinterlm.passes.pipeline import plan
from tests.ir.graphs import config, configs, plain_graph


@given(configs(), st.sampled_from(["bf16", "fp32"]))
def test_live_buffers_do_not_overlap(c: DecoderConfig, dtype: str) -> None:
    planned = plan(plain_graph(c, dtype))
    buffers = {b.name: b for b in planned.memory.buffers}
    # Who is alive at each op, worked out from the graph alone.
    homes = {"x": "x", "x_out": "x", "xw": "xw", "ssq": "ssq", "q": "q", "y": "y", "h": "h"}
    place = {
        getattr(op, field): home
        for op in planned.graph.ops
        for field, home in homes.items()
        if getattr(op, field, None) is not None
    }
    for index, op in enumerate(planned.graph.ops):
        alive = {place[v] for v in (*op.reads, *op.writes) if v in place} | {"x"}
        before = {v for o in planned.graph.ops[:index] for v in o.writes}
        after = {v for o in planned.graph.ops[index + 1 :] for v in o.reads}
        alive |= {place[v] for v in before & after if v in place}
        for a, b in combinations(sorted(alive), 2):
            one, two = buffers[a], buffers[b]
            apart = one.offset + one.nbytes <= two.offset or two.offset + two.nbytes <= one.offset
            assert apart, f"{a} and {b} at {op.kind}"
    for unit, total in (("T", planned.memory.bytes_per_token), ("R", planned.memory.bytes_per_row)):
        for b in planned.memory.buffers:
            if b.unit == unit:
                assert b.offset % 64 == 0 and b.offset + b.nbytes <= total
        assert total % 64 == 0


def test_names_units_and_padded_widths() -> None:
    c = config(hidden=37, heads=5, kv_heads=1, head_dim=20, ffn=70, vocab=150)
    sizes = {b.name: (b.unit, b.nbytes) for b in plan(plain_graph(c)).memory.buffers}
    assert sizes == {
        "x": ("T", 48 * 4), "xw": ("T", 48 * 2), "ssq": ("T", 3 * 4), "q": ("T", 112 * 2),
        "y": ("T", 112 * 2), "h": ("T", 128 * 2), "logits": ("R", 192 * 4),
        "gathered": ("R", 48 * 2),
    }  # fmt: skip
    wide = {b.name: b.nbytes for b in plan(plain_graph(c, "fp32")).memory.buffers}
    assert wide["x"] == 48 * 4 and wide["xw"] == 48 * 4 and wide["h"] == 128 * 4


def test_h_shares_with_q_and_y() -> None:
    memory = plan(plain_graph(config(hidden=64, ffn=256))).memory
    at = {b.name: b.offset for b in memory.buffers}
    assert at["h"] == at["q"] < at["y"]
    assert memory.bytes_per_token == 64 * 4 + 64 * 2 + 64 + 256 * 2


def test_lifetimes_of_one_layer() -> None:
    spans = lifetimes(plan(plain_graph(config(layers=1))).graph)
    assert spans["q"] == [Span(1, 2)] and spans["y"] == [Span(2, 3)] and spans["h"] == [Span(4, 5)]
    assert spans["xw"] == [Span(0, 1), Span(3, 4), Span(5, 6)]
    assert spans["x"] == [Span(0, 3), Span(3, 5), Span(5, 6)]
    assert spans["logits"] == spans["gathered"] == [Span(6, 6)]


@pytest.mark.parametrize(("nbytes", "offset"), [(64, 64), (65, 256), (128, 256), (1, 64)])
def test_first_gap(nbytes: int, offset: int) -> None:
    rivals = [Buffer("a", "T", 40, 0), Buffer("b", "T", 100, 128)]
    assert first_gap(rivals, nbytes) == offset
    assert first_gap([], nbytes) == 0
