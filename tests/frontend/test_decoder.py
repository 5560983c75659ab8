"""The graph of plain ops."""

from __future__ import annotations

from typing import Any

import pytest

from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.hf_config import read_config
from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import Attention, MatMul
from tests.frontend.builders import tiny_config

LAYER = [
    "rmsnorm", "matmul", "rope", "matmul", "rope", "matmul", "kv_append", "attention", "matmul",
    "add", "rmsnorm", "matmul", "matmul", "silu_mul", "matmul", "add",
]  # fmt: skip


def graph_of(dtype: str = "bf16", **changes: Any) -> Graph:
    return build_graph(read_config(tiny_config(**changes)), dtype)


def test_order_of_ops() -> None:
    kinds = [op.kind for op in graph_of().ops]
    assert kinds == ["embed", *LAYER, *LAYER, "rmsnorm", "lm_head", "sample"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        {"head_dim": 24, "num_key_value_heads": 1},
    ],
)
def test_every_name_is_written_once_before_it_is_read(changes: dict[str, Any]) -> None:
    graph = graph_of(**changes)
    written = {"tokens", "positions", "rows"}
    used: set[str] = set()
    for op in graph.ops:
        assert set(op.reads) <= written
        assert not set(op.writes) & written
        written |= set(op.writes)
        used |= set(op.weights)
    assert written == set(graph.values)
    assert used == set(graph.weights)


def test_shapes_and_dtypes() -> None:
    graph = graph_of(head_dim=24)
    assert graph.values["l1.q"].shape == ("T", 96)
    assert graph.values["l1.v"].shape == ("T", 48)
    assert graph.weights["model.layers.1.self_attn.o_proj.weight"].shape == (32, 96)
    assert graph.weights["lm_head.weight"].shape == (40, 32)
    assert graph.values["logits"].shape == ("R", 40)
    assert {graph.values[name].dtype for name in ("x", "l0.x", "l1.x_attn", "logits")} == {"fp32"}
    assert graph.values["l0.h"].dtype == "bf16"
    assert {value.dtype for value in graph_of("fp32").values.values()} == {"fp32", "i32"}


def test_tied_head_is_the_embedding() -> None:
    graph = graph_of(tie_word_embeddings=True)
    assert graph.ops[-2].weights == graph.ops[0].weights == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in graph.weights


def test_biases_and_norms_are_named() -> None:
    graph = graph_of(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=True)
    biased = [op.bias for op in graph.ops if isinstance(op, MatMul) and op.bias]
    assert len(biased) == 8 and "model.layers.1.self_attn.o_proj.bias" in biased
    assert graph.weights["model.layers.0.self_attn.k_norm.weight"].shape == (128,)


def test_windows_reach_attention() -> None:
    graph = graph_of(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    )
    assert [op.window for op in graph.ops if isinstance(op, Attention)] == [0, 16]
