"""Each pass by what stands before and after it; what each refuses; the pipeline as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from sinterlm.ir.graph import DecoderConfig, Graph, Value
from sinterlm.ir.ops import (
    Add,
    DownResidual,
    MatMul,
    NormGateUpAct,
    NormLmHeadSample,
    NormQkvRopeKv,
    Op,
    OResidual,
    QkNorm,
    RmsNorm,
    RotaryEmbedding,
    SiluMul,
)
from sinterlm.ir.reference import RefBatch, RefCache, run
from sinterlm.ir.verify import verify
from sinterlm.passes.fuse_attention import fuse_o_residual, fuse_qkv
from sinterlm.passes.fuse_ends import fuse_embed, fuse_head
from sinterlm.passes.fuse_mlp import fuse_down_residual, fuse_gate_up
from sinterlm.passes.pipeline import FUSED, PIPELINE, fuse, plan
from sinterlm.passes.rewrite import Matcher, PassError, Rewrite
from tests.ir.graphs import config, configs, plain_graph, random_weights

ONE = config(layers=1, qkv_bias=True, qk_norm=True)
QKV = "rmsnorm matmul matmul matmul qk_norm rope qk_norm rope kv_append"
ATTN = f"embed {QKV} attention matmul add "
MLP = "rmsnorm matmul matmul silu_mul matmul add "

#: Pass, kinds before, kinds after.
STEPS: list[tuple[Callable[[Graph], Graph], str, str]] = [
    (
        fuse_qkv,
        f"{ATTN}{MLP}rmsnorm lm_head sample",
        f"embed split_norm norm_qkv_rope_kv attention matmul add {MLP}rmsnorm lm_head sample",
    ),
    (
        fuse_gate_up,
        f"{ATTN}{MLP}rmsnorm lm_head sample",
        f"{ATTN}split_norm norm_gate_up_act matmul add rmsnorm lm_head sample",
    ),
    (
        fuse_head,
        f"{ATTN}{MLP}rmsnorm lm_head sample",
        f"{ATTN}{MLP}split_norm norm_lm_head_sample",
    ),
]  # fmt: skip


def kinds(graph: Graph) -> str:
    return " ".join(op.kind for op in graph.ops)


@pytest.mark.parametrize(("step", "before", "after"), STEPS)
def test_passes_that_split_norms(step: Callable[[Graph], Graph], before: str, after: str) -> None:
    graph = plain_graph(ONE)
    assert kinds(graph) == before
    out = step(graph)
    verify(out)
    assert kinds(out) == after


def test_passes_that_take_split_norms_in() -> None:
    graph = fuse_head(fuse_gate_up(fuse_qkv(plain_graph(ONE))))
    assert kinds(graph) == (
        "embed split_norm norm_qkv_rope_kv attention matmul add "
        "split_norm norm_gate_up_act matmul add split_norm norm_lm_head_sample"
    )
    o = fuse_o_residual(graph)
    assert kinds(o) == (
        "embed split_norm norm_qkv_rope_kv attention o_residual norm_gate_up_act matmul add "
        "split_norm norm_lm_head_sample"
    )
    down = fuse_down_residual(o)
    assert kinds(down) == (
        "embed split_norm norm_qkv_rope_kv attention o_residual norm_gate_up_act down_residual "
        "norm_lm_head_sample"
    )
    assert kinds(fuse_embed(down)) == (
        "embed_norm norm_qkv_rope_kv attention o_residual norm_gate_up_act down_residual "
        "norm_lm_head_sample"
    )


def test_every_field_of_the_fused_ops() -> None:
    graph = fuse(plain_graph(replace(config(o_bias=True, mlp_bias=True), qk_norm=True)))
    by_kind: dict[type[Op], Op] = {}
    for op in graph.ops:
        if getattr(op, "layer", 1) == 1:
            by_kind[type(op)] = op
    assert by_kind[NormQkvRopeKv] == NormQkvRopeKv(
        xw="0.out.xw", ssq="0.out.ssq", positions="positions", q="1.q_rotated", kv="1.kv",
        layer=1, num_heads=4, num_kv_heads=2, head_dim=16, eps=1e-5, q_weight="1.q.weight",
        k_weight="1.k.weight", v_weight="1.v.weight", q_norm="1.q_norm.weight",
        k_norm="1.k_norm.weight", qk_eps=1e-5,
    )  # fmt: skip
    assert by_kind[OResidual] == OResidual(
        y="1.attn", x="0.out", x_out="1.mid", xw="1.mid.xw", ssq="1.mid.ssq", layer=1,
        weight="1.o.weight", norm_weight="1.mlp_norm.weight", bias="1.o.bias",
    )  # fmt: skip
    assert by_kind[NormGateUpAct] == NormGateUpAct(
        xw="1.mid.xw", ssq="1.mid.ssq", h="1.h", layer=1, eps=1e-5, gate_weight="1.gate.weight",
        up_weight="1.up.weight", gate_bias="1.gate.bias", up_bias="1.up.bias",
    )  # fmt: skip
    assert by_kind[DownResidual] == DownResidual(
        h="1.h", x="1.mid", x_out="1.out", xw="1.out.xw", ssq="1.out.ssq", layer=1,
        weight="1.down.weight", norm_weight="final_norm.weight", bias="1.down.bias",
    )  # fmt: skip
    assert by_kind[NormLmHeadSample] == NormLmHeadSample(
        xw="1.out.xw", ssq="1.out.ssq", rows="rows", ids="ids", eps=1e-5, weight="head"
    )


@settings(max_examples=20)
@given(configs())
def test_every_graph_on_the_way_means_the_same(c: DecoderConfig) -> None:
    graph = plain_graph(c)
    weights = random_weights(graph)
    batch = RefBatch.of((0, 0, [0, 1, 1]), (1, 0, [1]))
    expected = run(graph, weights, batch, RefCache(), "fp64")["scores"]
    for step in PIPELINE:
        graph = step.run(graph)
        verify(graph)
        values = run(graph, weights, batch, RefCache(), "fp64")
        got = values["logits" if "logits" in values else "scores"]
        assert np.abs(got - expected).max() < 1e-10, step.name
    assert {type(op) for op in graph.ops} == set(FUSED)
    assert len(graph.ops) == 2 + 5 * c.num_layers


def change(graph: Graph, which: type[Op], index: int = 0, **fields: object) -> Graph:
    """The graph with other fields in its ``index``-th op of a kind."""
    op = [op for op in graph.ops if isinstance(op, which)][index]
    ops = tuple(replace(op, **fields) if o is op else o for o in graph.ops)
    return replace(graph, ops=ops)


def test_refuses_a_half_that_is_read_elsewhere() -> None:
    """The gate's sums are also added to the stream: fusing would lose them."""
    graph = plain_graph(config(layers=1, ffn=48))
    stray = Add(a="0.mid", b="0.gate:y", y="extra")
    at = next(i for i, op in enumerate(graph.ops) if isinstance(op, SiluMul))
    ops = (*graph.ops[:at], stray, *graph.ops[at:])
    values = {**graph.values, "extra": Value("extra", ("T", 48), "fp32")}
    graph = replace(graph, ops=ops, values=values)
    verify(graph)
    with pytest.raises(PassError, match=r"fuse_gate_up: value '0.gate:y' is still read by Add"):
        fuse(graph)


REFUSED: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "v of another norm": (
        lambda g: change(g, MatMul, 9, x="0.attn_norm:y"), "'0.attn_norm:y' feeds '1.v:y'",
    ),
    "up of another norm": (
        lambda g: change(g, MatMul, 5, x="0.attn_norm:y"), "'0.attn_norm:y' is still read by",
    ),
    "no rope": (
        lambda g: replace(
            g,
            ops=tuple(
                o for o in change(g, QkNorm, y="0.q_rotated").ops
                if not (isinstance(o, RotaryEmbedding) and o.y == "0.q_rotated")
            ),
        ),
        "is written by QkNorm, not by RotaryEmbedding",
    ),
    "norm of k alone": (lambda g: change(g, RotaryEmbedding, x="0.q:y"), "different per-head"),
    "another eps": (lambda g: change(g, QkNorm, eps=1e-3), "different per-head norms"),
    "an MLP too many": (
        lambda g: replace(g, config=replace(g.config, num_layers=1)), "2 MLPs in 1 layers",
    ),
    "no residual": (
        lambda g: change(g, RmsNorm, 1, x="0.o:y"), "'0.o:y' is read by Add, SplitNorm, not by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_unknown_patterns(name: str) -> None:
    """Verification between passes is left out: the pass itself must notice."""
    broken, message = REFUSED[name]
    graph = broken(plain_graph(config(qk_norm=True)))
    with pytest.raises(PassError, match=message):
        for step in PIPELINE:
            graph = step.run(graph)


def test_groups_may_not_share_an_op() -> None:
    graph = plain_graph(ONE)
    rewrite = Rewrite(Matcher(graph, "twice"))
    rewrite.replace(graph.ops[:2], [])
    with pytest.raises(PassError, match=r"twice: value '0.attn_norm:y' is part of two patterns"):
        rewrite.replace(graph.ops[1:3], [])


def test_dumps_are_numbered_and_repeatable(tmp_path: Path) -> None:
    graph = plain_graph(ONE)
    for name in ("a", "b"):
        plan(graph, tmp_path / name / "deep")
    names = sorted(p.name for p in (tmp_path / "a/deep").iterdir())
    expected = ["00-frontend.txt"]
    expected += [f"{i:02d}-{step.name}.txt" for i, step in enumerate(PIPELINE, start=1)]
    expected.append(f"{len(PIPELINE) + 1:02d}-formats.txt")
    assert names == expected
    for name in names:
        text = (tmp_path / "a/deep" / name).read_text()
        assert text == (tmp_path / "b/deep" / name).read_text()
    assert "norm_qkv_rope_kv" in (tmp_path / "a/deep/01-fuse_qkv.txt").read_text()


def test_every_pass_says_why_and_draws() -> None:
    for step in PIPELINE:
        assert step.why_here
        assert "before:" in (step.run.__doc__ or "") and "after:" in (step.run.__doc__ or "")
