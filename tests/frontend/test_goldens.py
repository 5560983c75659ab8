"""Each tiny golden checkpoint, read by the frontend and run by the NumPy reference, gives the
logits that Hugging Face transformers gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.ir.reference import Reference
from sinterlm.ir.reference_attention import RefCache
from sinterlm.ir.reference_ops import RefBatch
from sinterlm.ir.verify import verify

MODELS = Path(__file__).parents[1] / "goldens" / "models"


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir()))
def test_logits_equal_transformers(name: str) -> None:
    expected = np.load(MODELS / name / "expected.npz")
    last = max(int(key.split("_")[1]) for key in expected.files)
    prompt, logits = expected[f"prompt_{last}"], expected[f"logits_{last}"]
    checkpoint = SafetensorsCheckpoint(MODELS / name)
    graph = build_graph(checkpoint.config, "fp32")
    verify(graph)
    check_tensors(graph, checkpoint)
    weights = {tensor: checkpoint.read(tensor, "fp32") for tensor in graph.weights}
    every = np.arange(len(prompt))
    batch = RefBatch(prompt.astype(np.int64), every, np.zeros_like(every), every)
    got = Reference(graph, weights).step(batch, RefCache())["logits"]
    np.testing.assert_allclose(got, logits, atol=2e-4, rtol=1e-3)
