"""The emitted translation unit: a pure function of shapes, one loop over layers, refusals."""

from __future__ import annotations

import dataclasses

import pytest

from sinterlm.backends.cpu.emit import emit
from sinterlm.errors import CompileError, UnsupportedModelError
from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import Plan
from sinterlm.passes.pipeline import plan
from tests.ir.graphs import config, plain_graph
from tests.native.tiny import CONFIGS


def with_graph(made: Plan, **changes: object) -> Plan:
    return dataclasses.replace(made, graph=dataclasses.replace(made.graph, **changes))


@pytest.fixture
def made() -> Plan:
    return plan(plain_graph(CONFIGS["gqa5-bias"], "bf16"))


class TestText:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_is_a_function_of_the_plan(self, name: str) -> None:
        texts = {emit(plan(plain_graph(CONFIGS[name], "bf16")), "avx2") for _ in range(2)}
        assert len(texts) == 1

    def test_is_shared_by_models_of_one_shape(self, made: Plan) -> None:
        """Numbers that are data, and names, do not reach the code."""
        c = dataclasses.replace(
            CONFIGS["gqa5-bias"], architecture="OtherForCausalLM", rms_norm_eps=1e-6
        )
        assert emit(plan(plain_graph(c, "bf16")), "avx2") == emit(made, "avx2")

    def test_differs_by_dtype_and_isa(self, made: Plan) -> None:
        fp32 = plan(plain_graph(CONFIGS["gqa5-bias"], "fp32"))
        assert "using E = float;" in emit(fp32, "avx2")
        assert "using E = bf16;" in emit(made, "avx2") != emit(made, "generic")

    def test_kv_in_codes_is_other_code_for_the_same_weights(self, made: Plan) -> None:
        graph = plain_graph(CONFIGS["gqa5-bias"], "bf16")
        coded = plan(dataclasses.replace(graph, kv_in_codes=True))
        assert "using Kv = code8;" in emit(coded, "avx2")
        assert "using Kv = E;" in emit(made, "avx2")
        assert coded.layout == made.layout and coded.memory == made.memory

    def test_is_small(self) -> None:
        """64 layers cost 64 rows of offsets, not 64 copies of the calls."""
        text = emit(plan(plain_graph(config(layers=64), "bf16")), "avx512bf16")
        assert text.count("norm_qkv_rope_kv<E, D>(w, a);") == 1
        assert len(text.splitlines()) < 300

    def test_absent_weights_are_absent(self) -> None:
        plain = emit(plan(plain_graph(config(), "bf16")), "avx2")
        assert "a.bias" not in plain and "a.q_norm" not in plain
        full = emit(plan(plain_graph(CONFIGS["odd-everything"], "bf16")), "avx2")
        assert full.count("a.bias = s.weight<float>(l.") == 4 and "a.q_norm" in full


class TestRefusals:
    def test_head_size(self) -> None:
        with pytest.raises(UnsupportedModelError, match="head_dim 20"):
            emit(plan(plain_graph(config(head_dim=20), "bf16")), "avx2")

    @pytest.mark.parametrize(("heads", "refused"), [(48, False), (49, True)])
    def test_heads_of_a_group(self, heads: int, refused: bool) -> None:
        wide = plan(plain_graph(config(heads=heads, kv_heads=1, head_dim=16), "bf16"))
        if refused:
            with pytest.raises(UnsupportedModelError, match="at most 48 times as many"):
                emit(wide, "avx2")
        else:
            assert "Hq = 48" in emit(wide, "avx2")

    def test_plain_ops(self, made: Plan) -> None:
        graph = plain_graph(CONFIGS["gqa5-bias"], "bf16")
        with pytest.raises(CompileError, match="op embed has no CPU kernel"):
            emit(dataclasses.replace(made, graph=graph), "avx2")

    def test_layers_that_differ(self, made: Plan) -> None:
        ops = tuple(
            dataclasses.replace(op, q_bias=None, k_bias=None, v_bias=None)
            if op.kind == "norm_qkv_rope_kv" and getattr(op, "layer", 0) == 1
            else op
            for op in made.graph.ops
        )
        with pytest.raises(CompileError, match="layer 1 is not built as layer 0"):
            emit(with_graph(made, ops=ops), "avx2")

    def test_a_layer_missing(self, made: Plan) -> None:
        ops = tuple(op for op in made.graph.ops if getattr(op, "layer", 0) == 0)
        with pytest.raises(CompileError, match="layer 1 is not built as layer 0"):
            emit(with_graph(made, ops=ops), "avx2")

    def test_ops_out_of_order(self, made: Plan) -> None:
        ops = made.graph.ops
        with pytest.raises(CompileError, match=r"order of layers|does not begin"):
            emit(with_graph(made, ops=(*ops[1:], ops[0])), "avx2")

    def test_weights_of_another_op(self, made: Plan) -> None:
        """A layout that packs another tensor where an op's weight belongs."""
        first = next(t for t in made.layout.tensors if t.name == "layers.0.o")
        segment = dataclasses.replace(first.segments[0], weight="0.up.weight")
        wrong = dataclasses.replace(first, segments=(segment,))
        tensors = tuple(wrong if t is first else t for t in made.layout.tensors)
        layout = dataclasses.replace(made.layout, tensors=tensors)
        with pytest.raises(CompileError, match=r"layers.0.o does not hold 0.o.weight"):
            emit(dataclasses.replace(made, layout=layout), "avx2")

    def test_missing_tensor_or_buffer(self, made: Plan) -> None:
        layout = dataclasses.replace(
            made.layout, tensors=tuple(t for t in made.layout.tensors if t.name != "lm_head")
        )
        with pytest.raises(CompileError, match="no lm_head"):
            emit(dataclasses.replace(made, layout=layout), "avx2")
        memory = dataclasses.replace(
            made.memory, buffers=tuple(b for b in made.memory.buffers if b.name != "q")
        )
        with pytest.raises(CompileError, match="no buffer q"):
            emit(dataclasses.replace(made, memory=memory), "avx2")

    def test_empty_graph(self, made: Plan) -> None:
        graph = Graph(made.graph.config, "bf16", (), {}, {})
        with pytest.raises(CompileError, match="order of layers"):
            emit(dataclasses.replace(made, graph=graph), "avx2")
