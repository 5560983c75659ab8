"""Runs a graph, plain or fused, in NumPy: the oracle that kernels and passes are compared with.

Precisions:
  fp64  float64 throughout.
  fp32  float32 throughout; sums in NumPy's order.
  bf16  rounds to bf16 exactly where kernels do: matrices and embedding rows; the operands of every
        GEMM (normed or norm-weighted x, attention's y, h); q, k, v; attention probabilities before
        they weigh v. All else, sums included, is float32.
KV of a graph with ``kv_in_codes`` is what its int8 codes stand for, at every precision, and then
probabilities are not rounded; that of one with ``kv_scales`` is e4m3 numbers times their scale.
A GEMM of a graph with formats multiplies what its codes stand for: activations become codes where
kernels store them (``reference_codes``), and weights are given as CodedMatrix. At fp64 too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.bf16 import from_bf16, round_bf16
from sinterlm.ir.graph import Graph
from sinterlm.ir.quant import CodedMatrix
from sinterlm.ir.reference_attention import RefCache
from sinterlm.ir.reference_codes import code_rows, coded_heads, fp8_heads, fp8_rows
from sinterlm.ir.reference_ops import Context, RefBatch, evaluate

Array = NDArray[Any]
Precision = Literal["fp64", "fp32", "bf16"]

__all__ = ["Precision", "RefBatch", "RefCache", "Reference", "run"]


class Reference:
    """A graph with weights, ready to step. The precision is the caller's, not the graph's."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Array | CodedMatrix],
        precision: Precision = "fp32",
    ) -> None:
        """``weights`` holds each tensor by name: floats, uint16 for bf16 bits, or codes."""
        self.graph = graph
        self._weights = weights
        self._dtype = np.float64 if precision == "fp64" else np.float32
        self._narrow: Callable[[Array], Array] = round_bf16 if precision == "bf16" else _same
        self._matrices: dict[str, Array] = {}
        self._operands = {
            op.operand: graph.formats[op.matrices[0]]
            for op in graph.ops
            if op.operand is not None and op.matrices[0] in graph.formats
        }

    def step(self, batch: RefBatch, cache: RefCache) -> dict[str, Array]:
        """Every value of the graph by name after one step, and ``logits`` [R, V] in any case.

        ``cache`` gains the step's keys and values. Raises ValueError for a token id outside the
        vocabulary, and for positions that leave a hole in the cache.
        """
        ids, vocab = batch.token_ids, self.graph.config.vocab_size
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"token ids must be in [0, {vocab}), at least one")
        context = Context(
            config=self.graph.config,
            dtype=self._dtype,
            narrow=self._narrow,
            kv=self._paged,
            prob=_same if self.graph.kv_in_codes else self._narrow,
            operand=self._operand,
            matrix=self._matrix,
            table=self._table,
            vector=self._vector,
            batch=batch,
            cache=cache,
            values={"tokens": ids, "positions": batch.positions, "rows": batch.rows},
        )
        for op in self.graph.ops:
            written = evaluate(op, context)
            context.values.update(zip(op.writes, written, strict=True))
        return context.values

    def _paged(self, heads: Array, layer: int, which: int) -> Array:
        if self.graph.kv_scales:
            return fp8_heads(heads, self.graph.kv_scales[layer][which]).astype(self._dtype)
        if self.graph.kv_in_codes:
            return coded_heads(heads).astype(self._dtype)
        return self._narrow(heads)

    def _operand(self, name: str, values: Array) -> Array:
        form = self._operands.get(name)
        if form is None or form.act == "graph":
            return self._narrow(values)
        if form.act == "fp8":
            return fp8_rows(values, form).astype(self._dtype)
        coded = code_rows(values, form).dequantise()
        return coded[:, : values.shape[1]].astype(self._dtype)

    def _table(self, name: str) -> Array:
        stored = self._weights[name]
        if isinstance(stored, CodedMatrix):
            return stored.dequantise().astype(self._dtype)
        return self._matrix(name)

    def _vector(self, name: str) -> Array:
        stored = self._weights[name]
        assert not isinstance(stored, CodedMatrix), f"{name} is no vector"
        wide = from_bf16(stored) if stored.dtype == np.uint16 else stored
        return wide.astype(self._dtype, copy=False)

    def _matrix(self, name: str) -> Array:
        """Rounded once and kept. What codes stand for is not rounded."""
        if name not in self._matrices:
            stored = self._weights[name]
            if isinstance(stored, CodedMatrix):
                self._matrices[name] = stored.dequantise().astype(self._dtype)
            else:
                self._matrices[name] = self._narrow(self._vector(name))
        return self._matrices[name]


def run(
    graph: Graph,
    weights: Mapping[str, Array | CodedMatrix],
    batch: RefBatch,
    cache: RefCache,
    precision: Precision = "fp32",
) -> dict[str, Array]:
    """One step of ``graph``; see ``Reference.step``."""
    return Reference(graph, weights, precision).step(batch, cache)


def _same(x: Array) -> Array:
    return x
