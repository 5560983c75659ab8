"""Dummy weights: reproducible, plausible, and told apart by their digest."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sinterlm.frontend.dummy import DummyCheckpoint
from sinterlm.frontend.hf_config import read_config
from sinterlm.frontend.numeric import bf16_to_fp32, fp32_to_bf16
from sinterlm.ir.quant import GemmFormat
from tests.frontend.builders import tiny_config

CONFIG = read_config(tiny_config(vocab_size=2000, attention_bias=True))
EMBED = "model.embed_tokens.weight"


def test_values_depend_on_seed_and_name_alone() -> None:
    one, same, other = (DummyCheckpoint("d", CONFIG, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.read(EMBED, "bf16"), same.read(EMBED, "bf16"))
    assert not np.array_equal(one.read(EMBED, "bf16"), other.read(EMBED, "bf16"))
    head = one.read("lm_head.weight", "bf16")
    assert head.shape == (2000, 32) and not np.array_equal(head, one.read(EMBED, "bf16"))
    # the stream is promised to stay the same, for weights packed by an earlier run
    digest = hashlib.sha256(one.read(EMBED, "bf16").tobytes()).hexdigest()
    assert digest.startswith("a724525798924006")


def test_distribution() -> None:
    checkpoint = DummyCheckpoint("d", CONFIG)
    values = checkpoint.read(EMBED, "fp32")
    assert abs(values.mean()) < 3 * 0.02 / values.size**0.5
    assert abs(values.std() / 0.02 - 1) < 0.02
    beyond = (abs(values) > 0.06).mean()  # three deviations: 0.27 % of a normal
    assert 0.0015 < beyond < 0.0045
    norm = checkpoint.read("model.layers.0.input_layernorm.weight", "fp32")
    assert abs(norm.mean() - 1) < 0.02 and 0 < norm.std() < 0.05
    bias = checkpoint.read("model.layers.0.self_attn.q_proj.bias", "fp32")
    assert abs(bias).max() < 0.1


def test_both_dtypes_are_the_same_model() -> None:
    narrow = DummyCheckpoint("d", CONFIG)
    assert np.array_equal(narrow.read(EMBED, "fp32"), bf16_to_fp32(narrow.read(EMBED, "bf16")))
    wide = DummyCheckpoint("d", CONFIG, dtype="fp32")
    assert np.array_equal(wide.read(EMBED, "bf16"), fp32_to_bf16(wide.read(EMBED, "fp32")))
    assert wide.source_dtype == "fp32" and narrow.source_dtype == "bf16"


def test_digest_tells_models_apart() -> None:
    tied = read_config(tiny_config(tie_word_embeddings=True))
    digests = {
        DummyCheckpoint("d", CONFIG).digest(),
        DummyCheckpoint("d", CONFIG, seed=1).digest(),
        DummyCheckpoint("d", CONFIG, dtype="fp32").digest(),
        DummyCheckpoint("d", tied).digest(),
    }
    assert len(digests) == 4
    assert DummyCheckpoint("another name", CONFIG).digest() in digests


@pytest.mark.parametrize("code", ["e4m3fn", "e4m3fnuz"])
def test_fp8_numbers_are_drawn_with_the_same_deviation(code: str) -> None:
    form = GemmFormat(8, 0, True, "graph", 0, code)
    coded = DummyCheckpoint("d", CONFIG).read_coded(EMBED, form)
    values = coded.dequantise()
    assert values.shape == (2000, 32) and np.isfinite(values).all()
    assert abs(values.std() - 0.02) < 5e-4 and abs(values.mean()) < 5e-4
