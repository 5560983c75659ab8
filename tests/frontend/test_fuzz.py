"""Damaged and hostile files: whatever is in them, only CheckpointError comes out, and cheaply."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinterlm.errors import CheckpointError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.fields import parse_json
from sinterlm.frontend.gguf import GgufCheckpoint
from sinterlm.frontend.gguf_tokenizer import read_gguf_text
from sinterlm.frontend.hf_config import read_config
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint
from sinterlm.frontend.hf_text import read_text_assets
from tests.frontend.builders import (
    ARRAY,
    STRING,
    U32,
    frame,
    gguf_bytes,
    gguf_metadata,
    gguf_tensors,
    safetensors_bytes,
    tiny_arrays,
    tiny_config,
)
from tests.frontend.test_gguf_tokenizer import gpt2_metadata, sentencepiece_metadata

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
#: No tiny file may cost more than this to refuse or to read, in bytes.
MEMORY = 32 << 20

DATA = tiny_config(num_hidden_layers=1, vocab_size=8)
ARRAYS = tiny_arrays(DATA)
SAFETENSORS = safetensors_bytes(ARRAYS)

GGUF = gguf_bytes(
    gguf_metadata(DATA)
    | {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, STRING, ["a", "b", "ab", "<x>"]),
        "tokenizer.ggml.merges": (ARRAY, STRING, ["a b"]),
        "tokenizer.ggml.token_type": (ARRAY, U32, [1, 1, 1, 3]),
        "tokenizer.ggml.eos_token_id": (U32, 3),
    },
    gguf_tensors(ARRAYS, DATA),
)
#: A good file of each kind and the length of its header in bytes.
ORIGINALS = {
    "safetensors": (SAFETENSORS, 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]),
    "gguf": (GGUF, len(GGUF) - sum(-(-a.nbytes // 32) * 32 for a in ARRAYS.values())),
}

ODD_NUMBERS = st.sampled_from(
    [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, 1e300, 5e-324, -0.0]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ODD_NUMBERS | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip


def use(open_it: Callable[[], Checkpoint]) -> None:
    """Open, check, and read everything; only CheckpointError may stop it."""
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError), open_it() as checkpoint:
            with contextlib.suppress(CheckpointError):
                assert checkpoint.text is not None
            check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
            for name in checkpoint.tensors:
                checkpoint.read(name, "bf16")
            checkpoint.digest()
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def use_directory(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        use(lambda: SafetensorsCheckpoint(Path(folder)))


def use_gguf(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(content)
        use(lambda: GgufCheckpoint(path))


@st.composite
def mutated(draw: st.DrawFn, kind: str) -> bytes:
    """A file with some bytes of its header overwritten, removed or inserted, perhaps cut."""
    original, header = ORIGINALS[kind]
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(min(header, len(content)), 1) - 1))
        what = draw(st.sampled_from(["byte", "u32", "u64", "insert", "remove", "cut"]))
        if what == "byte":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif what in ("u32", "u64"):
            size, code = (4, "<I") if what == "u32" else (8, "<Q")
            values = [0, 1, 9, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
            value = draw(st.sampled_from(values)) % 256**size
            content[at : at + size] = struct.pack(code, value)
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=12))
        elif what == "remove":
            del content[at : at + draw(st.integers(1, 12))]
        else:
            del content[at + 1 :]
    return bytes(content)


@FUZZ
@given(mutated("safetensors"))
def test_mutated_safetensors(content: bytes) -> None:
    use_directory({"config.json": json.dumps(DATA).encode(), "model.safetensors": content})


@FUZZ
@given(mutated("gguf"))
def test_mutated_gguf(content: bytes) -> None:
    use_gguf(content)


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes(content: bytes) -> None:
    use_gguf(b"GGUF" + struct.pack("<I", 3) + content)
    use_directory({"config.json": json.dumps(DATA).encode(), "model.safetensors": frame(content)})


@st.composite
def odd_headers(draw: st.DrawFn) -> bytes:
    """A safetensors header whose entries are the right ones with some parts replaced."""
    length = struct.unpack("<Q", SAFETENSORS[:8])[0]
    header = json.loads(SAFETENSORS[8 : 8 + length])
    for name in draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        value = draw(JSON | st.lists(ODD_NUMBERS, max_size=3))
        if key is None or not isinstance(header[name], dict):
            header[name] = value
        else:
            header[name][key] = value
    return frame(json.dumps(header).encode(), SAFETENSORS[8 + length :])


@FUZZ
@given(odd_headers())
def test_odd_safetensors_headers(content: bytes) -> None:
    use_directory({"config.json": json.dumps(DATA).encode(), "model.safetensors": content})


ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])},
    optional={
        key: JSON | ODD_NUMBERS | st.floats(1e-3, 1e3)
        for key in (
            "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim", "attention_factor", "original_max_position_embeddings",
            "truncate", "type",
        )
    },
)  # fmt: skip
KEYS = st.sampled_from([
    *DATA, "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "attention_bias", "quantization_config", "num_experts",
    "partial_rotary_factor",
])  # fmt: skip


@settings(FUZZ, max_examples=600)
@given(
    st.dictionaries(KEYS, JSON | ODD_NUMBERS | st.integers(1, 64), max_size=3),
    st.none() | ROPES,
    st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]),
    st.sampled_from([None, 1, 4096, 2**31]),
)
def test_odd_configs(
    changes: dict[str, Any], rope: dict[str, Any] | None, family: str, length: int | None
) -> None:
    data = DATA | {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    data |= changes if rope is None else changes | {"rope_scaling": rope}
    with contextlib.suppress(CheckpointError):
        config = read_config(parse_json(json.dumps(data), "config.json"), length)
        assert len(config.rope.inv_freq) == config.head_dim // 2
        assert config.num_heads % config.num_kv_heads == 0
        assert len(config.sliding_windows) in (0, config.num_layers)


@FUZZ
@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4), st.binary(max_size=60))
def test_odd_json_files(data: dict[str, Any], raw: bytes) -> None:
    for content in (json.dumps(data).encode(), raw):
        with contextlib.suppress(CheckpointError):
            read_config(parse_json(content, "config.json"))


TEXT_KEYS = ["chat_template", "eos_token", "bos_token", "add_bos_token", "unk_token"]


@FUZZ
@given(
    st.dictionaries(st.sampled_from(TEXT_KEYS), JSON, max_size=3),
    st.dictionaries(st.sampled_from(["eos_token_id", "bos_token_id"]), JSON | ODD_NUMBERS),
    st.fixed_dictionaries(
        {}, optional={"added_tokens": JSON, "model": JSON | st.just({"vocab": 3})}
    ),
    st.sampled_from([None, b"\xff", b"{{ x }}"]),
)
def test_odd_text_files(
    settings_: dict[str, Any], generation: dict[str, Any], tokenizer: Any, jinja: bytes | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        if jinja is not None:
            (folder / "chat_template.jinja").write_bytes(jinja)
        with contextlib.suppress(CheckpointError):
            assert all(type(i) is int for i in read_text_assets(folder, generation).eos_token_ids)


VALUES = JSON.filter(lambda v: v is not None) | st.lists(st.text(max_size=3) | ODD_NUMBERS)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@FUZZ
@given(st.data())
def test_odd_tokenizer_metadata(model: str, data: st.DataObject) -> None:
    metadata = gpt2_metadata() if model == "gpt2" else sentencepiece_metadata()
    keys = [*metadata, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eot_token_id",
            "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template"]  # fmt: skip
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        metadata[key] = data.draw(VALUES)
    with contextlib.suppress(CheckpointError):
        read_gguf_text(Path("m.gguf"), metadata, "llama")
