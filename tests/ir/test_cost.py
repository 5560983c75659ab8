"""Costs against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace

from sinterlm.artifact.manifest import OpCost
from sinterlm.ir.cost import op_cost, plan_costs
from sinterlm.ir.quant import GemmFormat
from sinterlm.passes.formats import Scheme
from sinterlm.passes.pipeline import plan
from tests.ir.graphs import config, plain_graph

QWEN = config(
    vocab=151936, hidden=896, layers=24, heads=14, kv_heads=2, head_dim=64, ffn=4864, tied=True,
    qkv_bias=True,
)  # fmt: skip


def test_qwen2_5_0_5b() -> None:
    costs = plan_costs(plan(plain_graph(QWEN)))
    assert len(costs) == 1 + 24 * 5 + 1
    qkv = 1152 * 896
    layer = [
        OpCost("norm_qkv_rope_kv", 3, qkv * 2 + 1152 * 4, 512, 0, 0, 2 * qkv, 0, 0),
        OpCost("attention", 3, 0, 0, 0, 512, 0, 0, 3584),
        OpCost("o_residual", 3, 896 * 896 * 2 + 896 * 4, 0, 0, 0, 2 * 896 * 896, 0, 0),
        OpCost("norm_gate_up_act", 3, 9728 * 896 * 2, 0, 0, 0, 2 * 9728 * 896, 0, 0),
        OpCost("down_residual", 3, 896 * 4864 * 2 + 896 * 4, 0, 0, 0, 2 * 896 * 4864, 0, 0),
    ]
    assert list(costs[16:21]) == layer
    assert costs[0] == OpCost("embed_norm", -1, 896 * 4, 1792, 0, 0, 0, 0, 0)
    head = 151936 * 896
    assert costs[-1] == OpCost("norm_lm_head_sample", -1, head * 2, 0, 0, 0, 0, 2 * head, 0)
    # 494,032,768 parameters as published: all in bf16 but 24 * (2 * 896 + 1152) + 896 in fp32.
    vectors = 24 * (2 * 896 + 1152) + 896
    assert sum(c.weight_bytes for c in costs) == 2 * (494_032_768 - vectors) + 4 * vectors


def test_codes_of_kv_and_their_scales_are_what_is_read() -> None:
    graph = replace(plain_graph(QWEN), kv_in_codes=True)
    costs, wide = plan_costs(plan(graph)), plan_costs(plan(plain_graph(QWEN)))
    per_token = 2 * 2 * (64 + 4)
    qkv = replace(wide[1], bytes_per_token=per_token)
    attention = replace(wide[2], bytes_per_cached_token=per_token)
    assert costs == tuple(
        {"norm_qkv_rope_kv": replace(qkv, layer=c.layer),
         "attention": replace(attention, layer=c.layer)}.get(c.name, c)
        for c in wide
    )  # fmt: skip


def test_scales_of_blocks_are_counted_once_for_each() -> None:
    graph = plain_graph(config(hidden=192, heads=3, kv_heads=1, head_dim=64, ffn=320, layers=1))
    form = GemmFormat(8, 128, True, "graph", 64, "e4m3fn", 128)
    stored = {n: form for n, w in graph.weights.items() if n[0].isdigit() and len(w.shape) == 2}
    costs = plan_costs(plan(graph, None, Scheme(fp8="e4m3fn"), stored, order="tiles"))
    down = next(c for c in costs if c.name == "down_residual")
    norm = 192 * 4
    assert down.weight_bytes == 192 * 320 + 2 * 3 * 4 + norm
    channels = Scheme(8, is_fp8=True, fp8="e4m3fn")
    costs = plan_costs(plan(graph, None, channels, order="tiles"))
    down = next(c for c in costs if c.name == "down_residual")
    assert down.weight_bytes == 192 * (320 + 4) + norm


def test_plain_ops_cost_what_their_fusion_costs() -> None:
    graph = plain_graph(config(qkv_bias=True, qk_norm=True, o_bias=True, mlp_bias=True))
    plain = [op_cost(op, graph) for op in graph.ops]
    fused = plan_costs(plan(graph))
    for field in (
        "weight_bytes", "bytes_per_token", "bytes_per_row", "bytes_per_cached_token",
        "flops_per_token", "flops_per_row", "flops_per_pair",
    ):  # fmt: skip
        assert sum(getattr(c, field) for c in plain) == sum(getattr(c, field) for c in fused), field


def test_padding_is_not_counted_and_fp32_counts_double() -> None:
    odd = config(hidden=37, ffn=10, vocab=5, head_dim=20)
    narrow, wide = (plan_costs(plan(plain_graph(odd, dtype))) for dtype in ("bf16", "fp32"))
    gate_up = next(c for c in narrow if c.name == "norm_gate_up_act")
    assert gate_up.weight_bytes == 2 * 10 * 37 * 2
    for a, b in zip(narrow, wide, strict=True):
        assert b.bytes_per_cached_token == 2 * a.bytes_per_cached_token
        assert b.flops_per_token == a.flops_per_token
