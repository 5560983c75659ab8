"""Quantised checkpoints from file to logits: codes in the kernels say what their floats say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import OpenModel
from tests.frontend import quantised as q
from tests.frontend.builders import write_directory
from tests.frontend.test_quantised import CASES

IDS = np.random.default_rng(5).integers(0, q.DATA["vocab_size"], 48).astype(np.int32)
QUICK = ("gptq_asym", "w8a8")


def write_checkpoint(folder: Path, case: str) -> Path:
    """Weights of deviation about 0.1, so that no layer drowns another."""
    config, write, bits, group, symmetric, _ = CASES[case]
    rng = np.random.default_rng(1)

    def codes_of(rows: int, depth: int) -> q.Codes:
        drawn = q.draw(rows, depth, bits, min(group or depth, depth), symmetric, rng)
        middle = np.full_like(drawn.zeros, 1 << (bits - 1))
        zeros = middle if symmetric else middle - 1 + drawn.zeros % 3
        scales = (drawn.scales * (16 / (1 << bits))).astype(np.float16).astype(np.float32)
        return replace(drawn, zeros=zeros, scales=scales)

    arrays, _ = q.quantised_arrays(write, codes_of)
    return write_directory(folder, q.DATA | {"quantization_config": config}, arrays)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES]
)
def test_codes_say_what_their_floats_say(case: str, tmp_path: Path, open_model: OpenModel) -> None:
    folder = write_checkpoint(tmp_path / case, case)
    reference = open_model(folder, dtype="fp32").forward_logits(IDS)
    llm = open_model(folder)
    logits = llm.forward_logits(IDS)
    bits, act = CASES[case][2], CASES[case][5]
    name = str(llm.bundle.manifest.quantization)
    assert name.startswith(f"int{bits} w{bits}") and "as stored" in name
    assert ("-a8" in name) == (act == "int8")
    error = np.abs(logits - reference).max() / reference.std()
    print(f"{case}: {name}: largest error {error:.4f} deviations of a logit")
    assert error < (0.25 if act == "int8" else 0.1)


def test_activations_are_narrowed_where_that_is_asked_for(
    tmp_path: Path, open_model: OpenModel
) -> None:
    folder = write_checkpoint(tmp_path / "m", "gptq_asym")
    llm = open_model(folder, act_dtype="int8")
    assert str(llm.bundle.manifest.quantization).startswith("int4 w4g32z-a8g64, as stored")
