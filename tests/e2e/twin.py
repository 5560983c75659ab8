"""The NumPy twin of a tiny checkpoint: its graph through ``ir.reference``, no compiler involved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.source import resolve_model
from sinterlm.ir.reference import Precision, RefBatch, RefCache, Reference
from sinterlm.passes.pipeline import plan


def open_twin(model: str | Path, precision: Precision, *, fused: bool = True) -> Reference:
    """The reference of a checkpoint's graph, after the passes or (``fused=False``) before them."""
    with resolve_model(str(model)) as checkpoint:
        graph = build_graph(checkpoint.config, "bf16" if precision == "bf16" else "fp32")
        weights = {name: checkpoint.read(name, "fp32") for name in graph.weights}
    return Reference(plan(graph).graph if fused else graph, weights, precision)


def twin_logits(twin: Reference, prompt: NDArray[np.int32]) -> NDArray[np.float64]:
    """Logits [n, vocab] at every position of a prompt, in one step."""
    every = np.arange(len(prompt))
    batch = RefBatch(prompt.astype(np.int64), every, np.zeros(len(prompt), np.int64), every)
    return twin.step(batch, RefCache())["logits"].astype(np.float64)
