"""The same weights in every format: written, read back by our own readers, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sinterlm import cli
from sinterlm.artifact.progress import LogProgress
from sinterlm.artifact.text import TextAssets
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UnsupportedModelError
from sinterlm.frontend import named_configs
from sinterlm.frontend.dummy import DummyCheckpoint
from sinterlm.frontend.export_gguf import GGUF_FORMATS, GgufFormat, write_gguf
from sinterlm.frontend.export_hf import write_hf_folder
from sinterlm.frontend.hf_config import read_config
from sinterlm.frontend.numeric import bf16_to_fp32
from sinterlm.frontend.source import resolve_model

#: Allowed error of one block's values, as a share of its largest: half a step, scale in fp16.
WORST = {"bf16": 0.0, "q8_0": 0.5 / 127 + 2e-3, "q4_0": 1.0 / 8 + 2e-3}


def small(**changes: object) -> dict[str, object]:
    data = named_configs.named_configs()["qwen2.5-0.5b"]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49408}  # fmt: skip
    return {**data, **sizes, **changes}


@pytest.fixture(scope="module")
def text() -> TextAssets:
    with resolve_model("smollm2") as checkpoint:
        return checkpoint.text


@pytest.mark.parametrize(
    "family",
    ["LlamaForCausalLM", pytest.param("Qwen2ForCausalLM", marks=pytest.mark.slow)],
)
def test_read_back(tmp_path: Path, text: TextAssets, family: str) -> None:
    data = small(architectures=[family], model_type=family[:5].lower())
    source = DummyCheckpoint("small", read_config(data), seed=3)
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf_folder(folder, source, text, LogProgress())
    with resolve_model(str(folder)) as read:
        assert read.config == replace(source.config)
        assert read.text.eos_token_ids == text.eos_token_ids
        assert Tokenizer(read.text).special_token_ids == Tokenizer(text).special_token_ids
        assert set(read.tensors) == set(source.tensors)
        for name in source.tensors:
            assert np.array_equal(read.read(name, "bf16"), source.read(name, "bf16")), name
    for kind in GGUF_FORMATS:
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, source, text, kind, LogProgress())
        with resolve_model(str(path)) as read:
            assert read.config.rope.inv_freq == pytest.approx(source.config.rope.inv_freq)
            assert set(read.tensors) == set(source.tensors)
            for name in source.tensors:
                compare(source.read(name, "bf16"), read.read(name, "fp32"), kind, name)
            sentence = "The quick brown fox, 123 jumps!\n"
            ids = Tokenizer(read.text).encode(sentence)
            assert ids == Tokenizer(text).encode(sentence)


def compare(
    bits: np.ndarray,
    read: np.ndarray,
    kind: GgufFormat,
    name: str,  # type: ignore[type-arg]
) -> None:
    values = bf16_to_fp32(bits)
    if values.ndim == 1 or kind == "bf16":
        assert np.array_equal(values, read), name
        return
    blocks = values.reshape(-1, 32)
    error = np.abs(blocks - read.reshape(-1, 32))
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    assert np.all(error <= WORST[kind] * largest), name


def test_scaled_rope_is_refused(tmp_path: Path, text: TextAssets) -> None:
    llama = named_configs.named_configs()["llama-3.1-8b"]
    source = DummyCheckpoint("l", read_config({**llama, "num_hidden_layers": 1}))
    with pytest.raises(UnsupportedModelError, match="llama3 rope"):
        write_gguf(tmp_path / "x.gguf", source, text, "bf16", LogProgress())


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"tiny": small()}
    monkeypatch.setattr(named_configs, "named_configs", lambda: dict(known))
    words = ["bench", "make-checkpoint", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sinterlm.frontend.source.named_configs", lambda: dict(known))
    assert cli.main([*words, "tiny", "--formats", "safetensors,q8_0", "--seed", "2"]) == 0
    made = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in made] == ["hf", "tiny-seed2-q8_0.gguf"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["hf", "tiny-seed2-q8_0.gguf"]
    stamps = [path.stat().st_mtime_ns for path in made]
    assert cli.main([*words, "tiny", "--formats", "safetensors,q8_0", "--seed", "2"]) == 0
    assert stamps == [path.stat().st_mtime_ns for path in made]
    assert cli.main([*words, "nothing"]) == 2
    assert "'nothing' is none of smollm2, tiny" in capsys.readouterr().err
