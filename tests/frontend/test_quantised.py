"""GPTQ, AWQ and compressed-tensors: every weight exactly what its codes say, or a named error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.frontend.numeric import bf16_to_fp32
from sinterlm.ir.quant import GemmFormat
from tests.frontend import quantised as q
from tests.frontend.builders import Arrays, write_directory

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
W8A8 = q.compressed_config(
    "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}, act=True
)
W4A16 = q.compressed_config(
    "pack-quantized",
    {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    act=False,
)
NAME = "model.layers.1.mlp.down_proj.weight"


def changed(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config with other keys about weights."""
    group = config["config_groups"]["group_0"]
    return config | {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


def make(
    folder: Path,
    config: dict[str, Any],
    write: Callable[[str, q.Codes], Arrays],
    bits: int,
    group: int,
    symmetric: bool,
    shuffle: bool = False,
    edit: Callable[[Arrays], None] | None = None,
) -> tuple[SafetensorsCheckpoint, dict[str, q.Codes]]:
    rng = np.random.default_rng(0)

    def codes_of(rows: int, depth: int) -> q.Codes:
        return q.draw(rows, depth, bits, min(group or depth, depth), symmetric, rng, shuffle)

    arrays, codes = q.quantised_arrays(write, codes_of)
    if edit is not None:
        edit(arrays)
    write_directory(folder, q.DATA | {"quantization_config": config}, arrays)
    return SafetensorsCheckpoint(folder), codes


CASES = {
    "gptq": (GPTQ, partial(q.gptq, bits=4), 4, 32, True, "graph"),
    "gptq_asym": (GPTQ | {"sym": False}, partial(q.gptq, bits=4), 4, 32, False, "graph"),
    "gptq_v2": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
                partial(q.gptq, bits=4, less_one=0), 4, 32, False, "graph"),
    "gptq_8bit": (GPTQ | {"bits": 8}, partial(q.gptq, bits=8), 8, 32, True, "graph"),
    "gptq_8bit_asym": (GPTQ | {"bits": 8, "sym": False}, partial(q.gptq, bits=8), 8, 32, False,
                       "graph"),
    "gptq_channel": (GPTQ | {"group_size": -1}, partial(q.gptq, bits=4), 4, 0, True, "graph"),
    "gptq_wide_groups": (GPTQ | {"group_size": 128}, partial(q.gptq, bits=4), 4, 128, True,
                         "graph"),
    "awq": (AWQ, q.awq, 4, 32, False, "graph"),
    "w8a8": (W8A8, q.int_quantized, 8, 0, True, "int8"),
    "w8a8_asym": (changed(W8A8, symmetric=False), partial(q.int_quantized, symmetric=False), 8, 0,
                  False, "int8"),
    "w4a16": (W4A16, q.pack_quantized, 4, 32, True, "graph"),
    "w4a16_asym": (changed(W4A16, symmetric=False), partial(q.pack_quantized, symmetric=False), 4,
                   32, False, "graph"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_are_kept_exactly(case: str, tmp_path: Path) -> None:
    config, write, bits, group, symmetric, act = CASES[case]
    checkpoint, codes = make(tmp_path, config, write, bits, group, symmetric)
    check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
    assert set(checkpoint.stored_formats) == set(codes)
    for name, drawn in codes.items():
        form = checkpoint.stored_formats[name]
        width = drawn.codes.shape[1]
        expected_group = group if 0 < group < width else 0
        assert form == GemmFormat(bits, expected_group, symmetric, act, 64)
        coded = checkpoint.read_coded(name, form)
        assert coded is not None and coded.codes.dtype == np.uint8
        np.testing.assert_array_equal(coded.codes, drawn.codes)
        np.testing.assert_array_equal(coded.dequantise().astype(np.float64), drawn.floats())
        np.testing.assert_array_equal(checkpoint.read(name, "fp32"), drawn.floats())
        np.testing.assert_allclose(
            bf16_to_fp32(checkpoint.read(name, "bf16")), drawn.floats(), rtol=2**-8
        )
        # activations may be narrower than declared; weights may not be anything else
        assert checkpoint.read_coded(name, replace(form, act="int8", act_group=32)) is not None
        assert checkpoint.read_coded(name, replace(form, symmetric=not symmetric)) is None
    assert checkpoint.tensors[NAME].dtype == f"{config['quant_method']}-int{bits}"
    plain = "model.norm.weight"
    assert checkpoint.read_coded(plain, GemmFormat(4, 32, True, "graph", 64)) is None


def test_groups_larger_than_a_gemm_reads_repeat_their_scale(tmp_path: Path) -> None:
    data = q.DATA | {"hidden_size": 512, "num_attention_heads": 32, "num_key_value_heads": 16,
                     "quantization_config": GPTQ | {"group_size": 256, "sym": False}}  # fmt: skip
    rng = np.random.default_rng(1)

    def codes_of(rows: int, depth: int) -> q.Codes:
        return q.draw(rows, depth, 4, min(256, depth), False, rng)

    arrays, codes = q.quantised_arrays(partial(q.gptq, bits=4), codes_of, data)
    checkpoint = SafetensorsCheckpoint(write_directory(tmp_path, data, arrays))
    name = "model.layers.0.mlp.up_proj.weight"
    form = checkpoint.stored_formats[name]
    assert form.group == 128
    coded = checkpoint.read_coded(name, form)
    assert coded is not None
    np.testing.assert_array_equal(coded.dequantise().astype(np.float64), codes[name].floats())


def test_act_order_is_read_as_floats(tmp_path: Path) -> None:
    config = GPTQ | {"desc_act": True, "sym": False}
    checkpoint, codes = make(tmp_path, config, partial(q.gptq, bits=4), 4, 32, False, shuffle=True)
    assert checkpoint.stored_formats == {}
    for name, drawn in codes.items():
        np.testing.assert_array_equal(checkpoint.read(name, "fp32"), drawn.floats())


def test_an_index_in_order_is_no_reordering(tmp_path: Path) -> None:
    config = GPTQ | {"desc_act": True}
    checkpoint, codes = make(tmp_path, config, partial(q.gptq, bits=4), 4, 32, True)
    assert set(checkpoint.stored_formats) == set(codes)


def test_the_digest_covers_every_part_and_the_config(tmp_path: Path) -> None:
    write = partial(q.gptq, bits=4)
    digests = set()
    for n, edit in enumerate((None, "qweight", "qzeros", "scales")):

        def touch(arrays: Arrays, part: str | None = edit) -> None:
            if part is not None:
                name = f"{NAME.removesuffix('weight')}{part}"
                arrays[name] = arrays[name].copy()
                arrays[name][0, 0] += 1

        config = GPTQ | {"sym": False}
        digests.add(make(tmp_path / str(n), config, write, 4, 32, False, edit=touch)[0].digest())
    second = GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}
    digests.add(make(tmp_path / "v2", second, write, 4, 32, False)[0].digest())
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": 4}, "quant_method"),
        ({"bits": 4}, "unnamed"),
        (GPTQ | {"bits": 3}, "bits"),
        (GPTQ | {"bits": "4"}, "bits"),
        (GPTQ | {"bits": None}, "bits"),
        (GPTQ | {"group_size": 0}, "group_size"),
        (GPTQ | {"group_size": None}, "group_size"),
        (GPTQ | {"sym": "yes"}, "sym"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype"),
        (AWQ | {"version": "gemv"}, "gemv"),
        (AWQ | {"bits": 8}, "bits"),
        (AWQ | {"zero_point": False}, "zero_point"),
        (W8A8 | {"format": "naive-quantized"}, "naive-quantized"),
        (W8A8 | {"config_groups": {}}, "config_groups"),
        (W8A8 | {"config_groups": {"a": {}}}, "weights"),
        (W8A8 | {"config_groups": W8A8["config_groups"] | {"b": {}}}, "one group"),
        (W8A8 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (W8A8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (W8A8 | {"transform_config": {"u": 1}}, "transform_config"),
        (W8A8 | {"quantization_status": "frozen"}, "quantization_status"),
        (changed(W8A8, num_bits=4), "num_bits"),
        (changed(W8A8, type="float"), "type"),
        (changed(W8A8, strategy="block"), "strategy"),
        (changed(W8A8, dynamic=True), "dynamic"),
    ],
)
def test_other_configs_are_refused_by_name(
    config: dict[str, Any], word: str, tmp_path: Path
) -> None:
    folder = write_directory(tmp_path, q.DATA | {"quantization_config": config}, {})
    with pytest.raises(CheckpointError, match=word):
        SafetensorsCheckpoint(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dynamic", False), ("num_bits", 4), ("type", "float"), ("symmetric", False),
     ("strategy", "tensor")],
)  # fmt: skip
def test_other_activations_are_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    group = W8A8["config_groups"]["group_0"]
    group = group | {"input_activations": group["input_activations"] | {key: value}}
    config = W8A8 | {"config_groups": {"group_0": group}}
    folder = write_directory(tmp_path, q.DATA | {"quantization_config": config}, {})
    with pytest.raises(UnsupportedModelError, match=key):
        SafetensorsCheckpoint(folder)


def drop(part: str) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        del arrays[f"{NAME.removesuffix('weight')}{part}"]

    return edit


def swap(part: str, by: Callable[[Any], Any]) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        name = f"{NAME.removesuffix('weight')}{part}"
        arrays[name] = by(arrays[name])

    return edit


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (drop("scales"), "scales"),
        (drop("qzeros"), "qzeros"),
        (drop("g_idx"), "g_idx"),
        (drop("qweight"), "qzeros"),
        (swap("scales", lambda a: a[:-1]), "scales"),
        (swap("scales", lambda a: a.astype(np.int32)), "scales"),
        (swap("qzeros", lambda a: a[:, :-1]), "qzeros"),
        (swap("qzeros", lambda a: a.astype(np.int64)), "qzeros"),
        (swap("g_idx", lambda a: a[:-1]), "g_idx"),
        (swap("g_idx", lambda a: a + 100), "index"),
        (swap("g_idx", lambda a: a - 1), "index"),
        (swap("qweight", lambda a: a.reshape(-1)), "qweight"),
        (swap("qweight", lambda a: a[:-1]), "multiple|expected"),
        (swap("qweight", lambda a: a[:0]), "qweight"),
    ],
)
def test_damaged_parts_are_refused_by_name(
    edit: Callable[[Arrays], None], word: str, tmp_path: Path
) -> None:
    config = GPTQ | {"desc_act": True, "sym": False}
    with pytest.raises(CheckpointError, match=word):
        checkpoint, _ = make(tmp_path, config, partial(q.gptq, bits=4), 4, 32, False, edit=edit)
        check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
        for name, form in checkpoint.stored_formats.items():
            checkpoint.read_coded(name, form)


def test_zeros_of_a_symmetric_checkpoint_are_checked(tmp_path: Path) -> None:
    checkpoint, _ = make(tmp_path, GPTQ, partial(q.gptq, bits=4), 4, 32, False)
    with pytest.raises(CheckpointError, match="symmetric"):
        checkpoint.read_coded(NAME, checkpoint.stored_formats[NAME])


def test_a_wrong_weight_shape_is_refused(tmp_path: Path) -> None:
    edit = swap("weight_shape", lambda a: a + 1)
    checkpoint, _ = make(tmp_path, W4A16, q.pack_quantized, 4, 32, True, edit=edit)
    with pytest.raises(CheckpointError, match="weight_shape"):
        checkpoint.read(NAME, "fp32")


def test_integers_without_a_config_are_refused(tmp_path: Path) -> None:
    arrays, _ = q.quantised_arrays(
        q.awq, lambda n, k: q.draw(n, k, 4, 32, False, np.random.default_rng(0))
    )
    folder = write_directory(tmp_path, q.DATA, arrays)
    with pytest.raises(UnsupportedModelError, match=r"I32.*quantization_config"):
        SafetensorsCheckpoint(folder)
