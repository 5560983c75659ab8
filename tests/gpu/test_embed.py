"""The GPU kernel of the embedding: tables in bf16 and in codes, drawn tokens, the next norm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sinterlm.ir.bf16 import round_bf16
from sinterlm.ir.quant import GemmFormat
from tests.gpu import oplib
from tests.gpu.test_kernels import FORMS

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.parametrize(("in_tiles", "width"), list(itertools.product([True, False], [64, 128])))
def test_embed(in_tiles: bool, width: int) -> None:
    rng = np.random.default_rng(6)
    table = round_bf16(rng.normal(size=(131, 128)))
    norm = rng.normal(size=128).astype("f4")
    ids, drawn = [0, 130, -1, 64, 63], [7, 65]
    x, xw, ssq = oplib.embed(ids, table, norm, in_tiles, [0, 0, 1, 0, 0], drawn, width)
    assert np.array_equal(x, table[[0, 130, 65, 64, 63]])
    assert np.array_equal(xw, round_bf16(x * norm))
    assert np.allclose(ssq, (x**2).reshape(5, -1, 16).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_embed_of_codes(form: GemmFormat) -> None:
    rng = np.random.default_rng(6)
    table = rng.normal(size=(131, 192)).astype("f4")
    ids, drawn = [0, 130, -1, 64, 63], [7, 65]
    norm = np.ones(192, "f4")
    x = oplib.embed(ids, table, norm, True, [0, 0, 1, 0, 0], drawn, 64, form)[0]
    value, size = oplib.meaning(table, form)
    rows = [0, 130, 65, 64, 63]
    assert np.all(np.abs(x - value[rows]) <= 2.0**-23 * size[rows])
