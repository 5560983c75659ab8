"""A graph as text says all that the graph says."""

from __future__ import annotations

from sinterlm.ir.text import graph_text
from sinterlm.passes.pipeline import fuse
from tests.ir.graphs import config, plain_graph


def test_every_op_is_a_line() -> None:
    graph = fuse(plain_graph(config(qkv_bias=True)))
    lines = graph_text(graph).splitlines()
    assert lines[0] == "graph TestForCausalLM bf16"
    assert len(lines) == 2 + len(graph.ops) + len(graph.weights)
    assert lines[3] == (
        "  %0.attn: bf16[T, 64] = attention(0.q_rotated, 0.kv; layer=0, num_heads=4, "
        "num_kv_heads=2, head_dim=16, scale=0.25, window=0)"
    )
    assert "q_bias=0.q.bias" in lines[2] and "q_norm" not in lines[2]
    assert "  head [50, 48]" in lines


def test_differences_show() -> None:
    full, windowed = (graph_text(plain_graph(config(windows=w))) for w in ((), (0, 9)))
    assert full != windowed
    assert graph_text(plain_graph(config())) == full
