"""Scales of an fp8 KV cache in checkpoints: where they lie, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.fields import Fields
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.frontend.quantization_config import read_quantization
from tests.frontend.builders import Arrays, tiny_arrays, tiny_config, write_directory
from tests.frontend.test_fp8 import compressed

ATTENTION = "model.layers.{}.self_attn."


def scalar(value: float, kind: str = "f4", shape: tuple[int, ...] = ()) -> np.ndarray:
    return np.full(shape, value, kind)


def opened(folder: Path, scales: Arrays) -> SafetensorsCheckpoint:
    data = tiny_config()
    return SafetensorsCheckpoint(write_directory(folder, data, tiny_arrays(data) | scales))


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [("k_scale", "v_scale"), ("attn.k_scale", "attn.v_scale"),
     ("k_proj.k_scale", "v_proj.v_scale")],
)  # fmt: skip
def test_scales_by_their_names(k_name: str, v_name: str, tmp_path: Path) -> None:
    """Of each layer, in any shape of one number; the rest of the checkpoint is as it was."""
    scales = {
        ATTENTION.format(0) + k_name: scalar(0.25),
        ATTENTION.format(0) + v_name: scalar(0.125, "f2", (1,)),
        ATTENTION.format(1) + k_name: scalar(3, shape=(1, 1)),
        ATTENTION.format(1) + v_name: scalar(1e-4),
    }
    with opened(tmp_path, scales) as checkpoint:
        (k0, v0), (k1, v1) = checkpoint.kv_scales()
        assert (k0, v0, k1) == (0.25, 0.125, 3.0)
        assert v1 == float(np.float32(1e-4))
        check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)


def test_one_scale_for_both_and_layers_without(tmp_path: Path) -> None:
    scales = {ATTENTION.format(1) + "kv_scale": scalar(0.5)}
    with opened(tmp_path, scales) as checkpoint:
        assert checkpoint.kv_scales() == ((1.0, 1.0), (0.5, 0.5))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_what_is_no_positive_number_is_refused(value: float, tmp_path: Path) -> None:
    scales = {ATTENTION.format(1) + "kv_scale": scalar(value)}
    with (
        opened(tmp_path, scales) as checkpoint,
        pytest.raises(CheckpointError, match=r"k_scale of layer 1 is .*expected a positive"),
    ):
        checkpoint.kv_scales()


@pytest.mark.parametrize(
    ("scales", "named"),
    [
        ({"k_scale": scalar(1)}, "has no v_scale beside it"),
        ({"v_proj.v_scale": scalar(1)}, "has no k_scale beside it"),
        ({"kv_scale": scalar(1), "attn.k_scale": scalar(1)}, "are scales of the same"),
        ({"kv_scale": scalar(1, shape=(2,))}, "expected one number"),
        ({"kv_scale": scalar(1, "i4")}, "expected one number"),
    ],
)
def test_what_does_not_fit_is_refused(scales: Arrays, named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        opened(tmp_path, {ATTENTION.format(0) + name: made for name, made in scales.items()})


SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True,
          "dynamic": False}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"type": "int"}, "type"),
        ({"num_bits": 4}, "num_bits"),
        ({"strategy": "channel"}, "strategy"),
        ({"symmetric": False}, "symmetric"),
        ({"dynamic": True}, "dynamic"),
    ],
)
def test_schemes_of_compressed_tensors(changes: dict[str, object], named: str | None) -> None:
    config = compressed("tensor") | {"kv_cache_scheme": SCHEME | changes}
    fields = Fields({"quantization_config": config}, "config.json")
    if named is None:
        assert read_quantization(fields) is not None
        return
    with pytest.raises((CheckpointError, UnsupportedModelError), match=f"kv_cache_scheme.*{named}"):
        read_quantization(fields)
