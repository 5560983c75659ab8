"""Which matrices stay wider, on weights made to be easy and hard."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.ir.bf16 import to_bf16
from sinterlm.ir.quant import GemmFormat
from sinterlm.passes.formats import Scheme
from sinterlm.passes.pipeline import plan
from sinterlm.passes.sensitivity import LIMITS, measured, wide_enough
from tests.ir.graphs import config, plain_graph

INT4 = GemmFormat(4, 32, True, "int8", 64)
INT8 = GemmFormat(8, 128, True, "int8", 64)
INT8_PER_CHANNEL = GemmFormat(8, 0, True, "int8", 64)
RNG = np.random.default_rng(0)
GAUSSIAN = RNG.standard_normal((200, 512)).astype(np.float32)
OUTLIERS = (GAUSSIAN * np.where(RNG.random(512) < 0.02, 12, 1)).astype(np.float32)
WEIGHTS = {"gaussian": GAUSSIAN, "bf16": to_bf16(GAUSSIAN), "outliers": OUTLIERS,
           "zero": GAUSSIAN * 0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("gaussian", INT4, INT4),
        ("gaussian", INT8, INT8),
        ("bf16", INT4, INT4),
        ("zero", INT4, INT4),
        ("outliers", INT4, INT8),
        ("outliers", INT8, INT8),
        ("gaussian", None, None),
    ],
)
def test_the_next_wider_form_that_is_good_enough(
    name: str, asked: GemmFormat | None, expected: GemmFormat | None
) -> None:
    assert wide_enough((name,), asked, measured(WEIGHTS.__getitem__)) == expected


def test_matrices_of_one_gemm_widen_together() -> None:
    error_of = measured(WEIGHTS.__getitem__)
    assert wide_enough(("gaussian", "outliers"), INT4, error_of) == INT8


def test_what_8_bits_do_not_hold_stays_wide() -> None:
    flat = {"w": np.concatenate([GAUSSIAN * 1e-3, GAUSSIAN[:, :1] * 3], axis=1)}
    error_of = measured(flat.__getitem__)
    assert (
        error_of("w", INT8_PER_CHANNEL) < LIMITS[8]
    )  # the one large weight is all of a row's energy
    heavy = {"w": RNG.standard_t(1.5, (200, 4096)).astype(np.float32)}
    assert wide_enough(("w",), INT8_PER_CHANNEL, measured(heavy.__getitem__)) is None


def test_choices_reach_the_layout_and_its_hash() -> None:
    graph = plain_graph(config(), "bf16")
    plain = plan(graph, None, Scheme(4))

    def error_of(name: str, form: GemmFormat) -> float:
        return 1.0 if name == "1.up.weight" and form.bits == 4 else 0.0

    made = plan(graph, None, Scheme(4), None, error_of)
    first, second = (made.layout.find(f"layers.{layer}.gate_up") for layer in (0, 1))
    assert first is not None and first.format is not None and first.format.bits == 4
    assert second is not None and second.format is not None
    assert (second.format.bits, second.format.group) == (8, 128)
    assert made.layout.layout_hash != plain.layout.layout_hash


def test_codes_of_a_checkpoint_are_not_measured() -> None:
    def error_of(name: str, form: GemmFormat) -> float:
        raise AssertionError(name)

    graph = plain_graph(config(), "bf16")
    stored = dict.fromkeys(graph.weights, INT4)
    assert plan(graph, None, Scheme(), stored, error_of).graph.formats
