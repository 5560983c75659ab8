"""GGUF: headers, config, tensors, and what must be refused."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend import gguf as frontend_gguf
from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.gguf import GgufCheckpoint
from sinterlm.frontend.gguf_config import shortest
from sinterlm.frontend.gguf_header import BLOCK_TYPES, read_gguf_header
from sinterlm.frontend.hf_config import read_config
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.frontend.numeric import fp32_to_bf16
from tests.frontend.builders import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    GgufTensors,
    Metadata,
    gguf_bytes,
    gguf_metadata,
    gguf_name,
    gguf_string,
    gguf_tensors,
    tiny_arrays,
    tiny_config,
    write_directory,
)


def write(path: Path, metadata: Metadata, tensors: GgufTensors, **kwargs: Any) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **kwargs))
    return path


def open_checked(path: Path) -> GgufCheckpoint:
    checkpoint = GgufCheckpoint(path)
    check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
    return checkpoint


FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_safetensors_it_was_made_of(name: str, tmp_path: Path) -> None:
    architecture, changes = FAMILIES[name]
    kind = name.split("-")[0]
    data = tiny_config(architectures=[architecture], model_type=kind, **changes)
    arrays = tiny_arrays(data)
    metadata = gguf_metadata(data, kind)
    if "head_dim" in data:
        for key in ("key_length", "value_length"):
            metadata[f"{kind}.attention.{key}"] = (U32, data["head_dim"])
    tensors = gguf_tensors(arrays, data, interleave=kind == "llama")
    ours = open_checked(write(tmp_path / "m.gguf", metadata, tensors))
    theirs = SafetensorsCheckpoint(write_directory(tmp_path / "hf", data, arrays))
    assert ours.config == theirs.config
    assert ours.tensors == theirs.tensors
    for tensor in arrays:
        for dtype in ("bf16", "fp32"):
            assert np.array_equal(ours.read(tensor, dtype), theirs.read(tensor, dtype)), tensor


def test_llama_rows_really_are_reordered(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data)
    stored = gguf_tensors(arrays, data)["blk.0.attn_k.weight"][2]
    assert stored != arrays["model.layers.0.self_attn.k_proj.weight"].tobytes()


def test_block_sizes_are_those_of_the_package() -> None:
    for number, block in BLOCK_TYPES.items():
        kind = GGMLQuantizationType(number)
        assert GGML_QUANT_SIZES[kind] == (block.elements, block.nbytes)
        assert kind.name.lower() == {"fp32": "f32", "fp16": "f16"}.get(block.name, block.name)


@pytest.mark.parametrize("number", BLOCK_TYPES)
@pytest.mark.parametrize("chunk", [256, 1 << 21])
def test_every_block_type(
    number: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend_gguf, "CHUNK", chunk)
    block = BLOCK_TYPES[number]
    rng = np.random.default_rng(number)
    rows, cols = 5, 512
    raw = rng.integers(0, 256, rows * cols // block.elements * block.nbytes, dtype=np.uint8)
    if block.elements == 1:  # random bits would hold NaN, which does not compare
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        kind = GGMLQuantizationType(number)
        raw = np.frombuffer(gguf.quants.quantize(values, kind).tobytes(), np.uint8)
    data = tiny_config()
    tensors = gguf_tensors(tiny_arrays(data), data)
    tensors["extra.weight"] = ((rows, cols), number, raw.tobytes())
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", gguf_metadata(data), tensors))
    assert checkpoint.tensors["extra.weight"].dtype == block.name
    # the package's own loop, over rows as it stores them
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw.reshape(rows, -1), GGMLQuantizationType(number))
    expected = np.asarray(expected, np.float32).reshape(rows, cols)
    got = checkpoint.read("extra.weight", "fp32")
    np.testing.assert_array_equal(got, expected)  # NaN equals NaN here
    finite = np.isfinite(expected)
    narrow = checkpoint.read("extra.weight", "bf16")
    assert np.array_equal(narrow[finite], fp32_to_bf16(expected)[finite])


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    data = tiny_config()
    tensors = gguf_tensors(tiny_arrays(data), data)
    factors = np.array([1, 2, 4, 8], "<f4")
    tensors["rope_freqs.weight"] = ((4,), 0, factors.tobytes())
    rope = open_checked(write(tmp_path / "m.gguf", gguf_metadata(data), tensors)).config.rope
    plain = read_config(data).rope.inv_freq
    np.testing.assert_allclose(np.array(plain) / factors, rope.inv_freq, rtol=1e-15)
    assert rope.kind == "llama3"
    for bad in (((3,), factors[:3]), ((4,), factors * 0), ((4,), factors * np.nan)):
        tensors["rope_freqs.weight"] = (bad[0], 0, bad[1].astype("<f4").tobytes())
        with pytest.raises(CheckpointError, match="rope_freqs"):
            GgufCheckpoint(write(tmp_path / "m.gguf", gguf_metadata(data), tensors))


def test_rope_scaling_keys_mean_what_config_json_means(tmp_path: Path) -> None:
    data = tiny_config()
    tensors = gguf_tensors(tiny_arrays(data), data)

    def rope_of(**keys: tuple[int, Any]) -> Any:
        metadata = gguf_metadata(data) | {f"llama.rope.scaling.{k}": v for k, v in keys.items()}
        return GgufCheckpoint(write(tmp_path / "m.gguf", metadata, tensors)).config.rope

    def expected(**scaling: Any) -> Any:
        return read_config(tiny_config(rope_scaling=scaling)).rope

    assert rope_of(type=(STRING, "none")) == read_config(data).rope
    linear = rope_of(type=(STRING, "linear"), factor=(F32, 4.0))
    assert linear == expected(type="linear", factor=4.0)
    yarn = rope_of(type=(STRING, "yarn"), factor=(F32, 4.0), original_context_length=(U32, 32))
    assert yarn == expected(type="yarn", factor=4.0, original_max_position_embeddings=32)
    doubled = rope_of(
        type=(STRING, "yarn"), factor=(F32, 4.0), attn_factor=(F32, 2.0)
    ).attention_factor
    assert doubled == pytest.approx(2 * yarn.attention_factor)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        rope_of(type=(STRING, "longrope"), factor=(F32, 4.0))


def test_llama_window_makes_a_mistral(tmp_path: Path) -> None:
    data = tiny_config()
    tensors = gguf_tensors(tiny_arrays(data), data)
    metadata = gguf_metadata(data) | {"llama.attention.sliding_window": (U32, 32)}
    config = open_checked(write(tmp_path / "m.gguf", metadata, tensors)).config
    assert config.architecture == "MistralForCausalLM"
    assert config.sliding_windows == (32, 32)


def test_float32_metadata_is_read_as_it_was_written() -> None:
    assert shortest(float(np.float32(1e-5))) == 1e-5
    assert shortest(float(np.float32(1e-6))) == 1e-6
    assert shortest(500000.0) == 500000.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", (STRING, "gemma2"), ("gemma2", "qwen3")),
        ("general.architecture", (U32, 3), ("general.architecture",)),
        ("split.count", (U32, 2), ("split",)),
        ("llama.expert_count", (U32, 8), ("expert_count",)),
        ("llama.attn_logit_softcapping", (F32, 50.0), ("softcapping",)),
        ("llama.rope.dimension_count", (U32, 4), ("rope.dimension_count",)),
        ("llama.attention.value_length", (U32, 16), ("value_length",)),
        ("llama.attention.head_count_kv", (ARRAY, U32, [2, 4]), ("head_count_kv", "layers")),
        ("llama.block_count", (STRING, "two"), ("block_count",)),
        ("llama.block_count", (U32, 2**32 - 1), ("block_count",)),
        ("llama.attention.head_count", (U32, 0), ("head_count",)),
        ("llama.attention.layer_norm_rms_epsilon", (F32, float("nan")), ("epsilon",)),
        ("general.alignment", (U32, 24), ("general.alignment",)),
        ("general.alignment", (U32, 0), ("general.alignment",)),
    ],
)
def test_refused_metadata(
    key: str, value: tuple[Any, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    data = tiny_config()
    tensors = gguf_tensors(tiny_arrays(data), data)
    path = write(tmp_path / "m.gguf", gguf_metadata(data) | {key: value}, tensors)
    with pytest.raises(CheckpointError) as caught:
        GgufCheckpoint(path)
    for word in (*words, str(path)):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "key", ["llama.block_count", "llama.context_length", "llama.feed_forward_length"]
)
def test_missing_metadata_is_named(key: str, tmp_path: Path) -> None:
    data = tiny_config()
    metadata = gguf_metadata(data)
    del metadata[key]
    path = write(tmp_path / "m.gguf", metadata, gguf_tensors(tiny_arrays(data), data))
    with pytest.raises(CheckpointError, match=key.removeprefix("llama.")):
        GgufCheckpoint(path)


def test_equal_values_per_layer_are_one_value(tmp_path: Path) -> None:
    data = tiny_config()
    metadata = gguf_metadata(data) | {"llama.attention.head_count_kv": (ARRAY, I32, [2, 2])}
    path = write(tmp_path / "m.gguf", metadata, gguf_tensors(tiny_arrays(data), data))
    assert open_checked(path).config.num_kv_heads == 2


def test_unknown_tensors_and_types_are_named(tmp_path: Path) -> None:
    data = tiny_config()
    tensors = gguf_tensors(tiny_arrays(data), data)
    odd = tensors | {"blk.0.attn_sinks.weight": ((4,), 0, bytes(16))}
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", gguf_metadata(data), odd))
    with pytest.raises(UnsupportedModelError, match="attn_sinks"):
        check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
    for number, name in ((10, "Q2_K"), (16, "IQ2_XXS"), (99, "number 99")):
        odd = tensors | {"x": ((256,), number, bytes(84))}
        with pytest.raises(UnsupportedModelError, match=name) as caught:
            GgufCheckpoint(write(tmp_path / "m.gguf", gguf_metadata(data), odd))
        assert "Q4_K" in str(caught.value)


def test_alignment_and_offsets_are_honoured(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data)
    metadata = gguf_metadata(data) | {"general.alignment": (U32, 128)}
    path = write(tmp_path / "m.gguf", metadata, gguf_tensors(arrays, data), alignment=128)
    name = "model.norm.weight"
    assert np.array_equal(open_checked(path).read(name, "fp32"), arrays[name])
    assert gguf_name(name) == "output_norm.weight"


# --------------------------------------------------------------------------------- wrong headers


def _kv(key: str, kind: int, raw: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + raw


def _tensor(name: str, dims: list[int], number: int = 0, offset: int = 0) -> bytes:
    out = gguf_string(name) + struct.pack("<I", len(dims))
    return out + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", number, offset)


def _file(num_tensors: int, num_keys: int, body: bytes, version: int = 3) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body
    return header + bytes(-len(header) % 32) + bytes(64)


_HUGE = struct.pack("<Q", 2**63)

WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header needs 4"),
    "other magic": (b"GGML" + bytes(64), "not a GGUF"),
    "version 1": (_file(0, 0, b"", 1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte order"),
    "many tensors": (_file(2**60, 0, b""), "tensors"),
    "many keys": (_file(0, 2**60, b""), "metadata keys"),
    "more tensors than bytes": (_file(100, 0, b""), "100 tensors"),
    "huge key": (_file(0, 1, _HUGE), "string"),
    "huge string": (_file(0, 1, _kv("a", 8, _HUGE)), "string"),
    "string past the end": (_file(0, 1, _kv("a", 8, struct.pack("<Q", 999))), "999 bytes"),
    "huge array": (_file(0, 1, _kv("a", 9, struct.pack("<I", 0) + _HUGE)), "elements"),
    "huge array of strings": (_file(0, 1, _kv("a", 9, struct.pack("<I", 8) + _HUGE)), "elements"),
    "nested array": (_file(0, 1, _kv("a", 9, struct.pack("<IQ", 9, 1))), "nested"),
    "unknown value type": (_file(0, 1, _kv("a", 77, b"")), "77"),
    "unknown element type": (_file(0, 1, _kv("a", 9, struct.pack("<IQ", 77, 1))), "77"),
    "bool of 2": (_file(0, 1, _kv("a", 7, b"\x02")), "bool"),
    "key twice": (_file(0, 2, _kv("a", 0, b"\1") * 2), "twice"),
    "key not UTF-8": (_file(0, 1, gguf_string(b"\xff") + bytes(12)), "UTF-8"),
    "no dimensions": (_file(1, 0, _tensor("t", [])), "0 dimensions"),
    "many dimensions": (_file(1, 0, _tensor("t", [1] * 5)), "5 dimensions"),
    "overflowing dimensions": (_file(1, 0, _tensor("t", [2**32, 2**32])), "shape"),
    "zero dimension": (_file(1, 0, _tensor("t", [4, 0])), "shape"),
    "half a block": (_file(1, 0, _tensor("t", [48], 2)), "q4_0"),
    "past the end": (_file(1, 0, _tensor("t", [1000])), "truncated"),
    "offset past the end": (_file(1, 0, _tensor("t", [4], 0, 2**63)), "offset"),
    "misaligned": (_file(1, 0, _tensor("t", [4], 0, 4)), "expected 0"),
    "overlap": (_file(2, 0, _tensor("t", [4]) + _tensor("u", [4])), "expected 32"),
    "tensor twice": (_file(2, 0, _tensor("t", [4]) + _tensor("t", [4], 0, 32)), "twice"),
    "name too long": (_file(1, 0, _tensor("t" * 2000, [4])), "string"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_headers_cost_no_memory(name: str, tmp_path: Path) -> None:
    content, words = WRONG[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    data = tiny_config(num_hidden_layers=1)
    metadata = gguf_metadata(data) | {"x.flag": (BOOL, True), "x.list": (ARRAY, F32, [1.0, 2.0])}
    whole = gguf_bytes(metadata, gguf_tensors(tiny_arrays(data), data))
    path = tmp_path / "m.gguf"
    for size in (*range(0, 2000, 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            GgufCheckpoint(path)
