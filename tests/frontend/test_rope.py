"""Inverse frequencies against those of Hugging Face transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.hf_config import read_config
from tests.frontend.builders import tiny_config

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "rope_goldens.json").read_text())


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_transformers(name: str) -> None:
    golden = GOLDENS[name]
    rope = read_config(golden["config"], golden["max_model_len"]).rope
    # the goldens are computed in float32, ours in float64
    np.testing.assert_allclose(rope.inv_freq, golden["inv_freq"], rtol=1e-6)
    assert rope.attention_factor == pytest.approx(golden["attention_factor"], rel=1e-12)
    assert rope.kind == name.split("_")[0]


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn_mscale"])
def test_both_spellings_are_the_same(name: str) -> None:
    old = GOLDENS[name]["config"]
    scaling = dict(old["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = scaling | {"rope_theta": old["rope_theta"]}
    assert read_config(new) == read_config(old)


def test_dynamic_is_unchanged_up_to_the_trained_length() -> None:
    data = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0})
    plain = read_config(tiny_config()).rope.inv_freq
    assert read_config(data).rope.inv_freq == plain
    assert read_config(data, 64).rope.inv_freq == plain
    longer = read_config(data, 256)
    assert longer.rope.inv_freq[-1] < plain[-1]
    assert longer.max_position_embeddings == 256


def test_yarn_covers_the_stretched_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read_config(tiny_config(rope_scaling=scaling)).max_position_embeddings == 512


def test_original_length_beside_the_parameters_wins() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    inner = tiny_config(rope_scaling=scaling | {"original_max_position_embeddings": 64})
    outer = tiny_config(
        rope_scaling=scaling | {"original_max_position_embeddings": 32},
        original_max_position_embeddings=64,
    )
    assert read_config(inner).rope == read_config(outer).rope


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, ("longrope", "yarn")),
        ({"rope_type": "default", "mrope_section": [8, 12, 12]}, ("mrope_section",)),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"full_attention": {"rope_type": "default"}}, ("per layer type",)),
    ],
)
def test_refused_by_name(scaling: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_config(tiny_config(rope_scaling=scaling))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear"},
        {"type": "linear", "factor": 0},
        {"type": "linear", "factor": "2"},
        {"type": "yarn", "factor": 1e300},
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        {"type": 3},
        [1],
    ],
)
def test_bad_parameters_are_errors(scaling: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tiny_config(rope_scaling=scaling))
