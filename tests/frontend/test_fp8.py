"""fp8 checkpoints: every number and scale as stored, or a named error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.ir.quant import GemmFormat
from tests.frontend.builders import Arrays, tiny_arrays, tiny_config, write_directory

#: Of 2 layers: heads 4 of 48, 2 kv heads: rows and columns that end within a block of 128.
DATA = tiny_config(hidden_size=192, intermediate_size=320)
NAME = "model.layers.1.mlp.down_proj.weight"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
          "weight_block_size": [128, 128]}  # fmt: skip
TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
          "modules_to_not_convert": ["lm_head"]}  # fmt: skip


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy,
               "dynamic": False} | more  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                              "dynamic": True, "symmetric": True},
    }  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "float-quantized",
            "kv_cache_scheme": None, "config_groups": {"group_0": group}}  # fmt: skip


#: config, name of scales, rows that share one (0 = all), columns (0 = all), storage of scales
CASES = {
    "blocks": (BLOCKS, "weight_scale_inv", 128, 128, "f4"),
    "tensor": (TENSOR, "weight_scale", 0, 0, "f4"),
    "fbgemm": (FBGEMM, "weight_scale", 1, 0, "f4"),
    "compressed-tensor": (compressed("tensor"), "weight_scale", 0, 0, "f2"),
    "compressed-channel": (compressed("channel"), "weight_scale", 1, 0, "f2"),
    "compressed-block": (compressed("block", block_structure=[128, 128]), "weight_scale", 128, 128,
                         "f4"),
}  # fmt: skip


def make(folder: Path, case: str, edit: Any = None, **keys: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint, and codes and scales [rows, columns] of every matrix."""
    config, scale_name, rows, columns, kind = CASES[case]
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    drawn: dict[str, Any] = {}
    for name, floats in tiny_arrays(DATA).items():
        if not name.startswith("model.layers.") or not name.endswith("_proj.weight"):
            arrays[name] = floats.astype(np.float16)
            continue
        n, k = floats.shape
        codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
        codes[(codes & 127) == 127] = 0x80
        grid = (-(-n // rows) if rows else 1, -(-k // columns) if columns else 1)
        scales = rng.uniform(0.001, 0.05, grid).astype(kind)
        path = name.removesuffix("weight")
        arrays[name] = codes
        arrays[path + scale_name] = scales if rows else scales.reshape(() if kind == "f4" else 1)
        if config is TENSOR:
            arrays[path + "input_scale"] = np.array(0.5, "f4")
        each = np.repeat(scales, rows or n, axis=0)[:n]
        drawn[name] = codes, np.repeat(each, columns or k, axis=1)[:, :k].astype("f8")
    if edit is not None:
        edit(arrays)
    write_directory(folder, DATA | {"quantization_config": config | keys}, arrays)
    return SafetensorsCheckpoint(folder), drawn


def values(codes: np.ndarray) -> np.ndarray:
    """By the definition of e4m3fn."""
    exponent, mantissa = (codes >> 3) & np.int64(15), (codes & 7).astype("f8")
    size = np.where(exponent, 1 + mantissa / 8, mantissa / 8) * 2.0 ** (np.maximum(exponent, 1) - 7)
    return np.where(codes & 128, -size, size)


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_scales_are_kept(case: str, tmp_path: Path) -> None:
    checkpoint, drawn = make(tmp_path, case)
    _, _, rows, columns, _ = CASES[case]
    check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
    assert set(checkpoint.stored_formats) == set(drawn)
    for name, (codes, scales) in drawn.items():
        form = checkpoint.stored_formats[name]
        assert form == GemmFormat(8, columns, True, "graph", 64, "e4m3fn", max(rows, 1))
        coded = checkpoint.read_coded(name, form)
        assert coded is not None and np.array_equal(coded.codes, codes)
        each = np.repeat(coded.scales, columns or codes.shape[1], axis=1)[:, : codes.shape[1]]
        assert np.array_equal(each, scales)
        floats = values(codes) * scales
        assert np.array_equal(checkpoint.read(name, "fp32"), floats.astype("f4"))
        other = checkpoint.read_coded(name, GemmFormat(8, columns, True, "graph", 64, "e4m3fnuz"))
        assert other is not None
        assert np.array_equal(other.dequantise(), coded.dequantise())
        assert checkpoint.read_coded(name, GemmFormat(8, columns, True, "graph", 64)) is None
    assert checkpoint.tensors[NAME].dtype == "fp8"
    assert checkpoint.is_quantised and checkpoint.origin(NAME, form) == "as stored (fp8)"


def test_the_digest_covers_every_part(tmp_path: Path) -> None:
    digests = set()
    for n, part in enumerate((None, "weight", "weight_scale", "input_scale")):

        def touch(arrays: Arrays, part: str | None = part) -> None:
            if part is not None:
                name = NAME.removesuffix("weight") + part
                arrays[name] = arrays[name].copy()
                arrays[name].reshape(-1)[:1] += 1

        digests.add(make(tmp_path / str(n), "tensor", touch)[0].digest())
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("case", "keys", "named"),
    [
        ("blocks", {"weight_block_size": [64, 128]}, r"block_size.*\[64, 128\].*\[128, 128\]"),
        ("blocks", {"fmt": "e5m2"}, "fmt.*e5m2.*e4m3"),
        ("compressed-channel", compressed("channel", num_bits=4), "num_bits.*4.*8"),
        ("compressed-channel", compressed("channel", type="int"), "type.*int.*float"),
        ("compressed-channel", compressed("group", group_size=128), "strategy.*group"),
        ("compressed-block", compressed("block", block_structure=[64, 64]), "block_structure"),
    ],
)  # fmt: skip
def test_other_meanings_are_refused(
    case: str, keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        make(tmp_path, case, **keys)


@pytest.mark.parametrize(
    ("case", "part", "value", "named"),
    [
        ("blocks", "weight_scale_inv", None, "weight_scale_inv' is missing"),
        ("blocks", "weight_scale_inv", np.ones((2, 2), "f4"), r"float32|fp32\[2, 2\]"),
        ("compressed-channel", "weight_scale", np.ones((192,), "f4"), r"expected .*\[192, 1\]"),
        ("tensor", "weight_scale", np.ones(2, "f4"), "expected"),
        ("tensor", "input_scale", np.ones(3, "f4"), "expected"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    case: str, part: str, value: Any, named: str, tmp_path: Path
) -> None:
    def edit(arrays: Arrays) -> None:
        name = NAME.removesuffix("weight") + part
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value

    with pytest.raises(CheckpointError, match=named):
        make(tmp_path, case, edit)


def test_fp8_without_a_config_is_refused(tmp_path: Path) -> None:
    arrays = dict(tiny_arrays(DATA))
    arrays[NAME] = np.zeros((192, 320), np.uint8)
    write_directory(tmp_path, DATA, arrays)
    with pytest.raises(UnsupportedModelError, match=r"F8_E4M3 is not .* quantization_config"):
        SafetensorsCheckpoint(tmp_path)
