"""safetensors: values, digests, and every way a file or an index can be wrong."""

from __future__ import annotations

import json
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.decoder import EMBED, LM_HEAD, build_graph, check_tensors
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.frontend.numeric import bf16_to_fp32, convert, fp32_to_bf16
from sinterlm.frontend.weights import read_header
from tests.frontend.builders import (
    frame,
    safetensors_bytes,
    tiny_arrays,
    tiny_config,
    write_directory,
    write_shards,
)


@given(st.integers(0, 2**32 - 1))
def test_bf16_rounds_to_nearest_even(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    got = int(fp32_to_bf16(value)[0])
    if np.isnan(value[0]):
        assert np.isnan(bf16_to_fp32(np.array([got], np.uint16)))[0]
        assert got >> 15 == bits >> 31
        return
    # an independent rule: of the two neighbours the nearer one, and on a tie the even one
    below, above = bits >> 16, (bits >> 16) + 1
    if bits & 0xFFFF == 0:
        expected = below
    else:
        rest = Fraction(bits & 0xFFFF, 0x10000)
        tie = below if below % 2 == 0 else above
        expected = tie if rest == Fraction(1, 2) else below if rest < Fraction(1, 2) else above
    assert got == expected


def test_bf16_passes_through_bit_for_bit() -> None:
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(convert(every, "bf16", "bf16"), every)
    back = fp32_to_bf16(bf16_to_fp32(every))
    nan = np.isnan(bf16_to_fp32(every))
    assert np.array_equal(back[~nan], every[~nan])
    assert np.isnan(bf16_to_fp32(back[nan])).all()


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32"])
def test_reads_every_dtype(stored: str, tmp_path: Path) -> None:
    data = tiny_config()
    values = tiny_arrays(data)
    kinds: dict[str, Any] = {
        "bf16": fp32_to_bf16, "fp16": lambda a: a.astype(np.float16), "fp32": lambda a: a,
    }  # fmt: skip
    arrays = {name: kinds[stored](array) for name, array in values.items()}
    with SafetensorsCheckpoint(write_directory(tmp_path, data, arrays)) as checkpoint:
        check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
        assert checkpoint.source_dtype == stored
        for name, array in arrays.items():
            wide = bf16_to_fp32(array) if stored == "bf16" else array.astype(np.float32)
            got = checkpoint.read(name, "fp32")
            assert got.dtype == np.float32 and got.flags.c_contiguous and got.flags.aligned
            assert np.array_equal(got, wide)
            narrow = checkpoint.read(name, "bf16")
            assert narrow.dtype == np.uint16 and narrow.shape == array.shape
            assert np.array_equal(narrow, fp32_to_bf16(wide))


def test_unaligned_data_is_aligned_when_read(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (1 + -len(text) % 2)  # the data section starts at an odd offset
    path = tmp_path / "model.safetensors"
    path.write_bytes(frame(text, np.array([1.5, -2.0], "<f4").tobytes()))
    stored = read_header(path)["x"]
    assert stored.offset % 4
    raw = np.memmap(path, np.uint8, "r")[stored.offset :][: stored.info.nbytes]
    got = convert(np.asarray(raw).view("<f4"), "fp32", "fp32")
    assert got.flags.aligned and got.tolist() == [1.5, -2.0]


def test_shards_read_like_one_file_and_hash_the_same(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data)
    one = SafetensorsCheckpoint(write_directory(tmp_path / "one", data, arrays))
    many = SafetensorsCheckpoint(write_shards(tmp_path / "many", data, arrays, 3))
    assert one.tensors == many.tensors
    assert len(one.files) == 1 and len(many.files) == 4
    for name in arrays:
        assert np.array_equal(one.read(name, "bf16"), many.read(name, "bf16"))
    assert one.digest() == many.digest()


def test_digest_sees_every_change(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data)
    seen = {SafetensorsCheckpoint(write_directory(tmp_path / "a", data, arrays)).digest()}
    last = list(arrays)[-1]
    one_bit = {name: array.copy() for name, array in arrays.items()}
    one_bit[last].view(np.uint32).reshape(-1)[-1] ^= 1
    reshaped = arrays | {last: arrays[last].T.copy().reshape(arrays[last].T.shape)}
    renamed = {("x" if name == last else name): array for name, array in arrays.items()}
    for i, changed in enumerate((one_bit, reshaped, renamed)):
        folder = write_directory(tmp_path / str(i), data, changed)
        seen.add(SafetensorsCheckpoint(folder).digest())
    assert len(seen) == 4


def test_digest_of_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data) | {"\ud800": np.zeros(1, np.float32)}
    checkpoint = SafetensorsCheckpoint(write_directory(tmp_path, data, arrays))
    assert len(checkpoint.digest()) == 64
    with pytest.raises(UnsupportedModelError, match="ud800"):
        check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)


def test_digest_reports_every_byte(tmp_path: Path) -> None:
    class Recorder:
        total = done = 0

        def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
            self.total = total or 0

        def advance(self, amount: int) -> None:
            self.done += amount

        def notify(self, message: str) -> None:
            raise AssertionError(message)

    data = tiny_config()
    recorder = Recorder()
    SafetensorsCheckpoint(write_directory(tmp_path, data, tiny_arrays(data))).digest(recorder)
    assert recorder.total == recorder.done > 0


# ------------------------------------------------------------------------------- tied embeddings


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_checkpoint_with_a_head(same: bool, tmp_path: Path) -> None:
    data = tiny_config(tie_word_embeddings=True)
    arrays = tiny_arrays(data)
    arrays[LM_HEAD] = arrays[EMBED].copy()
    if not same:
        arrays[LM_HEAD][-1, -1] += 1
    checkpoint = SafetensorsCheckpoint(write_directory(tmp_path, data, arrays))
    graph = build_graph(checkpoint.config, "bf16")
    check_tensors(graph, checkpoint)
    assert (LM_HEAD in graph.weights) is not same


def test_biases_found_in_the_checkpoint(tmp_path: Path) -> None:
    data = tiny_config()
    names = tuple(f"model.layers.{i}.mlp.gate_proj.bias" for i in range(2))
    arrays = tiny_arrays(data, extra=names)
    checkpoint = SafetensorsCheckpoint(write_directory(tmp_path / "all", data, arrays))
    graph = build_graph(checkpoint.config, "bf16")
    check_tensors(graph, checkpoint)
    assert names[0] in graph.weights
    del arrays["model.layers.1.mlp.up_proj.bias"]
    checkpoint = SafetensorsCheckpoint(write_directory(tmp_path / "some", data, arrays))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.bias"):
        check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)


def _checked(folder: Path, data: dict[str, Any], arrays: dict[str, Any]) -> None:
    checkpoint = SafetensorsCheckpoint(write_directory(folder, data, arrays))
    check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)


def test_unknown_tensors_are_named_and_rotary_buffers_are_not_missed(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.int32)
    _checked(tmp_path / "fine", data, arrays)
    arrays["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    with pytest.raises(UnsupportedModelError, match=r"q_norm\.weight"):
        _checked(tmp_path / "extra", data, arrays)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    data = tiny_config()
    arrays = tiny_arrays(data)
    name = "model.layers.1.self_attn.q_proj.weight"
    missing = {k: v for k, v in arrays.items() if k != name}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight.*missing"):
        _checked(tmp_path / "missing", data, missing)
    with pytest.raises(CheckpointError, match=r"\[32, 31\].*\[32, 32\]"):
        _checked(tmp_path / "shape", data, arrays | {name: np.zeros((32, 31), np.float32)})


# --------------------------------------------------------------------------------- wrong headers


def _entry(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "hole": ({"a": _entry([1], 4, 8)}, "hole"),
    "overlap": ({"a": _entry([2], 0, 8), "b": _entry([1], 4, 8)}, "overlaps"),
    "beyond the end": ({"a": _entry([3], 0, 12)}, "describes 12"),
    "short of the end": ({"a": _entry([1], 0, 4)}, "describes 4"),
    "size of another shape": ({"a": _entry([3], 0, 8)}, "takes 12 bytes"),
    "backwards": ({"a": _entry([2], 8, 0)}, "no range"),
    "negative": ({"a": _entry([2], -8, 0)}, "no range"),
    "negative size": ({"a": _entry([-2, -1], 0, 8)}, "shape"),
    "overflowing shape": ({"a": _entry([2**40, 2**40, 2**40], 0, 8)}, "bytes"),
    "huge size": ({"a": _entry([2**80], 0, 8)}, "shape"),
    "fractional size": ({"a": _entry([2.0], 0, 8)}, "shape"),
    "boolean size": ({"a": _entry([True], 0, 4)}, "shape"),
    "no list": ({"a": _entry("2", 0, 8)}, "shape"),
    "many dimensions": ({"a": _entry([1] * 9, 0, 4)}, "shape"),
    "extra key": ({"a": _entry([2], 0, 8) | {"x": 1}}, "expected dtype"),
    "no entry": ({"a": 3}, "expected dtype"),
    "uint8": ({"a": _entry([8], 0, 8, "U8")}, "U8"),
    "fp8": ({"a": _entry([8], 0, 8, "F8_E5M2")}, "F8_E5M2"),
    "dtype a number": ({"a": _entry([2], 0, 8, 5)}, "dtype"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_wrong_headers(name: str, tmp_path: Path) -> None:
    header, words = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(frame(json.dumps(header).encode(), bytes(8)))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        frame(b"[]"),
        frame(b"{" * 1000),
        frame(b'{"a":' * 50_000),
        frame(b'{"a":' + b"[" * 100_000),
        frame(b"\xff\xfe{}"),
        frame(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":3}', bytes(4)),
        frame(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
        frame(b'{"a":{"dtype":"F32","shape":[' + b"1" * 9999 + b'],"data_offsets":[0,4]}}'),
    ],
)
def test_wrong_files_cost_no_memory(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_header_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(CheckpointError, match="100000001"):
        read_header(path)


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/a.safetensors", "a\0.safetensors", "a.bin", 3, None, ""]
)
def test_index_may_not_lead_out(shard: object, tmp_path: Path) -> None:
    data = tiny_config()
    folder = write_shards(tmp_path, data, tiny_arrays(data))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EMBED] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the name of a safetensors file"):
        SafetensorsCheckpoint(folder)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    data = tiny_config()
    folder = write_shards(tmp_path, data, tiny_arrays(data))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    moved = json.loads(path.read_text())
    moved["weight_map"][EMBED] = next(s for s in shards if s != moved["weight_map"][EMBED])
    path.write_text(json.dumps(moved))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        SafetensorsCheckpoint(folder)
    del index["weight_map"][EMBED]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        SafetensorsCheckpoint(folder)
    path.write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="weight_map"):
        SafetensorsCheckpoint(folder)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    data = tiny_config()
    folder = write_shards(tmp_path, data, tiny_arrays(data))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        SafetensorsCheckpoint(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin.*pickle"):
        SafetensorsCheckpoint(tmp_path)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    data = tiny_config()
    folder = write_directory(tmp_path, data, tiny_arrays(data))
    checkpoint = SafetensorsCheckpoint(folder)
    whole = safetensors_bytes(tiny_arrays(data))
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="shrank"):
        checkpoint.read("model.norm.weight", "fp32")
